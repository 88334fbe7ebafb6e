"""What AnyIO doesn't offer, or would find out anew at each use: three things of the event loop.

The clock and an event for one task are on the way of every call, where the look-up costs more than
the thing itself. The third lets a finalizer wake a task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from anyio.lowlevel import current_token


class OneShot(Protocol):
    """An event that one task at most waits for."""

    def set(self) -> object:
        """Wake the task, now or as soon as it waits. Idempotent."""

    async def wait(self) -> object:
        """Wait until it is set; return at once if it is."""


class _FutureEvent:
    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        await self._future


def clock() -> Callable[[], float]:
    """Return the function that `anyio.current_time` would call here, in seconds."""
    loop = current_token().native_token
    if isinstance(loop, asyncio.AbstractEventLoop):
        return loop.time
    import trio

    return trio.current_time


def scheduler() -> Callable[[Callable[[], object]], None]:
    """Return what has the event loop call a function soon, asked for from anywhere.

    From the garbage collector an event can't be set: it may run in the middle of a task's `wait`,
    which then waits for ever. After the end of the loop nothing is called.
    """
    loop = current_token().native_token
    if isinstance(loop, asyncio.AbstractEventLoop):
        ask: Callable[[Callable[[], object]], object] = loop.call_soon_threadsafe
        over: type[BaseException] = RuntimeError
    else:
        import trio

        assert isinstance(loop, trio.lowlevel.TrioToken)
        ask, over = loop.run_sync_soon, trio.RunFinishedError

    def soon(function: Callable[[], object]) -> None:
        try:
            ask(function)
        except over:
            pass

    return soon


def one_shots() -> Callable[[], OneShot]:
    """Return what makes a `OneShot` here."""
    loop = current_token().native_token
    if isinstance(loop, asyncio.AbstractEventLoop):
        return lambda: _FutureEvent(loop)
    import trio

    return cast(Callable[[], OneShot], trio.Event)
