"""What a handler can learn of the call that it serves."""

from __future__ import annotations

import sys
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextvars import Context, ContextVar
from types import CoroutineType
from typing import Any, TypeVar

from anyio import to_thread
from anyio.lowlevel import checkpoint_if_cancelled
from msgspec import Struct

from .._runtime._clock import in_task
from ..abc import Item

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

T = TypeVar("T")

running: ContextVar[CallInfo | None] = ContextVar("anyio_kkrpc_current_call", default=None)


class CallInfo(Struct, frozen=True):
    """The request that a handler serves.

    :ivar id: the caller's id of the request
    :ivar method: dotted name of what was called
    :ivar sender: id of the calling peer, ``None`` where the transport has one peer only
    :ivar attempt: how often the request has been delivered, this time included
    :ivar deadline: when the caller gives up, on AnyIO's clock (`anyio.current_time`), or ``None``
    :ivar metadata: what the caller attached, such as ``traceparent``
    :ivar key: what `with_call_options` or `RPCChannel.start` gave as ``key``, ``None`` without one
    """

    id: str
    method: str
    sender: str | None
    attempt: int
    deadline: float | None
    metadata: dict[str, Any]
    key: str | None = None
    _report: Callable[[Any], Awaitable[None]] | None = None
    _resume: Callable[[], Awaitable[Item[Any] | None]] | None = None

    async def progress(self, value: Any) -> None:
        """Tell how far this call has come, for `CallHandle.progress`; not more than ten times a
        second, what is told before that is left out. Of a call without a key nobody is told.

        :raises TypeError: if the value can't be encoded
        """
        if self._report is not None:
            await self._report(value)

    async def resume(self) -> Item[Any] | None:
        """Have what this handler yields follow what earlier attempts at this call have yielded, if
        their process was killed, say; without this, their items are removed, and who has read them
        gets `StreamRestartedError`. To be called once, before the first item.

        :return: the last item that is there, ``None`` if there is none, or the call has no key
        :raises DeliveryError: if the call is another worker's by now
        """
        return None if self._resume is None else await self._resume()


def earlier(deadline: float | None, serving: CallInfo | None) -> float | None:
    """Return when a call is out of time that is made while another one is served, if one is: it has
    no more time than that.
    """
    if serving is None or serving.deadline is None:
        return deadline
    return serving.deadline if deadline is None else min(deadline, serving.deadline)


def current_call() -> CallInfo:
    """Return the call that the running handler serves.

    :raises LookupError: outside of a handler
    """
    info = running.get()
    if info is None:
        raise LookupError("current_call() works only inside a handler")
    return info


async def raise_unless_failure(exc: BaseException) -> None:
    """Return if what code of the user has raised is an error of that code.

    All is, whatever it be, but Ctrl-C, the end of a task that is thrown away together with its
    event loop, and what came of our cancelling the present task; then that is raised. That a task
    or a thread which the code waited for was cancelled by somebody else is an error, too.
    """
    if isinstance(exc, Exception):
        return
    if isinstance(exc, GeneratorExit):
        interrupts = not in_task()
    elif isinstance(exc, BaseExceptionGroup):
        interrupts = exc.subgroup(KeyboardInterrupt) is not None
    else:
        interrupts = isinstance(exc, KeyboardInterrupt)
    if interrupts:
        raise exc
    await checkpoint_if_cancelled()


def begin(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Coroutine[Any, Any, Any] | None, Any]:
    """Call a function, and run the coroutine that it returns until it waits for something.

    :return: the coroutine and what it waits for, for `go_on`; ``None`` and the result if it doesn't
        wait, or the function returned something else
    """
    result = function(*args, **kwargs)
    if result.__class__ is not CoroutineType:
        return None, result
    try:
        return result, result.send(None)
    except StopIteration as stop:
        return None, stop.value


@types.coroutine
def go_on(
    context: Context, coroutine: Coroutine[Any, Any, T], awaited: Any
) -> Generator[Any, Any, T]:
    """Run the rest of a coroutine in the present task, but in a context of its own.

    A task that serves one request after another would otherwise carry the context variables that
    one handler sets into the next.

    :param awaited: what the coroutine waits for
    """
    argument: Any
    step: Callable[..., Any]
    while True:
        try:
            argument = yield awaited
        except BaseException as exc:  # whatever comes goes to the coroutine
            step, argument = coroutine.throw, exc
        else:
            step = coroutine.send
        try:
            awaited = context.run(step, argument)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def begin_awaiting(awaitable: Awaitable[Any]) -> tuple[Coroutine[Any, Any, Any] | None, Any]:
    """Await something until it waits for something else.

    :return: as `begin`
    """
    coroutine: Any = awaitable
    if awaitable.__class__ not in _STEPS and not isinstance(awaitable, Coroutine):
        coroutine = _as_coroutine(awaitable)
    try:
        return coroutine, coroutine.send(None)
    except StopIteration as stop:
        return None, stop.value


async def run_in_context(context: Context, awaitable: Awaitable[T]) -> T:
    """Await something in the present task, but in a context of its own."""
    coroutine, value = context.run(begin_awaiting, awaitable)
    if coroutine is None:
        return value  # type: ignore[no-any-return]
    return await go_on(context, coroutine, value)


async def run_in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a function in a thread, and raise what it raises here.

    If it were raised in what waits for the thread, a `GeneratorExit` would close our coroutines.
    """

    def run() -> tuple[Any, BaseException | None]:
        try:
            return function(*args, **kwargs), None
        except BaseException as exc:
            return None, exc

    result, raised = await to_thread.run_sync(run)
    if raised is not None:
        try:
            raise raised
        finally:
            del raised  # it refers to this frame
    return result


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def _one(awaitable: Any) -> AsyncGenerator[None, None]:
    yield await awaitable


_step: Any = anext(_one(None))
_step.close()  # else it would complain that nobody has awaited it
# What is known to be a coroutine: to find that out takes as long as a step of it.
_STEPS = frozenset({CoroutineType, type(_step)})
