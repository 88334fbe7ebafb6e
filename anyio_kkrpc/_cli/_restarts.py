"""When a worker process that has ended is started again, and when the service ends.

Without I/O and clocks: the supervisor tells what happened, and is told what to do.
"""

from __future__ import annotations

import signal
from enum import Enum

from msgspec import Struct

# Seconds before a worker is started again that died young once more, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# A worker that served for this long, in seconds, has not died young.
STARTED_WELL = 10.0


class Word(str, Enum):
    """What a worker tells its supervisor, since an exit status may be a handler's doing."""

    serving = "serving"
    refused = "refused"  # it can't be what it was told to be
    unreachable = "unreachable"  # there is no server, which may come yet
    destroyed = "destroyed"  # by a destroy signal
    recycled = "recycled"  # it has done as many calls as it may, or takes as much memory


class End(Struct, frozen=True):
    """How a process ended.

    :ivar pid: of the process
    :ivar code: its exit status, below 0 for a signal
    :ivar words: what it told before
    :ivar lasted: seconds since it was started
    """

    pid: int
    code: int
    words: frozenset[Word]
    lasted: float

    @property
    def how(self) -> str:
        """In words; what failed in the same way reads the same."""
        if Word.refused in self.words:
            return "can't start"
        if self.code < 0:
            return f"was ended by {_signal_name(-self.code)}"
        return f"ended with code {self.code}"


class Verdict(str, Enum):
    """What to do when a worker has ended."""

    again = "again"
    over = "over"  # the service ends cleanly
    failed = "failed"  # the service can't start


class Restarts:
    """Decides for the workers of one service.

    :param workers: how many there are, numbered from 1
    """

    def __init__(self, workers: int) -> None:
        self._pauses: dict[int, float] = dict.fromkeys(range(1, workers + 1), 0.0)
        # How the first start of each failed, as long as none has succeeded.
        self._first: dict[int, str] | None = {}

    def judge(self, number: int, end: End) -> tuple[Verdict, float]:
        """Return what to do, and the seconds to wait before.

        At once, if the worker served long enough or died for the first time; then after pauses that
        double while it dies young. Only if the first start of all failed in the same way, the
        service does not start.
        """
        if Word.destroyed in end.words:
            return Verdict.over, 0.0
        if Word.serving in end.words:
            self._first = None
        elif self._first is not None and Word.unreachable not in end.words:
            self._first.setdefault(number, end.how)
            if len(self._first) == len(self._pauses) and len({*self._first.values()}) == 1:
                return Verdict.failed, 0.0
        if Word.recycled in end.words:
            return Verdict.again, 0.0
        pause = 0.0 if end.lasted >= STARTED_WELL else self._pauses[number]
        self._pauses[number] = min(max(pause * 2, FIRST_PAUSE), LONGEST_PAUSE)
        return Verdict.again, pause


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
