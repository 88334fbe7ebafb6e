"""Connections that are made again when they are lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import anyio.lowlevel
from anyio import Event, aclose_forcefully, current_time, sleep

from ..._exceptions import RPCError, TransportClosedError, TransportConnectionError
from ..._runtime._fresh import fresh_copy
from ._command import Argument, Command
from ._errors import Meaning, RedisError, leads_elsewhere, meaning_of
from ._patience import LONGEST_PAUSE, Outages, Patience, jittered
from ._portion import Portion
from ._resp import Connection
from ._role import Role, read_role

logger = logging.getLogger("anyio_kkrpc")

Dial = Callable[[], Awaitable[Connection]]
# Told of a connection that can't be used any more, and why.
Lost = Callable[[Connection, Exception], object]

# How often one entry is asked for that can't be had.
_ATTEMPTS = 5


class Dialer:
    """Makes connections, one after the other, with growing pauses between those that don't last.

    :param dial: connects once
    :param limit: seconds of failures after which the last one is final, ``None`` for never
    :param patience: with a server that refuses this peer
    :param lost: told of each connection that was lost
    """

    def __init__(self, dial: Dial, limit: float | None, patience: Patience, lost: Lost) -> None:
        self._dial = dial
        self.note_lost = lost
        self._limit = limit
        self._patience = patience
        self._failures = 0
        self._failing_since = self._made_at = -inf

    async def first(self) -> Connection:
        """Connect. Only a login that the server may get to know is tried again."""
        while True:
            try:
                connection = await self._dial()
            except TransportConnectionError as exc:
                if meaning_of(exc) is Meaning.ELSEWHERE:
                    raise
                await sleep(self._patience.pause(exc))
            else:
                self._patience.worked()
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
                await sleep(jittered(self._failures))
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
    :param patience: with a server that refuses what a new connection needs
    :ivar reconnects: how often the connection was made again
    :ivar lost_by: why the last connection was lost, ``None`` if none was
    """

    def __init__(
        self,
        dialer: Dialer,
        prepare: Callable[[Connection], Awaitable[None]],
        lost: Callable[[], object],
        patience: Patience,
    ) -> None:
        self._dialer = dialer
        self._prepare = prepare
        self._lost = lost
        self._patience = patience
        self._up = Event()
        self._end: Exception | None = None
        self.connection: Connection | None = None
        self.reconnects = 0
        self.lost_by: Exception | None = None

    async def run(self, connection: Connection) -> None:
        """Keep it up until `end`.

        :raises TransportConnectionError: if it can't be made again
        :raises RedisError: if a new connection can't be prepared
        """
        try:
            while True:
                try:
                    self.lost_by = await self._use(connection)
                finally:
                    self.connection = None
                    self._lost()
                    await aclose_forcefully(connection)
                if self._end is not None:
                    return
                if self._up.is_set():  # else some wait for it already
                    self._up = Event()
                logger.warning("%s; connecting again", self.lost_by)
                if self.lost_by is not None:
                    self._dialer.note_lost(connection, self.lost_by)
                connection = await self._dialer.again()
                self.reconnects += 1
                logger.warning("connected to %s again", connection.address)
        except (RPCError, RedisError) as exc:
            self.end(exc)
            raise

    async def _use(self, connection: Connection) -> Exception | None:
        """Use a connection as long as it lasts; return why it ended."""
        while True:
            try:
                await self._prepare(connection)
            except (RPCError, RedisError) as exc:
                if leads_elsewhere(exc):
                    return exc
                await sleep(self._patience.pause(exc))
            else:
                break
        self._patience.worked()
        self.connection = connection
        self._up.set()
        try:
            await connection.run()
        except TransportConnectionError as exc:
            return exc
        return connection.error

    def end(self, reason: Exception) -> None:
        """Make `request` fail from now on, wherever it waits."""
        if self._end is None:
            self._end = reason
        self._up.set()

    @property
    def ended(self) -> bool:
        """Whether `request` fails from now on."""
        return self._end is not None

    async def request(self, *args: Argument) -> Any:
        """Send a command that may be repeated, on this connection or the next one.

        A server that takes no writes for now, such as a replica, is left for the next connection.

        :raises ResponseError: the server's error reply
        """
        while True:
            try:
                return await self.attempt(*args)
            except (TransportConnectionError, TransportClosedError):
                if self._end is not None:
                    raise

    async def attempt(self, *args: Argument) -> Any:
        """The same, but a command is not repeated that may have been carried out.

        :raises TransportConnectionError: if the connection was lost meanwhile
        """
        while True:
            await self._up.wait()
            connection = self.connection
            if connection is not None and connection.error is None:
                try:
                    return await connection.request(*args)
                except RedisError as exc:
                    if not leads_elsewhere(exc):
                        raise
                    connection.break_off(exc)
                    continue
            if self._end is not None:
                raise fresh_copy(self._end)
            # Lost, and not yet noticed by `run`.
            await anyio.lowlevel.checkpoint()

    async def ask_role(self, outages: Outages) -> Role | None:
        """Ask the server what it is.

        :param outages: told if it doesn't tell
        """
        try:
            return read_role(await self.request(b"ROLE"))
        except RedisError as exc:
            outages.leave_out("watching whether the server becomes a replica", exc)
            return None

    async def ask(self, what: str, portion: Portion, command: Callable[[int], Command]) -> Any:
        """Send a command that asks for entries; if the connection is lost, ask for fewer.

        :param what: what is asked for, for the log
        :param portion: how many, or how many bytes of them
        :param command: returns the command that asks for so many. It may be repeated.
        :raises TransportConnectionError: if even one can't be had, again and again
        """
        lost = 0
        while True:
            lost = lost + 1 if portion.is_least else 0
            try:
                return await self.attempt(*command(portion.size))
            except (TransportConnectionError, TransportClosedError):
                if self._end is not None or lost == _ATTEMPTS:
                    raise
                portion.cut(what)
