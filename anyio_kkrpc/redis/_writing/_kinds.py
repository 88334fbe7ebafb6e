"""What records say of how they are written."""

from __future__ import annotations

from msgspec import UNSET

from ...abc import Envelope
from ...records import Bye, Cancel, Record, Request
from ..dialects.native import AGAIN

__all__ = ("again", "deadline_of", "is_control")


def is_control(record: Record) -> bool:
    """Whether a record goes to the control stream, if it isn't for one peer."""
    kind = record.__class__
    return kind is Cancel or kind is Bye


def again(envelope: Envelope) -> tuple[bytes, ...]:
    """Return the fields that say how often a request was written before."""
    return (AGAIN, b"%d" % (envelope.attempt - 1)) if envelope.attempt > 1 else ()


def deadline_of(request: Envelope) -> float | None:
    """Return when the caller of a request gives up, on AnyIO's clock."""
    record = request.record
    if request.sent_at is None or not isinstance(record, Request) or record.d is UNSET:
        return None
    return request.sent_at + record.d / 1000
