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
from .._runtime._log import quoted
from .._values._pydantic import plain
from .._values._undefined import UndefinedInsideError, defined_record
from ..abc import Codec
from ..records import Record
from ._cbor_heads import may_have_large_integers
from ._cbor_keys import check_keys

__all__ = ("CBORCodec",)

_NATIVE = (bytes, bytearray, datetime.datetime, datetime.date, uuid.UUID, decimal.Decimal)

# Nesting that a record may have. Not a limit of CBOR: it bounds the stack of whoever walks a value.
MAX_DEPTH = 100


def _refuse(tag: int) -> Callable[[Any], Any]:
    def refuse(*_: Any) -> Any:
        raise ValueError(f"tag {tag} is not accepted")

    return refuse


# Digits of a number and of its exponent's power of ten: what Python itself makes text of and reads.
# What time it takes to make a decimal of an integer, or an integer of a decimal, grows with the
# square of the digits, and a few bytes are enough for an exponent of millions.
MAX_DIGITS = 4300
_TOO_LARGE = 10**MAX_DIGITS
_MAX_BYTES = (_TOO_LARGE.bit_length() + 7) // 8


def _bignum(value: bytes, immutable: bool) -> int:
    if len(value) <= _MAX_BYTES and (number := int.from_bytes(value, "big")) < _TOO_LARGE:
        return number
    raise ValueError(f"an integer of more than {MAX_DIGITS} digits")


def _negative_bignum(value: bytes, immutable: bool) -> int:
    number = -1 - _bignum(value, immutable)
    if number == -_TOO_LARGE:
        raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
    return number


def _decimal(parts: Any, immutable: bool) -> decimal.Decimal:
    exponent, digits = parts
    if not -MAX_DIGITS <= exponent <= MAX_DIGITS:
        raise ValueError(f"a decimal with the exponent {exponent!r:.40}")
    return decimal.Decimal((digits < 0, tuple(map(int, str(abs(digits)))), exponent))


# Tags that cbor2 would turn into something else than plain data: binary and other fractions, shared
# and string references, regular expressions, MIME messages, IP addresses, complex numbers, nested
# CBOR.
_REFUSED = (5, 24, 25, 28, 29, 30, 35, 36, 52, 54, 256, 260, 261, 43000)
_DECODERS = {tag: _refuse(tag) for tag in _REFUSED} | {
    2: _bignum,
    3: _negative_bignum,
    4: _decimal,
}
# Bytes of a record in which too few keys have room to do harm.
_HARMLESS = 8192


def _encode_decimal(encoder: cbor2.CBOREncoder, value: decimal.Decimal) -> None:
    parts = value.as_tuple()
    if isinstance(parts.exponent, int) and (
        len(parts.digits) > MAX_DIGITS or abs(parts.exponent) > MAX_DIGITS
    ):
        raise ValueError(f"a decimal of more than {MAX_DIGITS} digits")
    encoder.encode_decimal(value)


_ENCODERS: dict[type, Callable[[cbor2.CBOREncoder, Any], object]] = {
    decimal.Decimal: _encode_decimal
}

_CLASSES: dict[str, type[Record]] = {
    str(cls.__struct_config__.tag): cls for cls in get_args(Record)
}


def _refuse_unknown(*args: Any) -> Any:
    raise ValueError("a tag that is not accepted")


def _decode(
    data: bytes | bytearray | memoryview, *, strict: bool = False, immutable: bool = False
) -> Any:
    source = BytesIO(data)
    decoder = cbor2.CBORDecoder(
        source,
        max_depth=MAX_DEPTH,
        allow_duplicate_keys=False,
        strict_hashable_types=strict,
        semantic_decoders=_DECODERS,
        tag_hook=_refuse_unknown,
    )
    value = decoder.decode(immutable=immutable)
    if source.tell() != len(data):
        raise ValueError("bytes after the record")
    return value


def _decode_keys(data: bytes) -> Any:
    return _decode(data, immutable=True)


def _builtins(record: Record) -> Any:
    try:
        return msgspec.to_builtins(record, builtin_types=_NATIVE, enc_hook=plain)
    except UndefinedInsideError:
        record = defined_record(record)
        return msgspec.to_builtins(record, builtin_types=_NATIVE, enc_hook=plain)


@final
class CBORCodec(Codec):
    """Encodes records as CBOR.

    ``bytes``, aware datetimes, dates, UUIDs and decimals arrive as what they were, and integers;
    numbers may have 4,300 digits. Naive datetimes are refused: CBOR has none. Sets and tuples
    arrive as lists, as in JSON, unless an annotation says otherwise.
    """

    name = "cbor"

    def encode(self, record: Record) -> bytes:
        try:
            plainer = _builtins(record)
            data = cbor2.dumps(plainer, encoders=_ENCODERS)
            if may_have_large_integers(data):
                self.decode(data)
        except (cbor2.CBOREncodeError, RecursionError, ValueError, ProtocolError) as exc:
            raise TypeError(f"can't be encoded as CBOR: {quoted(exc)}") from exc
        return data

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        try:
            try:
                value = _decode(data, strict=True)
            except cbor2.CBORDecodeError:
                # It may have keys that aren't text.
                if len(data) > _HARMLESS:
                    check_keys(bytes(data), _decode_keys)
                value = _decode(data)
            # By its class, not by the union of all: msgspec keeps what it learns of classes only.
            return msgspec.convert(value, _CLASSES[value["t"]], builtin_types=_NATIVE)
        except Exception as exc:  # a decoder must not raise anything else, whatever the bytes are
            text = f"not a valid record: {type(exc).__name__}: {quoted(exc, 200)}"
            raise ProtocolError(text) from exc
