"""Blocking work of connecting: name look-ups, credential providers, files of certificates.

It has threads of its own. Those that AnyIO and the event loops share may all be taken by handlers
that wait for this very connection.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

T = TypeVar("T")

# Threads of one event loop. Connecting takes them for moments, or until a service answers.
LIMIT = 40


class _Threads:
    """The threads of one event loop.

    A connect that is given up doesn't wait for its thread, so those that hang are counted here
    until they end, however long that takes.
    """

    def __init__(self) -> None:
        self._limiter = CapacityLimiter(LIMIT)
        self._lock = Lock()
        self._running = 0

    async def run(self, function: Callable[[], T]) -> T:
        if self._running >= LIMIT:
            raise TimeoutError(
                f"{self._running} threads wait for name look-ups, credentials or files already"
            )
        return await to_thread.run_sync(
            self._count, function, abandon_on_cancel=True, limiter=self._limiter
        )

    def _count(self, function: Callable[[], T]) -> T:
        with self._lock:
            self._running += 1
        try:
            return function()
        finally:
            with self._lock:
                self._running -= 1


_threads: RunVar[_Threads] = RunVar("anyio_kkrpc.redis.threads")


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function that blocks; if this is cancelled, its outcome is dropped.

    :raises TimeoutError: if too many that were given up don't end
    """
    try:
        threads = _threads.get()
    except LookupError:
        threads = _Threads()
        _threads.set(threads)
    return await threads.run(function)
