"""The loops that read streams: what is addressed to this peer, and what anybody may serve."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic
from typing import Any, Protocol

from anyio import Event

from ..._exceptions import DeliveryError, ProtocolError
from ..._runtime._log import quoted
from ..._wire_errors import library_error
from ...abc import Envelope
from ...records import Reply
from .._connection._command import Command, Execute
from .._connection._errors import Meaning, ResponseError, code_of, meaning_of
from .._connection._portion import MANY_BYTES, Portion, ReadPortion
from .._connection._resp import Connection
from .._stream._entries import order, pairs
from .._stream._scripts import LAST_ID
from .._stream._server import WHO, identity_of
from ..dialects import Dialects, Entry, Several
from ..dialects._signing import Signer
from ..dialects.native import NewerWireError, holds_several, numbered

logger = logging.getLogger("anyio_kkrpc")

Take = Callable[[bytes, bytes, Entry], None]

# Milliseconds for which a key is waited for while others of its slot are asked for, too.
_A_MOMENT = b"100"


class Asked(Protocol):
    """What leads to the server: a connection, or another way to ask it."""

    async def execute_many(self, commands: Iterable[Command]) -> list[Any]:
        """Send commands and return their replies; error replies are among them."""
        ...


class Decoder:
    """Decodes entries; what isn't valid is counted, logged and skipped.

    :param on_hint: told of entries that hold no record but a word for the transport
    :param refuse: given the answers to requests that only a newer peer can serve
    :param silent_on: key of a stream whose requests are not answered so: in a broadcast, a newer
        peer may be there and answer them itself
    :param skipped: told the key, the sender and the numbers of records that could not be read
    :param inbox: the key whose entries may hold several records
    :ivar max_size: bytes that a value may have
    """

    def __init__(
        self,
        dialects: Dialects,
        max_message_size: int,
        on_hint: Callable[[bytes], object],
        signer: Signer | None,
        refuse: Callable[[Envelope], object],
        silent_on: bytes | None,
        skipped: Callable[[bytes, str, list[bytes]], object],
        inbox: bytes,
    ) -> None:
        self._dialects, self._try_native = dialects, dialects.native.try_decode
        self.max_size = max_message_size
        self._on_hint = on_hint
        self._refuse = refuse
        self._silent_on = silent_on
        self._signer = signer
        self._skipped = skipped
        self._inbox = inbox
        self.invalid = 0

    def decode(
        self, stream: bytes, entry_id: bytes, fields: list[bytes] | None, small: bool = False
    ) -> Entry | None:
        """Return the entry; ``None`` if it isn't valid, was deleted, or isn't of interest.

        :param small: whether it is known that no value has more than `max_size` bytes
        """
        if fields is None:
            return None
        try:
            if len(fields) == 2 and fields[0] == b"hint":
                self._on_hint(fields[1])
                return None
            if not small:
                self._check_size(stream, fields)
            if self._signer is not None:
                self._signer.check(stream, entry_id, fields)
            entry = self._try_native(fields, self.max_size) if self._dialects.only_native else None
            if entry is None:
                entry = self._dialects.decode(fields, self.max_size)
            if isinstance(entry, Several):
                self._check_several(stream, entry_id, entry)
            return entry
        except Exception as exc:  # a codec of the user's that keeps no promise ends no reader
            self.skip(stream, entry_id, exc)
            if isinstance(exc, NewerWireError) and stream != self._silent_on:
                self._answer(exc)
        if self._signer is None:  # else nobody knows who wrote it
            self._skipped(stream, *numbered(fields))
        return None

    def _check_size(self, stream: bytes, fields: list[bytes]) -> None:
        """Refuse an entry that is too large. Of several records, those are refused by themselves.

        :raises ProtocolError: if it is
        """
        size = max(map(len, fields))
        if size > self.max_size and (stream != self._inbox or not holds_several(fields)):
            raise ProtocolError(f"an entry of {size} bytes exceeds max_message_size")

    def _answer(self, newer: NewerWireError) -> None:
        request = newer.request
        if request is not None and request.o is not True:
            error = library_error(DeliveryError(f"{newer}; it did not run"))
            self._refuse(Envelope(Reply(request.id, e=error), None, newer.sender))

    def _check_several(self, stream: bytes, entry_id: bytes, entry: Several) -> None:
        """Count and log what can't be read of several records.

        :raises ProtocolError: if they stand where only one may
        """
        if stream != self._inbox:
            raise ProtocolError("an entry of several records outside of an inbox")
        if entry.refused:
            for exc, _ in entry.refused:
                self.skip(stream, entry_id, exc)
            self._skipped(stream, entry.sender, entry.number_each())

    def skip(self, stream: bytes, entry_id: bytes, reason: Exception) -> None:
        """Count and log an entry, or one of its records, that can't be read."""
        if not isinstance(reason, ProtocolError):
            reason = ProtocolError(f"{type(reason).__name__}: {quoted(reason)}")
        self.invalid += 1
        logger.warning("skipped entry %s of %s: %s", entry_id.decode(), stream.decode(), reason)


class Reader:
    """Reads streams by XREAD from given ids on, on a connection of its own.

    :param positions: for each stream the id of the last entry that isn't wanted
    :ivar count: how many entries came last
    :ivar server: the `Identity` of the one that the positions are of, if that is known
    :ivar moved: set once they are of the next one
    """

    def __init__(
        self, positions: dict[bytes, bytes], decoder: Decoder, block_timeout: float
    ) -> None:
        self.positions = positions
        self.count = 0
        self.server: bytes | None = None
        self.moved = Event()
        self._decoder = decoder
        self._aside: dict[bytes, bytes] = {}
        self._read_at = monotonic()
        self._head = (b"XREAD", b"BLOCK", block_ms(block_timeout), b"COUNT")

    async def read(
        self,
        connection: Connection,
        portion: ReadPortion,
        take: Take,
        moving: bytes | None = None,
    ) -> None:
        """Wait for entries once, and hand each that is valid to ``take``.

        :param portion: how many of each stream to ask for
        :param moving: the key to wait for, a moment, while their slot moves to another node

        Nothing is awaited between the reply and the last ``take``, so a position is never ahead
        of what was taken.
        """
        positions, decode = self.positions, self._decoder.decode
        count, before = b"%d" % portion.size, connection.received
        refusal = None
        if moving is None:
            reply = await connection.execute(
                *self._head, count, b"STREAMS", *positions.keys(), *positions.values()
            )
        else:
            reply, refusal = await self._ask_apart(connection, count, moving)
        self._read_at = monotonic()
        self.count, received = 0, connection.received - before
        small = received <= self._decoder.max_size
        for stream, entries in reply or ():
            self.count += len(entries)
            for entry_id, fields in entries:
                positions[stream] = entry_id
                entry = decode(stream, entry_id, fields, small)
                if entry is not None:
                    take(stream, entry_id, entry)
        if portion.wary or not portion.few < self.count < portion.many or received > MANY_BYTES:
            portion.took(self.count, received)
        if refusal is not None:
            raise refusal

    async def _ask_apart(
        self, connection: Connection, count: bytes, last: bytes
    ) -> tuple[list[Any], Exception | None]:
        """Ask for each key by itself; return what came, and what refuses more than a move does.

        As soon as a node of a Cluster lacks one key of a slot that moves, also one that is nowhere,
        it refuses what is about several of them.

        :param last: the key to wait for; without it there is nothing to read
        """
        keys = sorted(self.positions, key=lambda key: key == last)
        ends = [(b"COUNT", count, b"STREAMS", key, self.positions[key]) for key in keys]
        commands: list[Command] = [(b"XREAD", *end) for end in ends[:-1]]
        commands.append((b"XREAD", b"BLOCK", _A_MOMENT, *ends[-1]))
        found: list[Any] = []
        refusal = None
        for key, reply in zip(keys, await connection.execute_many(commands), strict=True):
            if not isinstance(reply, Exception):
                found += reply or ()
            elif key == last or meaning_of(reply) is not Meaning.MOVING:
                refusal = refusal or reply
        return found, refusal

    def begin(self, positions: dict[bytes, bytes]) -> None:
        """Note from where on to read, as it is now."""
        self.positions.update(positions)
        self._read_at = monotonic()

    async def rewind(self, connection: Asked, own: bytes = b"") -> None:
        """Go back where the server hasn't come as far as what was read.

        That is another server, whose clock may be behind, or one that has lost its last entries.
        What comes then would not be read until its clock is past the position.

        :param own: the key that is read from its beginning, since numbers tell what came before, if
            it is one of them; of others what was written since the last read is new
        """
        away = monotonic() - self._read_at
        keys = list(self.positions)
        commands = [(b"EVAL", LAST_ID, b"1", key) for key in keys]
        now, *ends = await connection.execute_many([(b"TIME",), *commands, *WHO])
        *ends, server, replication = ends
        self.server = identity_of((server, replication))
        for key, end in zip(keys, ends, strict=True):
            if isinstance(end, bytes) and order(end) < order(self.positions[key]):
                logger.warning("%s ends before what was read of it: reading it again", key.decode())
                since = b"0-0" if key == own else _before(now, away)
                self.positions[key] = min(end, since, key=order)
        self.moved.set()
        self.moved = Event()

    async def not_streams(self, execute: Execute) -> set[bytes]:
        """Return those of the keys that hold something else than a stream."""
        return {key for key in self.positions if not await _is_stream(execute, key)}

    def set_aside(self, keys: Iterable[bytes]) -> None:
        """Read these keys no more until `take_back` finds them mended."""
        for key in keys:
            self._aside[key] = self.positions.pop(key)

    async def take_back(self, execute: Execute) -> None:
        """Read what was set aside again, where it is a stream again, or nothing."""
        for key in list(self._aside):
            if await _is_stream(execute, key):
                logger.warning("%s is read again", key.decode())
                self.positions[key] = self._aside.pop(key)


class GroupReader:
    """Takes entries for one consumer of a group by XREADGROUP, on a connection of its own.

    :ivar count: how many entries came last
    """

    def __init__(
        self,
        stream: bytes,
        group: bytes,
        consumer: bytes,
        decoder: Decoder,
        block_timeout: float,
    ) -> None:
        self._stream = stream
        self.count = 0
        self._decoder = decoder
        block = block_ms(block_timeout)
        self._head = (b"XREADGROUP", b"GROUP", group, consumer, b"BLOCK", block, b"COUNT")

    async def read(
        self,
        connection: Connection,
        portion: ReadPortion,
        room: int,
        take: Callable[[bytes, Entry, int, float], object],
        sure_until: float,
    ) -> list[bytes]:
        """Wait for at most ``room`` entries, and hand each that is valid to ``take``.

        :param portion: how many to ask for at most
        :param take: is given an id, its entry, the number of its deliveries, which is one, and
            ``sure_until``
        :param sure_until: until when they are surely held
        :return: the ids of those that aren't valid; they are to be acknowledged
        """
        decode, stream = self._decoder.decode, self._stream
        count, before = b"%d" % min(room, portion.size), connection.received
        reply = await connection.execute(*self._head, count, b"STREAMS", stream, b">")
        invalid = []
        self.count, received = 0, connection.received - before
        small = received <= self._decoder.max_size
        for _, entries in reply or ():
            self.count += len(entries)
            for entry_id, fields in entries:
                entry = decode(stream, entry_id, fields, small)
                if entry is None:
                    invalid.append(entry_id)
                else:
                    take(entry_id, entry, 1, sure_until)
        if portion.wary or not portion.few < self.count < portion.many or received > MANY_BYTES:
            portion.took(self.count, received)
        return invalid


def _before(now: Any, seconds: float) -> bytes:
    """Return the id of a time so long before Redis' ``TIME``; the first one if that isn't known."""
    if isinstance(now, Exception):
        return b"0-0"
    return b"%d-0" % max(int(now[0]) * 1000 + int(now[1]) // 1000 - round(seconds * 1000) - 1, 0)


async def _is_stream(execute: Execute, key: bytes) -> bool:
    try:
        await execute(b"XINFO", b"STREAM", key)
    except ResponseError as exc:
        if code_of(exc) == "WRONGTYPE":
            return False
        if meaning_of(exc) is not Meaning.GONE:
            raise
    return True


async def create_group(execute: Execute, stream: bytes, group: bytes) -> bool:
    """Create a consumer group that starts with what is in the stream; return false if it is there.

    It looks first: a server that takes no writes for now refuses to create what is there already.

    :param execute: sends a command
    """
    try:
        groups: list[Any] = await execute(b"XINFO", b"GROUPS", stream)
    except ResponseError as exc:
        if meaning_of(exc) is not Meaning.GONE:
            raise
        groups = []
    if any(pairs(found)[b"name"] == group for found in groups):
        return False
    try:
        await execute(b"XGROUP", b"CREATE", stream, group, b"0", b"MKSTREAM")
    except ResponseError as exc:
        if code_of(exc) != "BUSYGROUP":
            raise
        return False
    return True


def block_ms(seconds: float) -> bytes:
    """Return what BLOCK takes. 0 would block for ever, and is never sent."""
    return b"%d" % max(round(seconds * 1000), 1)


async def last_id(ask: Callable[..., Awaitable[Any]], stream: bytes) -> bytes:
    """Return the last id of a stream.

    :param ask: `Link.ask`
    """

    def command(entries: int) -> Command:
        # XINFO STREAM has two entries in its reply, and is all that needs no right to run scripts.
        if entries > 1:
            return b"XINFO", b"STREAM", stream
        return b"EVAL", LAST_ID, b"1", stream

    reply = await ask("the last id", Portion(2), command)
    found = reply if isinstance(reply, bytes) else pairs(reply).get(b"last-generated-id")
    if found is None:
        raise ProtocolError("XINFO STREAM did not tell last-generated-id")
    return bytes(found)


async def was_trimmed(connection: Connection, stream: bytes, position: bytes) -> bool:
    """Whether entries behind a position were removed, as far as Redis (7.0 or later) tells."""
    try:
        reply = await connection.execute(b"XINFO", b"STREAM", stream)
    except ResponseError:
        return False
    info = pairs(reply)
    added, length, first = info.get(b"entries-added"), info[b"length"], info[b"first-entry"]
    if added is None or added == length or first is None:
        return False
    return order(first[0]) > order(position) > (0, 0)
