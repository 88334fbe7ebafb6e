"""What was read of one stream becomes envelopes, and is handed on."""

from __future__ import annotations

import logging

from ...abc import Envelope
from ...records import Record, Request
from .._stream._clock import ServerClock
from ..dialects import Entry, SharedPeer
from ._intake import Intake
from ._large import LargeRequest
from ._reception import Reception
from ._shared import Shared

__all__ = ("Arrivals", "id_of")

logger = logging.getLogger("anyio_kkrpc")


class Arrivals:
    """Hands entries on: requests to the reception, the rest to the listener.

    :param clock: of the server that has the stream
    :param shared: knows what TypeScript peers mean
    :param session_id: this peer's
    :param grouped: whether a group gets the stream, which forwards what is for one peer alone
    :ivar queue: of the reception
    :ivar intake: what found no room in the queue; whoever reads waits for it
    :ivar misplaced: records that had no business among the requests
    """

    def __init__(
        self,
        reception: Reception,
        clock: ServerClock,
        shared: Shared,
        session_id: str,
        *,
        grouped: bool,
    ) -> None:
        self._inbound, self._aside = reception.inbound, reception.aside
        self.queue = reception.queue
        self._clock = clock
        self._shared = shared
        self._session_id = session_id
        self._grouped = grouped
        self.intake: Intake[Envelope] = Intake(self.queue)
        self.misplaced = 0

    def deliver(
        self,
        entry: Entry,
        entry_id: bytes,
        recipient: str | None,
        token: object,
        attempt: int = 1,
    ) -> bool:
        """Hand on what an entry holds; return false if it has no business where it was.

        :param token: of who holds it for a group, else ``None``
        """
        record, sender, sent_at = entry.record, entry.sender, None
        if record.__class__ is Request:
            sent_at = int(entry_id.partition(b"-")[0]) / 1000 + self._clock.offset
        if entry.__class__ is Entry:
            envelope = Envelope(record, sender, recipient, attempt, sent_at, None, token)
        else:
            envelope = LargeRequest(record, sender, recipient, attempt, sent_at, None, token)
            envelope.leave_out(entry)
        if sender.__class__ is SharedPeer and not self._shared.prepare(envelope, entry_id):
            return False
        if sent_at is not None:
            if recipient is not None:
                self._aside.deliver(envelope, entry.size)
            elif self.intake.waiting or not self._inbound.deliver(envelope, entry.size):
                self.intake.add(envelope, entry.size)
            return True
        if recipient is not None:
            self._inbound.deliver(envelope, entry.size)
            return True
        self.misplaced += 1
        logger.warning("skipped a %s among the requests", type(record).__name__)
        return False

    def forget(self, entry: Entry, *, addressed: bool = False) -> list[Envelope]:
        """Forget a request that waits: an entry came by which it came once more. Return it.

        :param addressed: whether it is for this peer alone; what isn't has nothing to do with that
        """
        record, sender = entry.record, entry.sender
        if not isinstance(record, Request):
            return []
        name = record.id

        def same(one: Envelope) -> bool:
            return one.sender == sender and id_of(one.record) == name

        if addressed:
            return self._aside.addressed.extract(same)
        return self.queue.extract(same) + self.intake.extract(same)

    def deliver_addressed(self, entry_id: bytes, entry: Entry) -> None:
        """Hand on what is for this peer alone."""
        # What is of a SharedPeer was forwarded by a worker of a group; else this peer has read it
        # from the stream.
        if self._grouped or not isinstance(entry.sender, SharedPeer):
            if entry.again:
                self.forget(entry, addressed=True)
            self.deliver(entry, entry_id, self._session_id, None, 1 + entry.again)


def id_of(record: Record | None) -> str | None:
    """Return the id of a request."""
    return record.id if isinstance(record, Request) else None
