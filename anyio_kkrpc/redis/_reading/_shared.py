"""TypeScript peers: they know one stream, and write there what is for one peer as well.

So whoever hears of one reads replies and the like from the stream, too, and leaves out what others
are meant by. A worker that makes a new group doesn't run what was asked long before it came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from anyio.abc import TaskGroup

from ..._exceptions import DeliveryError
from ..._wire_errors import library_error
from ...abc import Envelope
from ...kit._inbound import Inbound
from ...records import Bye, Reply, Request
from .._stream._entries import order
from ..dialects import Dialects, Entry, SharedPeer
from ._destroying import DestroySignals
from ._pacing import Pacing

__all__ = ("Shared",)

logger = logging.getLogger("anyio_kkrpc")


class Shared:
    """What is between this peer and those on the stream.

    :param session_id: this peer's
    :param group: the name of the group whose worker this may be, ``None`` in a broadcast
    :param wants_own: whether, in a broadcast, this peer also gets what it wrote itself
    :param signals: takes their destroy signals
    :param answer: is given the answers to requests that will not run
    :param now: Redis' time in seconds
    :param listen: has the stream read for replies from an id on
    :ivar pacing: lets streams that such peers read go on
    :ivar connected_id: the last id of the stream when this peer came
    :ivar received: records taken from the stream that are no requests
    """

    def __init__(
        self,
        dialects: Dialects,
        session_id: str,
        group: str | None,
        *,
        wants_own: bool,
        inbound: Inbound,
        signals: DestroySignals,
        answer: Callable[[Envelope], object],
        now: Callable[[], float],
        listen: Callable[[bytes], object],
    ) -> None:
        self._streams = dialects.classic.streams
        self._session_id = session_id
        self._group = group
        self._leaves_own = group is None and not wants_own
        self._inbound = inbound
        self._signals = signals
        self._answer = answer
        self._now = now
        self._listen = listen
        self.pacing = Pacing(self._streams, inbound)
        self.connected_id = b"0-0"
        self.received = 0

    def begin_after(self, entry_id: bytes, tasks: TaskGroup) -> None:
        """Note which entry of the stream was the last when this peer came.

        :param tasks: where what lets streams go on runs
        """
        self.connected_id = entry_id
        self.pacing.begin(tasks)

    # What is of no interest here

    def is_own(self, entry: Entry) -> bool:
        """Whether it is of this peer and unwanted. In a group anybody's request is wanted."""
        return self._leaves_own and entry.sender == self._session_id

    def is_for_others(self, entry: Entry) -> bool:
        """Whether an entry of the stream is of no interest here.

        kkrpc 2 addresses all that it writes to one peer; that may be a group of workers.
        """
        recipient = entry.recipient
        if recipient is None:
            is_ours = entry.sender == self._session_id and isinstance(entry.sender, SharedPeer)
            return is_ours and self._streams.was_addressed(entry.record)
        if recipient == self._session_id:
            return False
        return recipient != self._group

    # Requests

    def prepare(self, envelope: Envelope, entry_id: bytes) -> bool:
        """Make a request of such a peer ready; return false if it is none, or won't run."""
        sender = envelope.sender
        assert isinstance(sender, SharedPeer)
        if not isinstance(envelope.record, Request):
            if isinstance(envelope.record, Bye) and order(entry_id) > order(self.connected_id):
                if envelope.token is None:
                    self._signals.take(sender)
                else:
                    self._signals.take_alone(sender)
            return False
        if self._is_history(envelope, entry_id, sender.dialect.stale_after):
            error = DeliveryError("the request is older than this worker, and was not run")
            reply = Reply(envelope.record.id, e=library_error(error))
            self._answer(Envelope(reply, None, sender))
            logger.warning(
                "skipped entry %s: asked long before this worker came", entry_id.decode()
            )
            return False
        self._listen(entry_id)
        sender.dialect.begin(envelope.record, sender)
        if sender.dialect.answers_unknown:
            envelope.recipient = self._session_id
        return True

    def _is_history(self, envelope: Envelope, entry_id: bytes, stale_after: float) -> bool:
        """Whether a new group is only now given what nobody waits for any more."""
        if envelope.token is None or envelope.attempt > 1:
            return False
        written = order(entry_id)
        age = self._now() - written[0] / 1000
        return age > stale_after and written <= order(self.connected_id)

    # The rest

    def take(self, entry: Entry, *, serving: bool) -> None:
        """Take what isn't a request from the stream. Requests are read elsewhere.

        :param serving: whether requests are read now
        """
        record, sender = entry.record, entry.sender
        if not isinstance(sender, SharedPeer) or isinstance(record, Request):
            return
        if self.is_own(entry):
            return
        if isinstance(record, Bye):
            # Whoever serves the group acknowledges it first, and tells the others.
            if self._group is None or not serving:
                self._signals.take(sender)
            return
        if self.is_for_others(entry):
            return
        taken = sender.dialect.take(record, sender, entry.size)
        if taken is not None:
            self.received += 1
            addressed = entry.recipient == self._session_id
            recipient = entry.recipient if addressed else None
            self._inbound.deliver(Envelope(taken, sender, recipient))


def answer_shared(request: Envelope, reply: Envelope) -> None:
    """Make a reply what such a peer expects, if it is for one."""
    sender, asked, record = request.sender, request.record, reply.record
    if isinstance(sender, SharedPeer):
        assert isinstance(asked, Request)
        assert isinstance(record, Reply)
        reply.record = sender.dialect.answer(asked, record)
