"""A codec of a user's, held to what `Codec` says of errors."""

from __future__ import annotations

from typing import get_args

from .._exceptions import ProtocolError
from ..abc import Codec
from ..records import Record

_RECORDS: tuple[type[object], ...] = get_args(Record)


class GuardedCodec(Codec):
    """Has no other errors than those of `Codec`, and no other results.

    What sends and what reads tells by these what is wrong with a value, or with a message; any
    other one would end it.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.name = codec.name

    def encode(self, record: Record) -> bytes:
        try:
            data = self._codec.encode(record)
        except TypeError:
            raise
        except Exception as exc:
            raise TypeError(f"{self._kind} can't encode it: {exc!r:.200}") from exc
        if not isinstance(data, bytes):
            raise TypeError(f"{self._kind} encodes it as {type(data).__name__}, not bytes")
        return data

    def decode(self, data: bytes | bytearray | memoryview) -> Record:
        try:
            record = self._codec.decode(data)
        except ProtocolError:
            raise
        except Exception as exc:
            raise ProtocolError(f"{self._kind} can't decode it: {exc!r:.200}") from exc
        if not isinstance(record, _RECORDS):
            raise ProtocolError(f"{self._kind} decodes it as {type(record).__name__}, no record")
        return record

    @property
    def _kind(self) -> str:
        return type(self._codec).__name__
