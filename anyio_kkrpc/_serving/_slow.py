"""Handlers that hold the event loop, and the warning about them.

On a busy machine the clock tells of others: there a handler that does nothing but wait takes long,
too. What it took itself is that time without what the thread waited for a processor, which Linux
counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from time import perf_counter, thread_time

logger = logging.getLogger("anyio_kkrpc")

# A handler that holds the event loop longer than this, in seconds, is warned about: a coroutine up
# to where it first waits.
SLOW_HANDLER = 0.1
# How old, in seconds, the thread's counter may be when a handler begins. Reading it costs tens of
# microseconds, as much as a call, and what was waited for before the handler is taken for its own.
_STALE = 0.05
# Where the counter is missing, a handler that has not computed for so long is taken to block.
_BLOCKED = 1.0
_COUNTER = "/proc/thread-self/schedstat"
# It never blocks. Saying so keeps those who look for blocking calls from finding one.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)


def run_delay() -> float | None:
    """Return the seconds that this thread has waited for a processor, ``None`` if nobody counts."""
    try:
        file = os.open(_COUNTER, _FLAGS)
        try:
            text = os.read(file, 100)
        finally:
            os.close(file)
        _, delay, turns = map(int, text.split())
    except (OSError, ValueError):
        return None
    return delay / 1e9 if turns else None


class SlowHandlers:
    """Warns about them, in the thread that makes it.

    :ivar stale_at: when `begin` is to be called before a handler, by `time.perf_counter`
    :param now: seconds
    :param computed: seconds that this thread has computed
    :param waited: seconds that it has waited for a processor
    """

    __slots__ = ("_computed", "_delay", "_now", "_used", "_waited", "stale_at")

    def __init__(
        self,
        now: Callable[[], float] = perf_counter,
        computed: Callable[[], float] = thread_time,
        waited: Callable[[], float | None] = run_delay,
    ) -> None:
        self._now, self._computed, self._waited = now, computed, waited
        self.stale_at = float("-inf")
        self._used = 0.0
        self._delay: float | None = None

    def begin(self) -> None:
        """Note what the thread has waited until now."""
        self._used, self._delay = self._computed(), self._waited()
        self.stale_at = self._now() + _STALE

    def judge(self, name: str, started: float) -> None:
        """Warn about a handler that began at ``started``, if it was that slow itself."""
        took, delay = self._now() - started, self._waited()
        if delay is not None and self._delay is not None:
            took -= delay - self._delay
        elif took < _BLOCKED:
            took = min(took, self._computed() - self._used)
        if took > SLOW_HANDLER:
            logger.warning(
                "%s() held the event loop for %.2f s; declare it with @in_thread, or have a thread "
                "do what is slow in it",
                name,
                took,
            )
