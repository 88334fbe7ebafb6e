"""Records as JSON, by msgspec."""

from __future__ import annotations

from typing import final

import msgspec

from .._exceptions import ProtocolError
from .._log import quoted
from .._models import plain
from .._protocol._records import Record
from ..abc import Codec

__all__ = ("JSONCodec",)


_encoder = msgspec.json.Encoder(enc_hook=plain)
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


@final
class JSONCodec(Codec):
    """Encodes records as JSON, one line without a newline.

    Types that JSON lacks become text or lists, and are themselves again where an annotation says
    so: ``bytes`` (base64), datetimes, UUIDs, decimals, enums, sets, tuples, dataclasses, Structs.
    NaN and the infinities become null; CBOR carries them. Nesting is bounded by Python's recursion
    limit, about 1,000 levels.
    """

    name = "json"

    def encode(self, record: Record) -> bytes:
        try:
            return _encoder.encode(record)
        except (RecursionError, ValueError) as exc:  # surrogates; integers of too many digits
            raise TypeError(f"can't be encoded as JSON: {quoted(exc)}") from exc

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        try:
            return _decoder.decode(data)
        except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
            raise ProtocolError(f"not a valid record: {quoted(exc, 200)}") from exc
