"""Connections that are made again when they are lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import anyio.lowlevel
from anyio import Event, aclose_forcefully, current_time, sleep
from redis.backoff import FullJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
)

from .._exceptions import RPCError, TransportClosedError, TransportConnectionError
from ._connection import Argument, Connection

logger = logging.getLogger("anyio_kkrpc")

Dial = Callable[[], Awaitable[Connection]]

# Seconds of the first and of the longest pause between two attempts, at most (full jitter).
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
# What a server says that will take commands again soon, here or at the address' new owner.
PASSING = (BusyLoadingError, ReadOnlyError, MasterDownError, ClusterDownError)
# What no further attempt will change.
_FINAL = (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    NoPermissionError,
)
_UNBLOCKED = ("UNBLOCKED", "NOGROUP", "-UNBLOCKED")


def is_passing(exc: BaseException) -> bool:
    """Whether connecting again may help."""
    if isinstance(exc, TransportConnectionError):
        return not isinstance(exc.__cause__, _FINAL)
    return isinstance(exc, (TransportClosedError, *PASSING)) or is_gone(exc)


def is_gone(exc: BaseException) -> bool:
    """Whether the server says that the stream or its group was deleted."""
    return isinstance(exc, RedisError) and str(exc).startswith(_UNBLOCKED)


async def redial(dial: Dial, limit: float | None) -> Connection:
    """Connect, again and again, with growing pauses.

    :param limit: seconds after which the last failure is final, ``None`` for never
    :raises TransportConnectionError: if the server refuses this peer, or after the limit
    """
    pauses = FullJitterBackoff(cap=LONGEST_PAUSE, base=FIRST_PAUSE)
    started = current_time()
    failures = 0
    while True:
        try:
            return await dial()
        except TransportConnectionError as exc:
            if not is_passing(exc):
                raise
            if limit is not None and current_time() - started >= limit:
                raise
            failures += 1
            logger.debug("attempt %d failed: %s", failures, exc)
        await sleep(pauses.compute(failures))


class Link:
    """The connection that a peer writes on.

    :param dial: makes a connection
    :param prepare: is given each new connection, which nobody else uses then
    :param lost: told when a connection was lost
    :param limit: see `redial`
    :ivar reconnects: how often the connection was made again
    """

    def __init__(
        self,
        dial: Dial,
        prepare: Callable[[Connection], Awaitable[None]],
        lost: Callable[[], object],
        limit: float | None,
    ) -> None:
        self._dial = dial
        self._prepare = prepare
        self._lost = lost
        self._limit = limit
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
                    if not is_passing(exc):
                        raise
                finally:
                    self.connection = None
                    self._lost()
                    await aclose_forcefully(connection)
                if self._end is not None:
                    return
                self._up = Event()
                logger.warning("%s; connecting again", connection.error)
                connection = await redial(self._dial, self._limit)
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
            if self._end is not None:
                raise type(self._end)(*self._end.args)
            # Lost, and not yet noticed by `run`.
            await anyio.lowlevel.checkpoint()

    def break_off(self, reason: str) -> None:
        """Give up the connection, because the server doesn't answer on it."""
        if self.connection is not None:
            self.connection.break_off(TimeoutError(reason))
