"""What is exposed is called, read, written and constructed, in the context of a request."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from functools import partial
from time import perf_counter
from typing import Any

from msgspec import UNSET

from .._driver._context import begin, go_on, run_in_context, run_in_thread
from .._driver._core import Core
from .._driver._inflow import Inflow, RemoteStream
from .._exceptions import MethodNotFoundError, RPCError
from .._protocol._calls import Handling
from .._protocol._records import Request
from .._protocol._streams import Consumer
from ._intercepting import Interceptor
from ._refusals import Refused
from ._slow import SLOW_HANDLER, SlowHandlers
from ._table import Method, Property


class Invoker:
    """Does what requests ask for, once it is known what that is about.

    :param interceptor: through which it is done, if there is middleware
    """

    def __init__(self, core: Core, interceptor: Interceptor | None) -> None:
        self._core = core
        self._conversation = core.conversation
        self._interceptor = interceptor
        self._slow = SlowHandlers()

    def begin(
        self, method: Method, request: Request, handling: Handling, context: Context
    ) -> tuple[Coroutine[Any, Any, Any] | None, Any]:
        """Call what runs on the event loop, with what is around it, until it waits.

        :return: for `go_on`: the coroutine and what it waits for, or ``None`` and what came
        """
        args, kwargs = self._arguments(method, request, handling)
        function = method.function
        if self._interceptor is not None:
            function = partial(run_in_thread, function) if method.in_thread else function
            function = self._wrapped(function, request, method)
        started = perf_counter()
        if started > self._slow.stale_at:
            self._slow.begin()
        coroutine, value = context.run(begin, function, args, kwargs)
        if perf_counter() - started > SLOW_HANDLER:
            self._slow.judge(method.name, started)
        return coroutine, value

    async def go_on(
        self,
        handling: Handling,
        context: Context,
        coroutine: Coroutine[Any, Any, Any] | None,
        value: Any,
    ) -> Any:
        """Return the result of what was begun."""
        if coroutine is None:
            return await self._result(value, handling, context)
        handling.driver.waits()
        return await go_on(context, coroutine, value)

    async def invoke(
        self, method: Method, request: Request, handling: Handling, context: Context
    ) -> Any:
        """Call what is exposed, and return its result."""
        if not method.in_thread or self._interceptor is not None:
            begun = self.begin(method, request, handling, context)
            return await self.go_on(handling, context, *begun)
        args, kwargs = self._arguments(method, request, handling)
        handling.driver.waits()
        # A copy, because the context can't be entered twice and the thread may outlive a step.
        return await run_in_thread(context.copy().run, method.function, *args, **kwargs)

    def _arguments(
        self, method: Method, request: Request, handling: Handling
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return what a method is called with.

        :raises Refused: if the request's arguments don't fit
        """
        given = request.a
        if (
            request.k is UNSET
            and given is not UNSET
            and [*map(type, given)] == method.arguments.exact.get(len(given))
        ):
            return given, {}  # as most are
        try:
            args, kwargs = self._conversation.unpack(request, handling)
            if handling.consumers:
                args = [self._open_stream(value) for value in args]
                kwargs = {name: self._open_stream(value) for name, value in kwargs.items()}
            if args is not request.a and any(value is UNSET for value in args):
                args, kwargs = method.arguments.without_undefined(args, kwargs)
            return method.arguments.convert(args, kwargs)
        except RPCError as exc:
            raise Refused(exc) from None

    async def _result(self, value: Any, handling: Handling, context: Context) -> Any:
        """Return a value, awaited if it is awaitable."""
        if not inspect.isawaitable(value):
            return value
        handling.driver.waits()
        return await run_in_context(context, value)

    def _wrapped(
        self, function: Callable[..., Any], request: Request, source: Method | Property
    ) -> Callable[..., Any]:
        interceptor = self._interceptor
        return function if interceptor is None else interceptor.wrap(function, request.op, source)

    async def construct(
        self, cls: Method, request: Request, handling: Handling, context: Context
    ) -> Any:
        return own_fields(await self.invoke(cls, request, handling, context))

    async def get(
        self, entry: Property, request: Request, handling: Handling, context: Context
    ) -> Any:
        get = self._wrapped(entry.get, request, entry)
        return await self._result(context.run(get), handling, context)

    async def set(
        self, entry: Property, request: Request, handling: Handling, context: Context
    ) -> Any:
        if not entry.writable:
            raise Refused(MethodNotFoundError(f"{entry.name} is not writable"))
        try:
            value = self._conversation.unpack_value(request, handling)
            value = entry.convert(self._open_stream(value))
        except RPCError as exc:
            raise Refused(exc) from None
        result = context.run(self._wrapped(entry.set, request, entry), value)
        await self._result(result, handling, context)
        return True

    def _open_stream(self, value: Any) -> Any:
        if isinstance(value, Consumer):
            return RemoteStream(Inflow(self._core, value, self._core.timeout))
        return value


Operation = Callable[[Invoker, Any, Request, Handling, Context], Coroutine[Any, Any, Any]]
OPERATIONS: dict[str, Operation] = {
    "call": Invoker.invoke,
    "get": Invoker.get,
    "set": Invoker.set,
    "new": Invoker.construct,
}


async def failing(exc: BaseException) -> Any:
    """Raise what a call has raised before it was awaited."""
    try:
        raise exc
    finally:
        del exc  # which knows this frame


def own_fields(instance: object) -> Any:
    """Return what a constructed instance is by value: its own public fields."""
    fields = getattr(instance, "__dict__", None)
    if fields is None:
        return instance
    return {name: value for name, value in fields.items() if not name.startswith("_")}
