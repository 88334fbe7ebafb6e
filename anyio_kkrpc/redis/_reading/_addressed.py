"""Reading what is for this peer: its inbox, what all peers are told, and what TypeScript peers
answer on the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from anyio import CancelScope

from ..._runtime._at_once import at_once
from ...abc import Envelope
from ...kit._inbound import Inbound
from ...records import Bye, Cancel, Request
from .._connection._command import Execute
from .._connection._errors import Meaning, ResponseError, code_of, meaning_of
from .._connection._patience import Patience
from .._connection._portion import ReadPortion
from .._connection._resp import Connection
from .._stream._entries import order
from .._stream._keys import CONTROL_TTL_MS, Keys
from ..dialects import Entry, Several
from ._common import Common
from ._destroying import DestroySignals
from ._in_order import InOrder
from ._inbox import Inbox
from ._intake import letting_others_run
from ._losses import Losses
from ._open_calls import OpenCalls
from ._reader import Reader, last_id
from ._repeats import Repeats

__all__ = ("Addressed",)

logger = logging.getLogger("anyio_kkrpc")


class Addressed:
    """Reads it, and hands it on.

    :param session_id: this peer's
    :param serving: whether requests are read now
    :ivar inbox: the key of what is for this peer alone
    :ivar reader: reads the three
    :ivar repeats: knows what came before
    :ivar in_order: sorts what came too early
    :ivar losses: sees to what is lost with the inbox
    :ivar signals: takes destroy signals
    :ivar open_calls: sees to requests that another server has lost
    :ivar received: records that were read
    :ivar misplaced: what had no business where it was
    """

    def __init__(
        self,
        keys: Keys,
        session_id: str,
        inbox: Inbox,
        reader: Reader,
        common: Common,
        *,
        inbound: Inbound,
        repeats: Repeats,
        in_order: InOrder,
        losses: Losses,
        open_calls: OpenCalls,
        signals: DestroySignals,
        serving: Callable[[], bool],
    ) -> None:
        self._keys = keys
        self._session_id = session_id
        self.inbox = inbox
        self.reader = reader
        self._inbound = inbound
        self.repeats = repeats
        self.in_order = in_order
        self.losses = losses
        self.open_calls = open_calls
        self._common, self._deliver = common, common.arrivals.deliver_addressed
        self.signals = signals
        self._patience = Patience("reading the inbox", common.outages, heals=())
        self._serving = serving
        self._scope: CancelScope | None = None
        self._stopped = self._several = False
        self._begins = b"0-0"
        self._made_at: bytes | None = None
        self.received = self.misplaced = 0

    def expects(self) -> bool:
        """Whether somebody waits for what may come; see `Listener.expects`."""
        return self._inbound.expects()

    # Positions

    async def find_start(
        self, execute: Execute, ask: Callable[..., Awaitable[Any]], *, shared: bool
    ) -> bytes:
        """Make the inbox; note where to read on, so that nothing from now on is missed.

        :param execute: sends a command
        :param ask: `Link.ask`
        :param shared: whether this peer is spoken to on the stream from the beginning
        :return: the last id of the stream
        """
        keys = self._keys
        inbox_id, control, self._begins = await at_once(
            partial(self.make_inbox, execute),
            partial(self._end_of_control, execute, ask),
            partial(_end_of, ask, keys.stream),
        )
        positions = {keys.control: control, self.inbox.key: inbox_id}
        if shared:
            positions[keys.stream] = self._begins
        self.reader.begin(positions)
        return self._begins

    async def make_inbox(self, execute: Execute) -> bytes:
        """Make the inbox, once; see to it that it is there; return the id of the last entry that
        isn't wanted.

        :param execute: sends a command
        """
        if self._made_at is None:
            self._made_at = await self.inbox.make(execute)
        else:
            await self.inbox.keep(execute)
        return self._made_at

    async def _end_of_control(self, execute: Execute, ask: Callable[..., Awaitable[Any]]) -> bytes:
        key = self._keys.control
        try:
            end = await _end_of(ask, key)
        except ResponseError as exc:
            if code_of(exc) != "WRONGTYPE":
                raise
            return b"0-0"  # whoever reads it sees to it
        if end != b"0-0":  # whoever was to see to that may have been killed
            await execute(b"PEXPIRE", key, CONTROL_TTL_MS)
        return end

    def listen_to_stream(self, after: bytes) -> None:
        """Read replies and the like from the stream, too, now that a peer there uses it."""
        positions, stream = self.reader.positions, self._keys.stream
        if positions and stream not in positions:
            positions[stream] = max(after, self._begins, key=order)
            self.inbox.want_wake()

    def note_word(self) -> None:
        """Note that a word was read, which may be in the inbox: it is deleted with the rest."""
        position = self.reader.positions.get(self.inbox.key)
        if position is not None:
            self.inbox.consumed.append(position)

    # Reading

    async def run(self, connection: Connection) -> None:
        """Read until `stop`.

        :param connection: the first one
        """
        with CancelScope() as self._scope:
            if self._stopped:
                self._scope.cancel()
            await self._common.loop.run("inbox", self._read, self._patience, connection)

    def stop(self) -> None:
        """Read no more."""
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()

    async def _read(self, connection: Connection, portion: ReadPortion) -> None:
        reader, patience, common = self.reader, self._patience, self._common
        follow_up, before = common.follow_up, reader.server
        await reader.rewind(connection, self.inbox.key)
        if before is not None and reader.server != before:
            self.repeats.lose()  # another server may have lost what is missing
        connection.silence = common.silence(connection.role)
        moving, let_others_run, expects = None, letting_others_run(), self._inbound.expects
        while True:
            try:
                await reader.read(connection, portion, self._take, moving)
            except ResponseError as exc:
                if moving is None and meaning_of(exc) is Meaning.MOVING:
                    moving = self.inbox.key
                    continue
                moving = None
                await self._mend(connection.execute, exc)
                continue
            moving = None
            if not patience.calm:
                patience.worked()
            several, self._several = self._several or reader.count > 1, False
            if several:
                common.expect_more()
            await follow_up()
            if several or expects():
                await let_others_run()
            # else nobody waits for more, and who was told is as well told with the read under way

    async def _mend(self, execute: Execute, exc: ResponseError) -> None:
        """Leave out a key that holds something else than a stream; raise any other error again."""
        reader, inbox = self.reader, self.inbox.key
        wrong = await reader.not_streams(execute) if code_of(exc) == "WRONGTYPE" else set()
        if not wrong or self._keys.stream in wrong:
            raise exc
        self.misplaced += len(wrong)
        for key in wrong:
            logger.warning("%s holds something else than a stream", key.decode())
        if inbox in wrong:
            await execute(b"DEL", inbox)
            reader.positions[inbox] = await self.inbox.make(execute)
        reader.set_aside(wrong - {inbox})

    def _take(self, stream: bytes, entry_id: bytes, entry: Entry) -> None:
        if isinstance(entry, Several):
            self._take_several(stream, entry_id, entry)
            return
        record, sender, number = entry.record, entry.sender, entry.number
        addressed = stream == self.inbox.key
        if addressed:
            self.inbox.consumed.append(entry_id)
        elif stream == self._keys.stream:
            self._common.shared.take(entry, serving=self._serving())
            return
        if number is not None and self.repeats.came_before(stream, sender, number):
            return
        self.received += 1
        if addressed:
            if number is not None and self.repeats.disorder:
                self.in_order.sort(stream, entry_id, entry, number)
            elif sender.__class__ is str and record.__class__ is not Request:
                self._inbound.deliver(Envelope(record, sender, self._session_id))
            else:
                self._deliver(entry_id, entry)
        elif sender == self._session_id:
            return
        elif isinstance(record, Cancel):
            self._inbound.deliver(Envelope(record, sender))
        elif isinstance(record, Bye):
            self.signals.take(sender)
        else:
            self.misplaced += 1
            logger.warning("skipped a %s on the control stream", type(record).__name__)

    def _take_several(self, stream: bytes, entry_id: bytes, entry: Several) -> None:
        """Take several records, as `_take` does each, but that most are told from repetitions at
        once.
        """
        self._several = True
        consumed, sender, number, entries = (
            self.inbox.consumed,
            entry.sender,
            entry.number,
            entry.entries,
        )
        before = len(consumed)
        if (
            number is not None
            and not entry.refused
            and self.repeats.follow(stream, sender, number, len(entries))
        ):
            self.received += len(entries)
            for one in entries:
                if one.record.__class__ is Request:
                    self._deliver(entry_id, one)
                else:
                    self._inbound.deliver(Envelope(one.record, sender, self._session_id))
        else:
            entry.number_each()
            for one in entries:
                self._take(stream, entry_id, one)
        consumed[before:] = [entry_id]


async def _end_of(ask: Callable[..., Awaitable[Any]], key: bytes) -> bytes:
    """Return the last id of a stream; the lowest one if there is no stream."""
    try:
        return await last_id(ask, key)
    except ResponseError as exc:
        if meaning_of(exc) is not Meaning.GONE:
            raise
        return b"0-0"
