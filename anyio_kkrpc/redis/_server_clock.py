"""Redis' clock, read now and then."""

from __future__ import annotations

from anyio import current_time

from ._connection import Execute


class ServerClock:
    """Tells Redis' time.

    :ivar offset: AnyIO's clock less Redis', in seconds
    """

    def __init__(self) -> None:
        self.offset = 0.0

    async def read(self, execute: Execute) -> None:
        """Ask Redis.

        :param execute: sends a command
        """
        before = current_time()
        seconds, micros = await execute(b"TIME")
        redis_time = int(seconds) + int(micros) / 1e6
        self.offset = (before + current_time()) / 2 - redis_time

    def now(self) -> float:
        """Return Redis' time in seconds since the epoch."""
        return current_time() - self.offset
