"""Redis' clock, read now and then."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from .._connection._command import Execute

# Seconds per second that two clocks may drift apart; NTP corrects by no more.
_DRIFT = 0.0005


class ServerClock:
    """Tells Redis' time, as the sample of the shortest round trip tells it.

    :param local: AnyIO's clock
    :ivar offset: AnyIO's clock less Redis', in seconds
    """

    def __init__(self, local: Callable[[], float]) -> None:
        self._local = local
        self.offset = 0.0
        # By how much that may be wrong, as of when it was read.
        self._error = inf
        self._read_at = 0.0

    async def read(self, execute: Execute) -> None:
        """Ask Redis. What takes long tells little, and is used only if the clock was set since.

        :param execute: sends a command
        """
        before = self._local()
        seconds, micros = await execute(b"TIME")
        now = self._local()
        offset = (before + now) / 2 - (int(seconds) + int(micros) / 1e6)
        error = (now - before) / 2
        known = self._error + (now - self._read_at) * _DRIFT
        if error <= known or abs(offset - self.offset) > error + known:
            self.offset, self._error, self._read_at = offset, error, now

    def now(self) -> float:
        """Return Redis' time in seconds since the epoch."""
        return self._local() - self.offset
