"""This library's own way: every record is a message of a codec."""

from __future__ import annotations

from typing import final

from ..abc import Codec
from ..records import Record
from ._base import Spoken


@final
class NativeSpoken(Spoken):
    """Says everything, in one codec."""

    native = True

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def encode(self, record: Record, recipient: str | None) -> bytes | None:
        return self._codec.encode(record) or None

    def decode(self, message: bytes) -> Record:
        return self._codec.decode(message)
