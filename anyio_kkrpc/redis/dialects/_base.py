"""What a dialect is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from msgspec import Struct

from ..._protocol._records import Record


class Entry(Struct):
    """A decoded stream entry.

    :ivar record: the record
    :ivar sender: id of the peer that wrote it
    :ivar size: bytes of the encoded record
    :ivar number: the writer's own count of what it wrote, by which a repetition is recognized
    :ivar flavor: what an answer must be encoded with to be understood there; see `Dialect.encode`
    """

    record: Record
    sender: str
    size: int
    flavor: Any
    number: bytes | None = None


class Dialect(ABC):
    """Turns records into the fields of a stream entry and back. It does no I/O.

    :ivar sender: this peer's id, as it stands in the fields
    """

    sender: bytes

    @abstractmethod
    def encode(self, record: Record, flavor: Any = None) -> tuple[bytes, ...]:
        """Return the fields of an entry: names and values in turn.

        :param flavor: that of the entry which this answers, ``None`` for this side's own choice
        :raises TypeError: if a value can't be encoded
        """

    @abstractmethod
    def matches(self, fields: list[bytes]) -> bool:
        """Whether an entry with these fields is of this dialect."""

    @abstractmethod
    def decode(self, fields: list[bytes]) -> Entry:
        """Return what an entry of this dialect holds.

        :raises ProtocolError: if it isn't valid
        """
