"""Records as CBOR, by cbor2, with the validation that JSON has."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable
from io import BytesIO
from typing import Any, final, get_args

import cbor2
import msgspec

from .._exceptions import ProtocolError
from .._models import plain
from .._protocol._records import Record
from ..abc import Codec

__all__ = ("CBORCodec",)

_NATIVE = (bytes, bytearray, datetime.datetime, datetime.date, uuid.UUID, decimal.Decimal)

# Nesting that a record may have. Not a limit of CBOR: it bounds the stack of whoever walks a value.
MAX_DEPTH = 100


def _refuse(tag: int) -> Callable[[Any], Any]:
    def refuse(*_: Any) -> Any:
        raise ValueError(f"tag {tag} is not accepted")

    return refuse


# Tags that cbor2 would turn into something else than plain data: fractions, shared and string
# references, regular expressions, MIME messages, IP addresses, complex numbers, nested CBOR.
_REFUSED = (24, 25, 28, 29, 30, 35, 36, 52, 54, 256, 260, 261, 43000)
_DECODERS = {tag: _refuse(tag) for tag in _REFUSED}


_CLASSES: dict[str, type[Record]] = {
    str(cls.__struct_config__.tag): cls for cls in get_args(Record)
}


def _refuse_unknown(*args: Any) -> Any:
    raise ValueError("a tag that is not accepted")


@final
class CBORCodec(Codec):
    """Encodes records as CBOR.

    ``bytes``, aware datetimes, dates, UUIDs and decimals arrive as what they were, and integers of
    any size. Naive datetimes are refused: CBOR has none. Sets and tuples arrive as lists, as in
    JSON, unless an annotation says otherwise.
    """

    name = "cbor"

    def encode(self, record: Record) -> bytes:
        try:
            return cbor2.dumps(msgspec.to_builtins(record, builtin_types=_NATIVE, enc_hook=plain))
        except (cbor2.CBOREncodeError, RecursionError, UnicodeEncodeError) as exc:
            raise TypeError(f"can't be encoded as CBOR: {exc}") from exc

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        source = BytesIO(data)
        try:
            value: Any = cbor2.CBORDecoder(
                source,
                max_depth=MAX_DEPTH,
                allow_duplicate_keys=False,
                semantic_decoders=_DECODERS,
                tag_hook=_refuse_unknown,
            ).decode()
            if source.tell() != len(data):
                raise ValueError("bytes after the record")
            # By its class, not by the union of all: msgspec keeps what it learns of classes only.
            return msgspec.convert(value, _CLASSES[value["t"]], builtin_types=_NATIVE)
        except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
            text = f"not a valid record: {type(exc).__name__}: {str(exc)[:200]}"
            raise ProtocolError(text) from exc
