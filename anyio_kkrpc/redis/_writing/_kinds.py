"""What records say of how they are written."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from msgspec import UNSET

from ..._exceptions import DeliveryError, OverloadedError
from ...abc import Envelope
from ...records import Bye, Cancel, Record, Request
from .._connection._errors import RedisError
from ..dialects.native import AGAIN
from ._ledger import Post

__all__ = ("again", "deadline_of", "is_control", "lost_request", "note_unsent")

logger = logging.getLogger("anyio_kkrpc")


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


def note_unsent(posts: Iterable[Post], written: Collection[Post]) -> int:
    """Count and log the records of which nobody else hears, as the callers of requests do, nor
    takes care, as the group does of what they answer.

    :param posts: what is open at the end
    :param written: those of them that only lack an answer
    """
    left = [post for post in posts if post.event is None and post.answers is None]
    gone = {*written}
    records = [post.envelope.record for post in left if post.envelope and post not in gone]
    count = sum(not isinstance(one, Request) and not is_control(one) for one in records)
    if count:
        logger.warning("%d records were not sent: nothing could be written until the end", count)
    return count


def lost_request(exc: Exception) -> DeliveryError:
    """Return the error for a request that another server has lost, and that can't be written to it,
    for want of memory, or as its arguments have been changed since.
    """
    memory = isinstance(exc, (RedisError, OverloadedError))
    why = "has no memory for" if memory else "this peer can't encode anew"
    error = DeliveryError(
        f"another Redis server answers than before, and {why} the request, which it may have lost: "
        "whether it ran isn't known"
    )
    error.__cause__ = exc
    return error
