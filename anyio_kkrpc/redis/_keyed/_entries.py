"""The items of a call with a key as entries of a stream of their own, written and read.

An entry holds some items, each as a field that has the name of its codec. Its id is the position of
the last one. ``mark`` tells who is to be told when that has been read. Other entries are where an
attempt begins, ``begin``, with the number of the item behind which it goes on, and the ``end``.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct

from ..._exceptions import ItemsLostError, ProtocolError
from ...abc import Codec, Item
from ...kit._items import Position, restarted
from ...records import Reply
from ..dialects._signing import Signer
from ..dialects.native import NativeDialect
from ._kept import Sealer

__all__ = ("BEGIN", "END", "Entries", "Found", "Reader")

BEGIN, END, MARK, SIGNATURE = b"begin", b"end", b"mark", b"sig"
# Attempts that have epochs of their own; there are seldom more than a few.
_ATTEMPTS = 1000
# Codecs of which the value alone is kept, without the record around it.
_BARE = frozenset({b"json", b"cbor"})
_MOST_DIGITS = 18
# In place of a reply at the end.
_CANCELLED = b"k"


def epoch_of(entry_id: bytes, attempt: int) -> int:
    """Return the epoch of an attempt at a request. It is greater than those of all before."""
    return int(entry_id.partition(b"-")[0]) * _ATTEMPTS + min(attempt, _ATTEMPTS - 1)


def is_of(epoch: int, entry_id: bytes) -> bool:
    """Whether an epoch is of one of the attempts at a request."""
    return epoch // _ATTEMPTS == int(entry_id.partition(b"-")[0])


def parse_id(entry_id: bytes) -> Position:
    """Return the position that an id is."""
    epoch, _, number = entry_id.partition(b"-")
    return Position(int(epoch), int(number))


def pack_id(epoch: int, number: int) -> bytes:
    """Return the id that is a position."""
    return b"%d-%d" % (epoch, number)


class Found(Struct):
    """What an entry says.

    :ivar at: its position
    :ivar values: the items
    :ivar behind: if an attempt begins here, the number of the last item before
    :ivar reply: if it is the end
    :ivar cancelled: whether it is, as the call was cancelled
    :ivar mark: the session that is to be told when this was read
    """

    at: Position
    values: list[Any] = []
    behind: int | None = None
    reply: Reply | None = None
    cancelled: bool = False
    mark: bytes = b""


class Entries:
    """Writes and reads them, and checks who has written them if all sign."""

    def __init__(self, native: NativeDialect, signer: Signer | None, sealer: Sealer) -> None:
        self._native = native
        self._signer = signer
        self._sealer = sealer
        self._around: dict[bytes, tuple[bytes, bytes]] = {}

    def codec_for(self, peer: str) -> Codec:
        """Return what a peer is answered in."""
        return self._native.codec_for(peer)

    # Writing

    def field(self, codec: Codec, value: Any) -> tuple[bytes, bytes]:
        """Return one item as a field.

        :raises TypeError: if it can't be encoded
        """
        name = codec.name.encode()
        data = codec.encode(Reply("", None if value is UNSET else value))
        if name in _BARE:
            before, behind = self._frame(name, codec)
            if not (data.startswith(before) and data.endswith(behind)):
                raise TypeError(f"the codec {codec.name!r} writes records in a way of its own")
            data = data[len(before) : len(data) - len(behind)]
        return name, data

    def sign(self, place: bytes, entry_id: bytes, fields: list[bytes]) -> list[bytes]:
        """Return the fields of an entry of items, signed if all sign."""
        if self._signer is None:
            return fields
        return [*fields, SIGNATURE, self._signer.seal(place, entry_id, *fields)]

    def begin(self, place: bytes, entry_id: bytes, behind: int, mark: bytes) -> list[bytes]:
        """Return the fields of where an attempt begins."""
        fields = [BEGIN, b"%d" % behind]
        return self.sign(place, entry_id, [*fields, MARK, mark] if mark else fields)

    def end(self, place: bytes, entry_id: bytes, codec: Codec, reply: Reply | None) -> bytes:
        """Return the value of the field ``end``.

        :param reply: ``None`` if the call was cancelled
        """
        data = _CANCELLED if reply is None else self._sealer.reply(codec, reply)
        return self._sealer.seal(place, entry_id, END, data)

    # Reading

    def read(self, place: bytes, entry_id: bytes, fields: list[bytes]) -> Found:
        """Return what an entry says.

        :raises ProtocolError: if that can't be read, or isn't signed as it must be
        """
        found = Found(parse_id(entry_id))
        if fields[0] == END:
            data = self._sealer.open(place, entry_id, END, fields[1])
            found.cancelled = data == _CANCELLED
            found.reply = Reply("", e={}) if found.cancelled else self._reply_of(data)
            return found
        if self._signer is not None:
            *fields, name, seal = fields
            if name != SIGNATURE or not self._signer.is_sealed(seal, place, entry_id, *fields):
                raise ProtocolError("an item of a call isn't signed as it must be")
        if fields[-2:-1] == [MARK]:
            *fields, _, found.mark = fields
        if not fields:
            raise ProtocolError("an entry of a call's items that holds none")
        if fields[0] == BEGIN:
            if not fields[1].isdigit() or len(fields[1]) > _MOST_DIGITS:
                raise ProtocolError("an attempt that begins nowhere")
            found.behind = int(fields[1])
        else:
            pairs = zip(fields[::2], fields[1::2], strict=False)
            found.values = [self._value(name, data) for name, data in pairs]
        return found

    def _reply_of(self, data: bytes) -> Reply:
        name, _, encoded = data.partition(b":")
        reply = self._native.codec_named(name).decode(encoded)
        if not isinstance(reply, Reply):
            raise ProtocolError("the end of a stream is no reply")
        return reply

    def _value(self, name: bytes, data: bytes) -> Any:
        codec = self._native.codec_named(name)
        if name in _BARE:
            before, behind = self._frame(name, codec)
            data = before + data + behind
        reply = codec.decode(data)
        if not isinstance(reply, Reply) or reply.e is not UNSET:
            raise ProtocolError("an item of a call is no value")
        return None if reply.v is UNSET else reply.v

    def _frame(self, name: bytes, codec: Codec) -> tuple[bytes, bytes]:
        """Return what stands before and behind a value in a record."""
        frame = self._around.get(name)
        if frame is None:
            sample = codec.encode(Reply("", 0))
            length = 2 if name == b"json" else 1
            frame = self._around[name] = sample[:-length], sample[len(sample) - length + 1 :]
        return frame


class Reader:
    """How far one has read, and whether what comes follows. It does no I/O.

    :param at: the position behind which to begin
    :ivar key: of the call
    :ivar at: of the last item that was taken, ``None`` before the first one
    :ivar cursor: the id of the last entry that was taken, or is to be left out
    :ivar call: the id of the request whose items are wanted, ``0-0`` while there is none
    :ivar met: whether that is known
    :ivar looks: how often one has looked since the last entry, and there was nothing
    :ivar owed: whether who writes is to be told how far this is, and Redis may not have that yet
    """

    def __init__(self, key: str, at: Position | None) -> None:
        self.key = key
        self.at = at
        # Behind number 0 is the beginning, whichever attempt's.
        self.cursor = at if at is not None and at.number else Position(0, 0)
        self.call = b"0-0"
        self.met = False
        self.looks = 0
        self.owed = False
        self._is_told = at is not None  # and not known from what was read here

    def meet(self, call: bytes) -> None:
        """Note which request has the key.

        :raises StreamRestartedError: if it isn't the one that was read until now
        """
        self.call, self.met = call, True
        if self.at is not None and not is_of(self.at.epoch, call):
            raise restarted(self.key)

    def meet_end(self, last: Position) -> None:
        """Note that nothing is behind what was read, and what the last entry is.

        :raises StreamRestartedError: if what is said to have been read isn't there: it was lost, or
            somebody has invented it
        """
        if self._is_told and last < self.cursor:
            raise restarted(self.key)
        self._is_told = False

    def is_mine(self, at: Position) -> bool:
        """Whether an entry is of the request whose items are wanted."""
        return is_of(at.epoch, self.call)

    def skip(self, at: Position) -> None:
        """Leave an entry out."""
        self.cursor = at

    def take(self, found: Found) -> list[Item[Any]]:
        """Return those items of an entry that were not taken yet.

        :raises StreamRestartedError: if what was taken isn't part of the stream any more
        :raises ItemsLostError: if some are missing before it
        """
        at = found.at
        count = len(found.values)
        if found.behind is not None:
            self._cross(at.epoch, found.behind)
        elif found.reply is None:
            self._follow(at.epoch, at.number - count + 1)
        elif found.reply.e is UNSET:
            self._follow(at.epoch, at.number)
        taken = 0 if self.at is None or self.at.epoch != at.epoch else self.at.number
        items = [
            Item(str(Position(at.epoch, number)), number, value)
            for number, value in enumerate(found.values, at.number - count + 1)
            if number > taken
        ]
        if found.reply is None:
            self._is_told = False
            self.looks = 0
            self.at = Position(at.epoch, at.number if found.behind is None else found.behind)
            self.cursor = at
        return items

    def _cross(self, epoch: int, behind: int) -> None:
        """Check what was read against where another attempt begins."""
        number = 0 if self.at is None else self.at.number
        if behind == number:
            return
        if behind < number:
            raise restarted(self.key)
        raise self._lost(epoch, number + 1, behind + 1)

    def _follow(self, epoch: int, first: int) -> None:
        """Check that the next item is there."""
        at = self.at
        if at is not None and at.epoch != epoch and at.number:
            raise restarted(self.key)  # where the other attempt began isn't kept any more
        wanted = 1 if at is None else at.number + 1
        if first > wanted:
            raise self._lost(epoch, wanted, first)
        if first < wanted and not self._is_told:
            raise restarted(self.key)  # the attempt was to go on, and has begun anew instead

    def _lost(self, epoch: int, wanted: int, first: int) -> ItemsLostError:
        return ItemsLostError(wanted, first, str(Position(epoch, first - 1)))
