"""Records as CBOR, by cbor2, with the validation that JSON has."""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any

import cbor2
import msgspec

from .._exceptions import ProtocolError
from .._protocol._records import Record
from ..abc import Codec

__all__ = ("CBORCodec",)

_NATIVE = (
    bytes, bytearray, datetime.datetime, datetime.date, uuid.UUID, decimal.Decimal,
)  # fmt: skip
_MAX_DEPTH = 128


class CBORCodec(Codec):
    """Encodes records as CBOR. Bytes, dates, UUIDs, decimals and sets stay what they are."""

    name = "cbor"

    def encode(self, record: Record) -> bytes:
        try:
            return cbor2.dumps(msgspec.to_builtins(record, builtin_types=_NATIVE))
        except cbor2.CBOREncodeError as exc:
            raise TypeError(str(exc)) from exc

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        try:
            value: Any = cbor2.loads(data, max_depth=_MAX_DEPTH)
            return msgspec.convert(value, Record, builtin_types=_NATIVE)
        except Exception as exc:
            raise ProtocolError(f"not a valid record: {str(exc)[:200]}") from exc
