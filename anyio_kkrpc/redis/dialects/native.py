"""The native dialect: fields ``from`` (the sender's id), then ``json`` or ``cbor`` (the record).

What isn't a request to the stream has a third field ``n``: ``epoch.count``, where the count grows
with each entry that the sender writes, and the epoch changes when the sender starts anew.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from ..._exceptions import ProtocolError
from ..._protocol._records import Record
from ...abc import Codec
from ...codecs import get_codec
from ._base import Dialect, Entry

__all__ = ("NativeDialect",)

_MAX_PEER_ID = 256
# Peers whose codec is remembered.
_PEERS = 4096


@final
class NativeDialect(Dialect):
    """Entries of this library.

    :param session_id: this peer's id
    :param codec: what requests are encoded with; answers are encoded as what they answer
    :ivar codec: the codec that was given
    :ivar sender: this peer's id, as it stands in the fields
    """

    shared = False

    def __init__(self, session_id: str, codec: Codec) -> None:
        self.sender: bytes = session_id.encode()
        self.codec: Codec = codec
        self._codec_of: OrderedDict[str, Codec] = OrderedDict()
        # Ids as they stand in the fields, and as text.
        self._ids: OrderedDict[bytes, str] = OrderedDict()
        self._codecs: dict[bytes, Codec | None] = {codec.name.encode(): codec}
        for name in ("json", "cbor"):
            if name.encode() not in self._codecs:
                try:
                    self._codecs[name.encode()] = get_codec(name)
                except ImportError:
                    self._codecs[name.encode()] = None

    def codec_for(self, recipient: str) -> Codec:
        """Return what a peer is answered in: what it wrote in last."""
        return self._codec_of.get(recipient, self.codec)

    def encode(self, record: Record, recipient: str | None) -> tuple[bytes, ...]:
        codec = self.codec if recipient is None else self.codec_for(recipient)
        return (b"from", self.sender, codec.name.encode(), codec.encode(record))

    def try_decode(self, fields: list[bytes]) -> Entry | None:
        """Return what an entry holds; ``None`` if it isn't of this dialect.

        :raises ProtocolError: if it isn't valid
        """
        if len(fields) < 4 or fields[0] != b"from":
            return None
        name, data = fields[2], fields[3]
        codec = self._codecs.get(name)
        if codec is None:
            if name not in self._codecs:
                return None
            raise ProtocolError('an entry in CBOR: pip install "anyio_kkrpc[cbor]" to read it')
        raw = fields[1]
        sender = self._ids.get(raw)
        if sender is None:
            sender = self._ids[raw] = peer_id(raw)
            if len(self._ids) > _PEERS:
                self._ids.popitem(last=False)
        if codec is not self.codec or self._codec_of:
            self._remember(sender, codec)
        number = fields[5] if len(fields) > 5 and fields[4] == b"n" else None
        return Entry(codec.decode(data), sender, len(data), number)

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
        if codec is self.codec:
            self._codec_of.pop(peer, None)
            return
        if peer not in self._codec_of and len(self._codec_of) >= _PEERS:
            self._codec_of.popitem(last=False)
        self._codec_of[peer] = codec


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
