"""What AnyIO doesn't offer, or would find out anew at each use: things of the event loop.

The clock and an event for one task are on the way of every call, where the look-up costs more than
the thing itself. `scheduler` lets a finalizer wake a task. The others tell what somebody else's
code has left behind in a task.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, cast

from anyio import get_current_task
from anyio.lowlevel import current_token


class OneShot(Protocol):
    """An event that one task at most waits for."""

    def set(self) -> object:
        """Wake the task, now or as soon as it waits. Idempotent."""

    def wait(self) -> Awaitable[object]:
        """Return what waits until it is set, and not at all if it is. To be awaited once."""
        raise NotImplementedError


class _FutureEvent:
    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wait(self) -> Awaitable[object]:
        return self._future


def clock() -> Callable[[], float]:
    """Return the function that `anyio.current_time` would call here, in seconds."""
    loop = current_token().native_token
    if isinstance(loop, asyncio.AbstractEventLoop):
        return loop.time
    import trio

    return trio.lowlevel.current_clock().current_time


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


class OneShots:
    """Makes each `OneShot` for the event loop that runs then.

    For what may outlive one. Which loop it is, is asked only when it may be another one.
    """

    __slots__ = ("_loop", "_make")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._make: Callable[[], OneShot] | None = None

    def __call__(self) -> OneShot:
        make = self._make
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # trio runs
            loop = None
        if make is None or loop is not self._loop:
            self._loop, self._make = loop, (make := one_shots())
        return make()


def checkpoints() -> Callable[[], Awaitable[None]]:
    """Return what `anyio.lowlevel.checkpoint` would call here."""
    return current_token().backend_class.checkpoint


def readable() -> Callable[[socket.socket], Awaitable[None]]:
    """Return what `anyio.wait_readable` would call here."""
    return current_token().backend_class.wait_readable


def cancellation_check() -> Callable[[], Awaitable[None]]:
    """Return what `anyio.lowlevel.checkpoint_if_cancelled` would call here."""
    return current_token().backend_class.checkpoint_if_cancelled


def cancel_requests() -> Callable[[], object]:
    """Return what tells, by a true value, that the present task was cancelled by other means than
    a cancel scope. Only asyncio has such.
    """
    if not isinstance(current_token().native_token, asyncio.AbstractEventLoop):
        return bool
    if sys.version_info < (3, 11):
        return get_current_task().has_pending_cancellation
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling


def open_scopes() -> Callable[[], object]:
    """Return what stands for the cancel scopes that are open in the present task.

    As long as the task doesn't wait, an equal value says that no scope was opened or left since. On
    asyncio a scope refers to the task in which it is open, so that is the number of references to
    the task; on trio it is the innermost scope's part of the task, which AnyIO looks at, too. Where
    neither can be known, such as where references aren't counted, the values are never equal.
    """
    if isinstance(current_token().native_token, asyncio.AbstractEventLoop):
        count = getattr(sys, "getrefcount", None)
        if count is not None:
            return partial(count, asyncio.current_task())
    else:
        import trio

        task = trio.lowlevel.current_task()
        if hasattr(task, "_cancel_status"):
            return partial(getattr, task, "_cancel_status")
    return object


def in_task() -> bool:
    """Whether a task runs: none does where a coroutine is closed after its event loop."""
    try:
        get_current_task()
    except Exception:  # each backend has its own
        return False
    return True
