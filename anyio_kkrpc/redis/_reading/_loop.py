"""Reading on one connection after the other, until nothing more can be read."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from anyio import aclose_forcefully, sleep

from ..._exceptions import RPCError, TransportConnectionError
from .._connection._errors import Meaning, RedisError, leads_elsewhere, meaning_of
from .._connection._link import Dialer
from .._connection._patience import Patience
from .._connection._portion import ReadPortion
from .._connection._resp import Connection
from ._flow import Flow

__all__ = ("Read", "ReadLoop")

logger = logging.getLogger("anyio_kkrpc")

# Reads on one connection as long as that lasts.
Read: TypeAlias = Callable[[Connection, ReadPortion], Awaitable[None]]


class ReadLoop:
    """Keeps the readers of one peer reading.

    :param dialer: returns what makes the connections for something
    :param largest: bytes of the largest entry
    :param failed: told of the error after which nothing more can be read
    :ivar flow: told while requests are read
    :ivar reconnects: how often a connection was given up for the next one
    """

    def __init__(
        self,
        dialer: Callable[[str], Dialer],
        largest: int,
        failed: Callable[[Exception], object],
    ) -> None:
        self._dialer = dialer
        self._largest = largest
        self._failed = failed
        self.flow = Flow()
        self.reconnects = 0

    async def run(
        self, what: str, read: Read, patience: Patience, connection: Connection | None = None
    ) -> None:
        """Read until `failed` is told, or this is cancelled.

        :param what: what is read, for the log
        :param patience: with a server that refuses it
        :param connection: the first one, if there is one already
        """
        dialer, portion = self._dialer(what), ReadPortion(self._largest)
        try:
            while True:
                if connection is None:
                    connection = await dialer.again()
                try:
                    await read(connection, portion)
                except (RPCError, RedisError) as exc:
                    if meaning_of(exc) is not Meaning.GONE and not leads_elsewhere(exc):
                        await sleep(patience.pause(exc))
                        continue
                    if isinstance(exc, TransportConnectionError):
                        portion.cut(what)
                    logger.warning("%s; reading %s again", exc, what)
                    dialer.note_lost(connection, exc)
                await aclose_forcefully(connection)
                connection = None
                self.reconnects += 1
        except (RPCError, RedisError) as exc:
            self._failed(exc)
        finally:
            patience.leave()
            if connection is not None:
                await aclose_forcefully(connection)
