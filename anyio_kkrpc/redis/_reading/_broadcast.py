"""Reading requests for everybody: each peer that serves gets each of them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from anyio.abc import TaskGroup

from .._connection._patience import Patience
from .._connection._portion import ReadPortion
from .._connection._replicas import Replicas
from .._connection._resp import Connection
from ..dialects import Entry
from ._common import Common
from ._intake import letting_others_run
from ._loop import ReadLoop
from ._reader import Reader, was_trimmed

__all__ = ("Broadcast",)

logger = logging.getLogger("anyio_kkrpc")


class Broadcast:
    """Reads them, from where the last one stopped.

    :param stream: key of the stream
    :param count: told how many came, if the stream is to be trimmed
    :param loop: keeps them read, if it isn't the one of all readers
    :param replicas: what that reads from, which may be behind the server
    :ivar position: the id of the last entry that isn't wanted
    :ivar received: requests that were read
    """

    def __init__(
        self,
        stream: bytes,
        common: Common,
        count: Callable[[int], object] | None,
        loop: ReadLoop | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self._stream = stream
        self._common, shared = common, common.shared
        self._deliver = common.arrivals.deliver
        self._is_own, self._is_for_others = shared.is_own, shared.is_for_others
        self._count = count
        self._own_loop, self._replicas = loop, replicas
        # One for all times that it reads: it knows since when it hasn't.
        self._reader = Reader({stream: b"0-0"}, common.decoder, common.block_timeout)
        self.position = b"0-0"
        self.received = 0

    @property
    def reconnects(self) -> int:
        """How often a connection was given up for the next one, beside those of all readers."""
        return 0 if self._own_loop is None else self._own_loop.reconnects

    def begin_after(self, entry_id: bytes) -> None:
        """Note which entry was the last when this peer came."""
        self.position = entry_id
        self._reader.begin({self._stream: entry_id})

    def begin(self, tasks: TaskGroup) -> Callable[[], Awaitable[None]]:
        """Return what reads them.

        :param tasks: where it is looked after what is read from
        """
        common = self._common
        if self._replicas is not None:
            tasks.start_soon(self._replicas.run, name="anyio_kkrpc redis replicas")
        patience = Patience("reading requests", common.outages, heals=())  # it needs rights at once
        loop = self._own_loop or common.loop
        return partial(loop.run, "requests", partial(self._read, patience), patience)

    async def _read(self, patience: Patience, connection: Connection, portion: ReadPortion) -> None:
        stream, common, reader = self._stream, self._common, self._reader
        follow_up, intake = common.follow_up, common.arrivals.intake
        let_others_run = letting_others_run(common.arrivals.queue)
        # That asks for two entries: not where one may be all that the server can send.
        if portion.size > 1 and await was_trimmed(connection, stream, self.position):
            logger.warning(
                "%s was trimmed past what this peer had read: it may have missed requests",
                stream.decode(),
            )
        replicas = self._replicas
        await reader.rewind(connection if replicas is None else replicas)
        connection.silence = common.silence(connection.role)
        with common.loop.flow.through(patience):
            while True:
                await reader.read(connection, portion, self._take)
                if not patience.calm:
                    patience.worked()
                if reader.count > 1:
                    common.expect_more()
                if self._count is not None:
                    self._count(reader.count)
                self.position = reader.positions[stream]
                await follow_up()
                if intake.waiting:
                    await intake.wait()
                await let_others_run()

    def _take(self, stream: bytes, entry_id: bytes, entry: Entry) -> None:
        if not self._is_own(entry) and not self._is_for_others(entry):
            self.received += 1
            if entry.again:
                self._common.arrivals.forget(entry)  # what waits here still runs in its place
            self._deliver(entry, entry_id, None, None, 1 + entry.again)
