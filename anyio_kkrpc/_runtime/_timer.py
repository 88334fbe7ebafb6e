"""One timer for the deadlines of all calls: a heap and one cancel scope, not a scope for each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from anyio import CancelScope, current_time, sleep_forever
from msgspec import Struct

from ._bell import Bell

logger = logging.getLogger("anyio_kkrpc")

# Finished entries stay in the heap until they come up; beyond this many they are swept out.
_SWEEP_FROM = 1024


class TimerEntry(Struct, eq=False):
    """A deadline in a `Timer`.

    :ivar action: what is called at that time; ``None`` once it was, or was taken back
    """

    action: Callable[[], None] | None


class Timer:
    """Calls functions at their deadlines, from one task. Times are AnyIO's clock, in seconds.

    :ivar bell: set once there is something for `run` to do
    """

    def __init__(self) -> None:
        self.bell: Bell = Bell()
        self._heap: list[tuple[float, int, TimerEntry]] = []
        self._number = count()
        self._cancelled = 0
        self._scope: CancelScope | None = None
        self._deadline = inf  # of that scope, which takes longer to ask

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def at(self, deadline: float, action: Callable[[], None]) -> TimerEntry:
        """Have ``action`` called, without awaiting, at ``deadline``.

        What it was to end may have ended in the same turn: it has to look. If it raises, that is
        logged, and the others are called all the same.
        """
        entry = TimerEntry(action)
        heappush(self._heap, (deadline, next(self._number), entry))
        if deadline < self._deadline:
            if self._scope is None:
                self.bell.set()
            else:
                self._scope.deadline = self._deadline = deadline
        return entry

    def cancel(self, entry: TimerEntry) -> None:
        """Take back what was to be called; harmless when it was, or was taken back before."""
        if entry.action is None:
            return
        entry.action = None
        self._cancelled += 1
        if self._cancelled > _SWEEP_FROM and self._cancelled * 2 > len(self._heap):
            self._heap = [item for item in self._heap if item[2].action is not None]
            heapify(self._heap)
            self._cancelled = 0

    async def run(self) -> None:
        """Wait for deadlines until cancelled."""
        while True:
            self._fire(current_time())
            self._deadline = self._heap[0][0] if self._heap else inf
            with CancelScope(deadline=self._deadline) as self._scope:
                await sleep_forever()

    def _fire(self, now: float) -> None:
        while self._heap:
            deadline, _, entry = self._heap[0]
            action = entry.action
            if action is not None and deadline > now:
                return
            heappop(self._heap)
            if action is None:
                self._cancelled -= 1
            else:
                entry.action = None
                try:
                    action()
                except KeyboardInterrupt:
                    raise
                except BaseException:
                    logger.exception("what was due at a deadline failed")
