"""Waiting until those who post may go on."""

from __future__ import annotations

import logging
from time import monotonic

from anyio import Event, current_time, move_on_after

from ..._runtime._sparing import Sparing
from ...records import Record
from ._ledger import Ledger, Phase

__all__ = ("HIGH_WATER", "MOST", "Waiting")

logger = logging.getLogger("anyio_kkrpc")

# Bytes that wait, while nothing can be written, before those who add more wait too; and records
# that wait before those of who can't wait are thrown away, as many as a channel's outbox has.
HIGH_WATER = 16 * 1024 * 1024
MOST = 100_000


class Waiting:
    """Who adds to a ledger waits while it is full.

    :param ledger: has what waits to be written
    :ivar thrown_away: records of who can't wait that found no room
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._room: Event | None = None
        self._drops = Sparing()
        self.thrown_away = 0

    @property
    def is_full(self) -> bool:
        """Whether those who add more wait."""
        ledger = self._ledger
        if ledger.flowing:
            return False
        return ledger.phase is Phase.FEEDING or ledger.weight > HIGH_WATER

    def admits(self, record: Record) -> bool:
        """Return whether there is room for a record of somebody who can't wait. What is too much is
        thrown away, counted and logged: who is told less waits until its own time is over.
        """
        ledger = self._ledger
        if ledger.flowing or (ledger.count < MOST and ledger.weight <= HIGH_WATER):
            return True
        self.thrown_away += 1
        more = self._drops.admit(monotonic(), "counted only")
        if more is not None:
            what, count = type(record).__name__, ledger.count
            logger.warning("a %s was thrown away: %d records wait to be sent%s", what, count, more)
        return False

    async def wait(self, deadline: float | None) -> bool:
        """Wait until there is room; return false if that took until the deadline."""
        if not self.is_full:
            return True
        with move_on_after(None if deadline is None else deadline - current_time()) as scope:
            while self.is_full:
                room = self._room = self._room or Event()
                await room.wait()
        return not scope.cancelled_caught

    def notify(self) -> None:
        """Let them go on, if there is room."""
        if not self.is_full:
            self.end()

    def end(self) -> None:
        """Let them look again."""
        if self._room is not None:
            self._room.set()
            self._room = None
