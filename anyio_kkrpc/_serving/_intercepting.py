"""How requests go through the middleware of the serving side: those that run, and the refused."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextvars import Context, ContextVar
from typing import Any

from anyio.lowlevel import checkpoint_if_cancelled
from msgspec import UNSET

from .._driver._context import current_call
from .._driver._endings import tell
from .._exceptions import RPCError
from .._values._conversion import check_own
from ..middleware import Invocation, Middleware, StreamEnd, StreamWatcher, is_stream, pass_through
from ._table import Method, Property

# Of a stream that reached nobody.
NOT_SENT = StreamEnd("lost", 0)

_watchers: ContextVar[list[StreamWatcher] | None] = ContextVar("anyio_kkrpc_watchers", default=None)


def watchers_in(context: Context) -> list[StreamWatcher]:
    """Return those whom the request of this context has for the end of its stream."""
    return context.get(_watchers) or []


class Interceptor:
    """Calls what is exposed through the middleware of one channel, in the request's context."""

    __slots__ = ("_middleware",)

    def __init__(self, middleware: tuple[Middleware, ...]) -> None:
        self._middleware = middleware

    def wrap(
        self, function: Callable[..., Any], operation: str, source: Method | Property
    ) -> Callable[..., Awaitable[Any]]:
        """Return what calls a function through the middleware.

        The middleware sees the name of what is called, whatever alias the caller has used.
        """
        kind = Any if operation == "set" else source.result

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            checked: Any = UNSET
            watchers: list[StreamWatcher] = []

            async def last(call: Invocation) -> Any:
                nonlocal checked, watchers
                watchers = call.stream_ended = []
                result = function(*call.args, **call.kwargs)
                if inspect.isawaitable(result):
                    result = await result
                checked = check_own(result, kind, source.name)
                return checked

            call = _invocation(operation, source.name, list(args), kwargs)
            streams = False
            try:
                result = await pass_through(self._middleware, call, last)
                if result is not checked:  # what a middleware has made of it goes out, too
                    result = check_own(result, kind, source.name)
                streams = is_stream(result)
            finally:
                if watchers and not streams:
                    tell(watchers, NOT_SENT)
            _watchers.set(watchers)
            return result

        return wrapped

    async def refuse(self, error: RPCError, operation: str, method: str, *, known: bool) -> Any:
        """Let the middleware see a call that isn't made, as one that raises ``error``.

        :param known: whether there is such a name
        """

        async def last(call: Invocation) -> Any:
            await checkpoint_if_cancelled()
            raise error

        call = _invocation(operation, method, [], {})
        call.refused, call.known = error, known
        return await pass_through(self._middleware, call, last)


def _invocation(operation: str, method: str, args: list[Any], kwargs: dict[str, Any]) -> Invocation:
    info = current_call()
    return Invocation(
        side="server",
        operation=operation,
        method=method,
        args=args,
        kwargs=kwargs,
        metadata=info.metadata,
        peer=info.sender,
        deadline=info.deadline,
        attempt=info.attempt,
    )
