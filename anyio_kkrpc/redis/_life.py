"""What a transport is in the middle of: each phase comes once, and none comes again."""

from __future__ import annotations

from enum import IntEnum

from anyio import Event, current_time, move_on_after

from .._runtime._entrance import Entrance
from .._runtime._fresh import fresh_copy

__all__ = ("Life", "Phase")


class Phase(IntEnum):
    """In their order; some may be left out."""

    # Nothing was done yet.
    NEW = 0
    # It connects. What is sent now waits until it has, and is there to be answered.
    ENTERING = 1
    # It reads and writes.
    OPEN = 2
    # It reads no more, and nobody can send; what is queued, and its farewell, is written.
    ENDED = 3
    # Nothing is written any more.
    CLOSED = 4


class Life:
    """One transport's.

    :param what: what is entered, for errors
    :ivar phase: what it is in the middle of
    :ivar running: whether messages are taken: it is open
    :ivar entered: whether it has been entered
    """

    def __init__(self, what: str) -> None:
        self._entrance = Entrance(what)
        self._reason: Exception | None = None
        self._entered: Event | None = None
        self.phase = Phase.NEW
        self.running = self.entered = False

    def enter(self) -> None:
        """Enter it.

        :raises RuntimeError: if it was entered before, or made by another process
        """
        self._entrance.enter()
        self.entered = True
        self.turn(Phase.ENTERING)

    def check(self) -> None:
        """Raise unless messages are taken.

        :raises RuntimeError: if it has not been entered
        :raises Exception: like what it has ended by
        """
        if self._reason is not None:
            raise fresh_copy(self._reason)
        if not self.entered:
            raise RuntimeError("the transport has not been entered: use 'async with'")

    async def wait_open(self, deadline: float | None = None) -> bool:
        """Wait until messages are taken; return false if that took until the deadline.

        :param deadline: on AnyIO's clock
        :raises RuntimeError: as `check`
        :raises Exception: the same
        """
        self.check()
        if self.phase is Phase.ENTERING:
            with move_on_after(None if deadline is None else deadline - current_time()):
                entered = self._entered = self._entered or Event()
                await entered.wait()
            self.check()
        return self.phase is not Phase.ENTERING

    def end(self, reason: Exception) -> None:
        """Note that it ends; only the first reason counts."""
        self._reason = self._reason or reason
        self.turn(Phase.ENDED)

    def turn(self, phase: Phase) -> bool:
        """Go on to a phase; return false if that has come already, or a later one."""
        if phase <= self.phase:
            return False
        self.phase = phase
        self.running = phase is Phase.OPEN
        if phase is not Phase.ENTERING and self._entered is not None:
            self._entered.set()
        return True
