"""Whether requests are read: begun, stopped, begun again, by one task at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TypeAlias

from anyio import CancelScope, Event, create_task_group
from anyio.abc import TaskGroup

from ..._runtime._bell import Bell

__all__ = ("Reading", "Requests")

# Given where to start what runs beside it, returns what reads until it is cancelled, or nothing
# more can be read.
Begin: TypeAlias = Callable[[TaskGroup], Callable[[], Awaitable[None]]]


class Reading(Enum):
    """What the task is doing."""

    NOT = "there is none"
    ON = "it reads"
    STOPPING = "it was told to stop, and hasn't yet"


# What `start` and `stop` make of each.
_STARTED = {Reading.NOT: Reading.ON, Reading.ON: Reading.ON, Reading.STOPPING: Reading.ON}
_STOPPED = {
    Reading.NOT: Reading.NOT,
    Reading.ON: Reading.STOPPING,
    Reading.STOPPING: Reading.STOPPING,
}


class Requests:
    """Has requests read as long as they are wanted.

    :param begin: returns what reads them, each time anew
    :ivar reading: what the task is doing
    :ivar wanted: whether it reads
    :ivar bell: set when it is to for the first time
    """

    def __init__(self, begin: Begin) -> None:
        self._begin = begin
        self._scope: CancelScope | None = None
        self._ended = Event()
        self.bell = Bell()
        self.reading = Reading.NOT
        self.wanted = False

    def start(self, tasks: TaskGroup) -> None:
        """Have them read. A task that was told to stop and hasn't yet goes on after it.

        :param tasks: where the task runs
        """
        self.bell.set()
        before = self.reading
        self._turn(_STARTED[before])
        if before is Reading.NOT:
            self._ended = Event()
            tasks.start_soon(self._run, name="anyio_kkrpc redis requests")

    def stop(self) -> None:
        """Have them read no more."""
        self._turn(_STOPPED[self.reading])
        if self._scope is not None:
            self._scope.cancel()

    async def wait_stopped(self) -> None:
        """Wait until nothing is read any more."""
        if self.reading is not Reading.NOT:
            await self._ended.wait()

    async def _run(self) -> None:
        try:
            while self.reading is Reading.ON:
                with CancelScope() as self._scope:
                    async with create_task_group() as tasks:
                        await self._begin(tasks)()
                        self._turn(Reading.STOPPING)  # by itself: it is of no use any more
                        tasks.cancel_scope.cancel()
        finally:
            self._scope = None
            self._turn(Reading.NOT)
            self._ended.set()

    def _turn(self, reading: Reading) -> None:
        self.reading = reading
        self.wanted = reading is Reading.ON
