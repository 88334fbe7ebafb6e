"""The native dialect: fields ``from`` (the sender's id), then ``json`` or ``cbor`` (the record).

What isn't a request to the stream has a third field ``n``: ``epoch.count``, where the count grows
with each entry that the sender writes, and the epoch changes when the sender starts anew.
"""

from __future__ import annotations

from typing import Any, final

from ..._exceptions import ProtocolError
from ..._protocol._records import Record
from ...abc import Codec
from ...codecs import get_codec
from ._base import Dialect, Entry

__all__ = ("NativeDialect",)

_MAX_PEER_ID = 256


@final
class NativeDialect(Dialect):
    """Entries of this library.

    :param session_id: this peer's id
    :param codec: what requests are encoded with; answers are encoded as what they answer
    """

    def __init__(self, session_id: str, codec: Codec) -> None:
        self.sender = session_id.encode()
        self._own = codec
        self._codecs: dict[bytes, Codec | None] = {codec.name.encode(): codec}
        for name in ("json", "cbor"):
            if name.encode() not in self._codecs:
                try:
                    self._codecs[name.encode()] = get_codec(name)
                except ImportError:
                    self._codecs[name.encode()] = None

    def encode(self, record: Record, flavor: Any = None) -> tuple[bytes, ...]:
        codec: Codec = self._own if flavor is None else flavor
        return (b"from", self.sender, codec.name.encode(), codec.encode(record))

    def matches(self, fields: list[bytes]) -> bool:
        return len(fields) >= 4 and fields[0] == b"from" and fields[2] in self._codecs

    def decode(self, fields: list[bytes]) -> Entry:
        codec = self._codecs[fields[2]]
        if codec is None:
            raise ProtocolError('an entry in CBOR: pip install "anyio_kkrpc[cbor]" to read it')
        sender = fields[1]
        if not 0 < len(sender) <= _MAX_PEER_ID:
            raise ProtocolError("an entry with a sender that isn't a peer id")
        try:
            name = sender.decode()
        except UnicodeDecodeError:
            raise ProtocolError("an entry with a sender that isn't text") from None
        number = fields[5] if len(fields) > 5 and fields[4] == b"n" else None
        return Entry(codec.decode(fields[3]), name, len(fields[3]), codec, number)
