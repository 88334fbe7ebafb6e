"""This peer's inbox as a key of Redis: made, kept alive, rid of what was read, and removed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from anyio import Lock, current_time, sleep

from ..._exceptions import RPCError
from .._connection._command import Execute
from .._connection._errors import RedisError
from .._connection._resp import Connection
from .._stream._entries import order
from .._stream._scripts import add_briefly

__all__ = ("MANY", "Inbox")

logger = logging.getLogger("anyio_kkrpc")

# Entries to be deleted that are worth a command.
MANY = 128


class Inbox:
    """One peer's inbox.

    :param key: its key
    :param ttl: seconds after which it is gone unless its owner keeps it alive
    :param request: `Link.request`
    :param lost: told that the inbox was gone, with what was in it: the id since which it is there
    :ivar consumed: ids of entries that were read, to be deleted
    :ivar wake_wanted: whether its reader is to read other streams as well
    """

    def __init__(
        self,
        key: bytes,
        ttl: float,
        request: Callable[..., Awaitable[Any]],
        lost: Callable[[bytes], object],
    ) -> None:
        self.key = key
        self.consumed: list[bytes] = []
        self.wake_wanted = False
        self._modern = True
        self._ttl = ttl
        self._ttl_ms = b"%d" % round(ttl * 1000)
        self._request = request
        self._lost = lost
        self._kept_at = 0.0
        self._left = False
        self._lock = Lock()

    def meet_server(self, *, modern: bool) -> None:
        """Note whether the server is Redis 6.2 or later, which can delete all up to an id."""
        self._modern = modern

    async def make(self, execute: Execute) -> bytes:
        """Make it; return the id of the last entry that isn't wanted.

        :param execute: sends a command
        """
        return await self._make(execute, b"MAXLEN", b"0")

    async def keep(self, execute: Execute) -> None:
        """Keep it alive, and make it again should the server have lost it."""
        if execute == self._request:
            async with self._lock:  # what one of several finds missing, one makes
                await self._keep(execute)
        else:
            await self._keep(execute)

    def is_kept(self, seconds: float) -> bool:
        """Whether it needn't be kept alive for so many seconds."""
        return current_time() + seconds < self._kept_at + self._ttl / 2

    async def run(self, dial: Callable[[], Awaitable[Connection]]) -> None:
        """Keep it alive where the link is too busy for that: with one large message, say.

        :param dial: makes a connection
        """
        pause = self._ttl / 6
        while True:
            left = self._kept_at + self._ttl / 2 - current_time()
            await sleep(max(left, pause))
            if current_time() - self._kept_at < self._ttl / 2:
                continue
            try:
                async with await dial() as connection:
                    await self.keep(connection.execute)
            except (RPCError, RedisError) as exc:
                logger.debug("keeping the inbox: %s", exc)  # the link says what is amiss

    def want_wake(self) -> None:
        """Note that its reader is to read other streams as well."""
        self.wake_wanted = True

    async def wake(self) -> None:
        """End the blocking read of the inbox."""
        self.wake_wanted = False
        await self._request(*add_briefly(self.key, self._ttl_ms, b"*", b"hint", b"wake"))

    async def trim(self) -> None:
        """Delete what was read."""
        if not self.consumed:
            return
        consumed = list(self.consumed)
        # Redis 6.2 or later, where this takes a thirtieth of the time.
        if self._modern:
            ms, number = order(consumed[-1])
            await self._request(b"XTRIM", self.key, b"MINID", b"%d-%d" % (ms, number + 1))
        else:
            await self._request(b"XDEL", self.key, *consumed)
        self.consumed = self.consumed[len(consumed) :]

    async def remove(self) -> None:
        """Remove it; from now on it isn't made again."""
        self._left = True
        await self._request(b"DEL", self.key)

    async def _keep(self, execute: Execute) -> None:
        if not await self._expire(execute) and not self._left:
            logger.warning("the inbox was gone from Redis, and was made again")
            # Nothing is removed: it may have been made meanwhile, over another connection.
            self._lost(await self._make(execute))

    async def _make(self, execute: Execute, *bounds: bytes) -> bytes:
        asked_at = current_time()
        entry = (*bounds, b"*", b"hint", b"hello")
        made = await execute(*add_briefly(self.key, self._ttl_ms, *entry))
        self._kept_at = asked_at
        return bytes(made)

    async def _expire(self, execute: Execute) -> bool:
        asked_at = current_time()
        found = await execute(b"PEXPIRE", self.key, self._ttl_ms)
        self._kept_at = asked_at
        return bool(found)
