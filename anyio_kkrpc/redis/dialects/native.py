"""The native dialect: fields ``from`` (the sender's id), then ``json`` or ``cbor`` (the record).

What isn't a request to the stream has a third field ``n``: ``epoch.count``, where the count grows
with each entry that the sender writes, and the epoch changes when the sender starts anew. Behind
these stands ``v``: the version of the wire that the sender speaks and, where a reader must know it,
a space and the version that this entry needs. In an inbox more records may follow, each as a field
``json`` or ``cbor``. Further fields are ignored. ``docs/wire.md`` is the whole definition.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import takewhile
from typing import final

from msgspec import Struct

from ..._exceptions import ProtocolError
from ...abc import Codec
from ...codecs import JSONCodec, get_codec
from ...codecs._weight import LARGE, Scales, weight_of_json
from ...codecs.json import decode_head
from ...records import Record, Request
from ._base import ANY_SIZE, Dialect, Entry, Several, leave_out, numbers_of
from ._keyed import CALL, KEYED_VERSION, parse_keyed

__all__ = (
    "AGAIN",
    "MARK",
    "MARK_OF_SEVERAL",
    "SEVERAL",
    "UNMARKED",
    "VERSION",
    "NativeDialect",
    "NewerWireError",
    "holds_several",
    "numbered",
)

# The version of the native wire that is spoken here. Entries of the one before have no mark.
VERSION = 3
UNMARKED = 0
# The last field of what is written here, but for a signature.
MARK = (b"v", b"%d" % VERSION)
# From which version on entries of several records are read.
SEVERAL = 3
# In its place in an entry of several records, which readers of the version before don't understand.
MARK_OF_SEVERAL = (b"v", b"%d %d" % (VERSION, SEVERAL))
# And in a request that has a key.
KEYED_MARK = (b"v", b"%d %d" % (VERSION, KEYED_VERSION))
# Behind that, in a request that is written once more: how often it was before.
AGAIN = b"again"

_MAX_PEER_ID = 256
# Peers whose codec and version are remembered.
_PEERS = 4096
# Bytes of a mark, at most, and digits of how often something was written before.
_MAX_MARK = 32
_MAX_AGAIN = 4
# Records of one entry.
_MOST_RECORDS = 1024
# Names of fields that hold records, beside that of another codec.
_CODECS = frozenset((b"json", b"cbor"))
# How requests in JSON begin, unless another program has written them.
_REQUEST = b'{"t":"q",'
_NO_CBOR = 'an entry in CBOR: pip install "anyio_kkrpc[cbor]" to read it'
# In place of the mark of an entry that was refused; equal to none, so that the next is looked at.
_REFUSED = object()


class NewerWireError(ProtocolError):
    """An entry that says that its reader must know more than this one does.

    :ivar sender: who wrote it
    :ivar request: the request that it holds, if that can be read, so that it is answered
    """

    def __init__(self, message: str, sender: str, request: Request | None) -> None:
        super().__init__(message)
        self.sender = sender
        self.request = request


class _Sender(Struct):
    """A peer that has written something.

    :ivar mark: what stood in its last entry as ``v``, ``None`` if nothing did
    """

    id: str
    mark: object = None
    version: int = UNMARKED


@final
class NativeDialect(Dialect):
    """Entries of this library.

    :param session_id: this peer's id
    :param codec: what requests are encoded with; answers are encoded as what they answer
    :ivar codec: the codec that was given
    :ivar sender: this peer's id, as it stands in the fields
    :ivar read_several: the peers that read entries of several records, as their last entries told
    :ivar changes: how often it has changed what is known of a peer
    """

    shared = False

    def __init__(self, session_id: str, codec: Codec) -> None:
        self.sender: bytes = session_id.encode()
        self.codec: Codec = codec
        self._name = codec.name.encode()
        self._codec_of: OrderedDict[str, Codec] = OrderedDict()
        # By their ids as they stand in the fields.
        self._senders: OrderedDict[bytes, _Sender] = OrderedDict()
        self.read_several: set[str] = set()
        self.changes: int = 0
        self._codecs: dict[bytes, Codec | None] = {codec.name.encode(): codec}
        for name in ("json", "cbor"):
            if name.encode() not in self._codecs:
                try:
                    self._codecs[name.encode()] = get_codec(name)
                except ImportError:
                    self._codecs[name.encode()] = None

    def note_change(self) -> None:
        """Note that what is known of a peer has changed."""
        self.changes += 1

    def codec_for(self, recipient: str) -> Codec:
        """Return what a peer is answered in: what it wrote in last."""
        return self._codec_of.get(recipient, self.codec)

    def version_of(self, peer: str) -> int:
        """Return the version of the wire that a peer speaks, as its last entry told.

        It is that of the version before for a peer that has written nothing yet, or of which
        nothing is remembered any more.
        """
        sender = self._senders.get(peer.encode())
        return UNMARKED if sender is None else sender.version

    def encode(
        self, record: Record, recipient: str | None, number: bytes | None = None
    ) -> tuple[bytes, ...]:
        """Return the fields of an entry.

        :param number: ``n``, for what isn't a request to the stream
        """
        codec = self.codec if recipient is None else self.codec_for(recipient)
        fields = (b"from", self.sender, codec.name.encode(), codec.encode(record))
        return (*fields, *MARK) if number is None else (*fields, b"n", number, *MARK)

    def try_decode(self, fields: list[bytes], most: int = ANY_SIZE) -> Entry | None:
        """Return what an entry holds; ``None`` if it isn't of this dialect.

        :param most: bytes that each of several records may have; a lone one was looked at before
        :raises ProtocolError: if it isn't valid
        """
        length = len(fields)
        if length == 6:  # the quick way of most requests
            origin, raw, name, data, what, told = fields
            sender = self._senders.get(raw)
            if (
                sender is not None
                and sender.mark == told
                and name == self._name
                and what == b"v"
                and origin == b"from"
                and not self._codec_of
                and len(data) <= LARGE
            ):
                return Entry(self.codec.decode(data), sender.id, len(data))
        return self._try_decode(fields, length, most)

    def _try_decode(self, fields: list[bytes], length: int, most: int) -> Entry | None:
        if length < 4 or fields[0] != b"from":
            return None
        name, data = fields[2], fields[3]
        codec = self._codecs.get(name)
        if codec is None:
            if name not in self._codecs:
                return None
            raise ProtocolError(_NO_CBOR)
        number = mark = again = keyed = None
        if length > 5:
            if fields[4] == b"n":
                number = fields[5]
                if length > 7 and fields[6] == b"v":
                    mark = fields[7]
                    if length > 9:
                        if fields[8] == AGAIN:
                            again = fields[9]
                        elif fields[8] in _CODECS or fields[8] == name:
                            return self._decode_several(fields, codec, most)
            elif fields[4] == b"v":
                mark = fields[5]
                if length > 7:
                    if fields[6] == AGAIN:
                        again = fields[7]
                    elif fields[6] == CALL:
                        keyed = fields[7]
                        if mark == KEYED_MARK[1]:
                            mark = MARK[1]  # which says the same of its sender
        sender = self._senders.get(fields[1])
        if sender is None or sender.mark != mark:
            sender = self._meet(fields, mark, codec)
        if codec is not self.codec or self._codec_of:
            self._remember(sender.id, codec)
        size = len(data)
        if size > LARGE:
            entry = _decode_large(fields, codec, sender.id, number)
        elif again is None and keyed is None:
            return Entry(codec.decode(data), sender.id, size, number)
        else:
            entry = Entry(codec.decode(data), sender.id, size, number)
        if keyed is not None and isinstance(entry.record, Request):
            entry.keyed = parse_keyed(keyed)
        if again is not None and again.isdigit() and len(again) <= _MAX_AGAIN:
            entry.again = int(again)
        return entry

    def _decode_several(self, fields: list[bytes], codec: Codec, most: int) -> Several:
        """Return what an entry of several records holds. One that isn't valid spoils no other.

        :param codec: of the first one
        :param most: bytes that each may have
        :raises ProtocolError: if none is, or there are too many
        """
        raw, number, mark = fields[1], fields[5], fields[7]
        if mark == MARK_OF_SEVERAL[1]:
            mark = MARK[1]  # which says the same of its sender
        sender = self._senders.get(raw)
        if sender is None or sender.mark != mark:
            readable = len(fields[3]) <= most
            sender = self._meet(fields if readable else [*fields[:3], b""], mark, codec)
        if codec is not self.codec or self._codec_of:
            self._remember(sender.id, codec)
        names, alike = _names_behind(fields)
        if len(names) >= _MOST_RECORDS:
            raise ProtocolError(f"an entry of more than {_MOST_RECORDS:,} records")
        decode, peer, quick = codec.decode, sender.id, min(LARGE, most)
        entries: list[Entry] = []
        refused: list[tuple[Exception, int]] = []
        total = 0
        for name, data in zip((fields[2], *names), (fields[3], *fields[9::2]), strict=False):
            size = len(data)
            total += size
            try:
                if alike and size <= quick:
                    entry = Entry(decode(data), peer, size)
                else:
                    entry = self._decode_one(raw, name, data, peer, most)
                entries.append(entry)
            except Exception as exc:  # a codec of the user's may keep no promise
                refused.append((exc, len(entries) + len(refused)))
        if not entries:
            raise refused[0][0]
        return Several(entries[0].record, peer, total, number, entries=entries, refused=refused)

    def _decode_one(self, raw: bytes, name: bytes, data: bytes, sender: str, most: int) -> Entry:
        """Return one of several records as if it stood alone."""
        if len(data) > most:
            raise ProtocolError(f"a record of {len(data)} bytes exceeds max_message_size")
        codec = self._codecs.get(name)
        if codec is None:
            raise ProtocolError(_NO_CBOR if name in self._codecs else "a record in no known codec")
        if len(data) > LARGE:
            return _decode_large([b"from", raw, name, data], codec, sender, None)
        return Entry(codec.decode(data), sender, len(data))

    def _meet(self, fields: list[bytes], mark: bytes | None, codec: Codec) -> _Sender:
        """Return the sender of an entry, and note what it says of itself.

        :raises NewerWireError: if the entry needs a newer reader
        """
        raw = fields[1]
        version, needs = (UNMARKED, UNMARKED) if mark is None else _parse(mark)
        sender = self._senders.get(raw)
        if sender is None:
            sender = _Sender(peer_id(raw))
            if len(self._senders) >= _PEERS:
                self.read_several.discard(self._senders.popitem(last=False)[1].id)
            self._senders[raw] = sender
        self.changes += 1
        sender.mark, sender.version = mark, version
        if version >= SEVERAL:
            self.read_several.add(sender.id)
        else:
            self.read_several.discard(sender.id)
        if needs > VERSION:
            sender.mark = _REFUSED
            self._remember(sender.id, codec)
            raise _newer(needs, codec, fields[3], sender.id)
        return sender

    def encode_keyed(self, record: Record, field: bytes) -> tuple[bytes, ...]:
        """Return the fields of a request that has a key.

        :param field: what is to be known of that
        """
        head = (b"from", self.sender, self.codec.name.encode(), self.codec.encode(record))
        return (*head, *KEYED_MARK, CALL, field)

    def codec_named(self, name: bytes) -> Codec:
        """Return a codec.

        :raises ProtocolError: if it isn't known here
        """
        codec = self._codecs.get(name)
        if codec is None:
            raise ProtocolError(f"a result in the codec {name[:20]!r}, which isn't known here")
        return codec

    def decode_whole(self, fields: list[bytes]) -> Record:
        """Return the record of an entry of this dialect, with nothing left out.

        :raises ProtocolError: if it isn't valid
        """
        codec = self._codecs[fields[2]]
        assert codec is not None  # it was decoded before
        return codec.decode(fields[3])

    def matches(self, fields: list[bytes]) -> bool:
        """Whether an entry with these fields is of this dialect."""
        return len(fields) >= 4 and fields[0] == b"from" and fields[2] in self._codecs

    def decode(self, fields: list[bytes]) -> Entry:
        entry = self.try_decode(fields)
        if entry is None:
            raise ProtocolError("an entry of another dialect")
        return entry

    def _remember(self, peer: str, codec: Codec) -> None:
        """Note how answers to a peer are to be encoded."""
        if self.codec_for(peer) is codec:
            return
        self.changes += 1
        if codec is self.codec:
            del self._codec_of[peer]
            return
        if peer not in self._codec_of and len(self._codec_of) >= _PEERS:
            self._codec_of.popitem(last=False)
        self._codec_of[peer] = codec


def _decode_large(fields: list[bytes], codec: Codec, sender: str, number: bytes | None) -> Entry:
    """Decode a large entry; of a request, what is needed until its handler begins."""
    data, weight = fields[3], 0
    if isinstance(codec, JSONCodec):
        if data.startswith(_REQUEST):
            record: Record = decode_head(data)
        else:
            record = codec.decode(data)
        if isinstance(record, Request):
            weight = weight_of_json(data)
    else:
        with Scales() as scales:
            record = codec.decode(data)
        weight = scales.weight(len(data))
    return leave_out(Entry(record, sender, len(data), number), fields, weight)


def _parse(mark: bytes) -> tuple[int, int]:
    """Return the version that a mark tells, and the one that the entry needs.

    :raises ProtocolError: if it tells none
    """
    version, _, needs = mark.partition(b" ")
    needs = needs.partition(b" ")[0] or b"0"
    if len(mark) > _MAX_MARK or not (version.isdigit() and needs.isdigit()):
        raise ProtocolError("an entry with a version that isn't one")
    return int(version), int(needs)


def _newer(needs: int, codec: Codec, data: bytes, sender: str) -> NewerWireError:
    text = f"an entry that needs version {needs} of the wire; this peer knows {VERSION}"
    try:
        record: Record | None = codec.decode(data)
    except ProtocolError:
        record = None
    return NewerWireError(text, sender, record if isinstance(record, Request) else None)


def holds_several(fields: list[bytes]) -> bool:
    """Whether an entry is one of several records."""
    return (
        len(fields) > 9
        and (fields[0], fields[4], fields[6]) == (b"from", b"n", b"v")
        and (fields[8] in _CODECS or fields[8] == fields[2])
    )


def numbered(fields: list[bytes]) -> tuple[str, list[bytes]]:
    """Return the sender of an entry that may be invalid, and the numbers of its records."""
    if len(fields) < 6 or fields[0] != b"from" or fields[4] != b"n":
        return "", []
    count = 1
    if len(fields) > 9 and fields[6] == b"v":
        count += min(len(_names_behind(fields)[0]), _MOST_RECORDS)
    try:
        return peer_id(fields[1]), [*numbers_of(fields[5], count)]
    except ProtocolError:
        return "", []


def _names_behind(fields: list[bytes]) -> tuple[list[bytes], bool]:
    """Return the names of the fields behind the version that are records, and whether all are that
    of the first record.
    """
    first, names = fields[2], fields[8::2]
    if names.count(first) == len(names):
        return names, True
    return [*takewhile(lambda name: name in _CODECS or name == first, names)], False


def peer_id(value: bytes) -> str:
    """Return an id of a peer as text.

    :raises ProtocolError: if it can't be one
    """
    if not 0 < len(value) <= _MAX_PEER_ID:
        raise ProtocolError("an entry with a sender that isn't a peer id")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ProtocolError("an entry with a sender that isn't text") from None
