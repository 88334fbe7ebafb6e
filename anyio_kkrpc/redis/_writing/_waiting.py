"""Waiting until those who post may go on."""

from __future__ import annotations

from anyio import Event, current_time, move_on_after

from ._ledger import Ledger, Phase

__all__ = ("HIGH_WATER", "Waiting")

# Bytes that wait, while nothing can be written, before those who add more wait too.
HIGH_WATER = 16 * 1024 * 1024


class Waiting:
    """Who adds to a ledger waits while it is full.

    :param ledger: has what waits to be written
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._room: Event | None = None

    @property
    def is_full(self) -> bool:
        """Whether those who add more wait."""
        ledger = self._ledger
        if ledger.flowing:
            return False
        return ledger.phase is Phase.FEEDING or ledger.weight > HIGH_WATER

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
