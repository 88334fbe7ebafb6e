"""Records as JSON, by msgspec."""

from __future__ import annotations

import msgspec

from .._exceptions import ProtocolError
from .._protocol._records import Record
from ..abc import Codec

__all__ = ("JSONCodec",)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


class JSONCodec(Codec):
    """Encodes records as JSON, one line without a newline."""

    name = "json"

    def encode(self, record: Record) -> bytes:
        return _encoder.encode(record)

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        try:
            return _decoder.decode(data)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
            raise ProtocolError(f"not a valid record: {str(exc)[:200]}") from exc
