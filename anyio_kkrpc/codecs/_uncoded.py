"""What records are for who gets them without a codec."""

from __future__ import annotations

from msgspec.structs import replace

from .._protocol._values import Packed
from ..records import Record, Reply, StreamReply


def uncoded(record: Record) -> Record:
    """Return a record as a codec would have made it, for who reads what it stands for."""
    if isinstance(record, (Reply, StreamReply)) and record.v.__class__ is Packed:
        return replace(record, v=dict(record.v))
    return record
