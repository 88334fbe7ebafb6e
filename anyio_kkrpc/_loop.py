"""What AnyIO would find out anew at each use: the event loop's clock, and an event for one task.

Both are on the way of every call, where the look-up costs more than the thing itself.
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

    def is_set(self) -> bool:
        """Whether it was set."""

    async def wait(self) -> object:
        """Wait until it is set; return at once if it is."""


class _FutureEvent:
    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def is_set(self) -> bool:
        return self._future.done() and not self._future.cancelled()

    async def wait(self) -> None:
        await self._future


def clock() -> Callable[[], float]:
    """Return the function that `anyio.current_time` would call here, in seconds."""
    loop = current_token().native_token
    if isinstance(loop, asyncio.AbstractEventLoop):
        return loop.time
    import trio

    return trio.current_time


def one_shots() -> Callable[[], OneShot]:
    """Return what makes a `OneShot` here."""
    loop = current_token().native_token
    if isinstance(loop, asyncio.AbstractEventLoop):
        return lambda: _FutureEvent(loop)
    import trio

    return cast(Callable[[], OneShot], trio.Event)
