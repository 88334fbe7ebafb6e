"""Connections that are made again when they are lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import anyio.lowlevel
from anyio import Event, aclose_forcefully, current_time, sleep
from redis.backoff import FullJitterBackoff
from redis.exceptions import RedisError

from .._exceptions import RPCError, TransportClosedError, TransportConnectionError
from ._connection import Argument, Connection
from ._errors import Meaning, meaning_of

logger = logging.getLogger("anyio_kkrpc")

Dial = Callable[[], Awaitable[Connection]]

# Seconds of the first and of the longest pause between two attempts, at most (full jitter).
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0


class Dialer:
    """Makes connections, one after the other, with growing pauses between those that don't last.

    :param dial: connects once
    :param limit: seconds of failures after which the last one is final, ``None`` for never
    """

    def __init__(self, dial: Dial, limit: float | None) -> None:
        self._dial = dial
        self._limit = limit
        self._pauses = FullJitterBackoff(cap=LONGEST_PAUSE, base=FIRST_PAUSE)
        self._failures = 0
        self._failing_since = self._made_at = -inf

    async def first(self) -> Connection:
        """Connect, without a second attempt."""
        connection = await self._dial()
        self._made_at = current_time()
        return connection

    async def again(self) -> Connection:
        """Connect, again and again. A connection that was refused its first command hasn't lasted.

        :raises TransportConnectionError: if the server refuses this peer, or after the limit
        """
        started = current_time()
        if started - self._made_at > LONGEST_PAUSE:
            self._failures, self._failing_since = 0, started
        else:
            self._failures += 1
        while True:
            if self._failures:
                await sleep(self._pauses.compute(self._failures))
            try:
                return await self.first()
            except TransportConnectionError as exc:
                if meaning_of(exc) is not Meaning.ELSEWHERE:
                    raise
                if self._limit is not None and current_time() - self._failing_since >= self._limit:
                    raise
                self._failures += 1
                logger.debug("attempt %d failed: %s", self._failures, exc)


class Link:
    """The connection that a peer writes on.

    :param dialer: makes its connections
    :param prepare: is given each new connection, which nobody else uses then
    :param lost: told when a connection was lost
    :ivar reconnects: how often the connection was made again
    """

    def __init__(
        self,
        dialer: Dialer,
        prepare: Callable[[Connection], Awaitable[None]],
        lost: Callable[[], object],
    ) -> None:
        self._dialer = dialer
        self._prepare = prepare
        self._lost = lost
        self._up = Event()
        self._end: Exception | None = None
        self.connection: Connection | None = None
        self.reconnects = 0

    async def run(self, connection: Connection) -> None:
        """Keep it up until `end`.

        :raises TransportConnectionError: if it can't be made again
        :raises redis.exceptions.RedisError: if a new connection can't be prepared
        """
        try:
            while True:
                try:
                    await self._prepare(connection)
                    self.connection = connection
                    self._up.set()
                    await connection.run()
                except (RPCError, RedisError) as exc:
                    if meaning_of(exc) not in (Meaning.ELSEWHERE, Meaning.GONE):
                        raise
                    reason: object = exc
                else:
                    reason = connection.error
                finally:
                    self.connection = None
                    self._lost()
                    await aclose_forcefully(connection)
                if self._end is not None:
                    return
                if self._up.is_set():  # else some wait for it already
                    self._up = Event()
                logger.warning("%s; connecting again", reason)
                connection = await self._dialer.again()
                self.reconnects += 1
                logger.warning("connected to %s again", connection.address)
        except (RPCError, RedisError) as exc:
            self.end(exc)
            raise

    def end(self, reason: Exception) -> None:
        """Make `request` fail from now on, wherever it waits."""
        if self._end is None:
            self._end = reason
        self._up.set()

    async def request(self, *args: Argument) -> Any:
        """Send a command that may be repeated, on this connection or the next one.

        A server that takes no writes for now, such as a replica, is left for the next connection.

        :raises redis.exceptions.ResponseError: the server's error reply
        """
        while True:
            await self._up.wait()
            connection = self.connection
            if connection is not None:
                try:
                    return await connection.request(*args)
                except (TransportConnectionError, TransportClosedError):
                    if self._end is not None:
                        raise
                    continue
                except RedisError as exc:
                    if meaning_of(exc) is not Meaning.ELSEWHERE:
                        raise
                    connection.break_off(exc)
                    continue
            if self._end is not None:
                raise type(self._end)(*self._end.args)
            # Lost, and not yet noticed by `run`.
            await anyio.lowlevel.checkpoint()
