"""What a transport has received: requests wait in a queue, the rest goes to the listener at once."""

from __future__ import annotations

import copy
import logging

from anyio import EndOfStream, WouldBlock, current_time
from msgspec import UNSET

from ._protocol._records import Request
from ._queue import BoundedQueue
from .abc import Envelope, Listener

logger = logging.getLogger("anyio_kkrpc")


class Inbound:
    """Implements `Transport.listen` and `Transport.receive` for a transport that has a reader.

    :param queue: for requests; its owner decides what becomes of those that are dropped
    """

    def __init__(self, queue: BoundedQueue[Envelope]) -> None:
        self._queue = queue
        self._listener: Listener | None = None
        self._serving = True
        self._reason: Exception | None = None
        self.unserved = 0

    @property
    def ended_reason(self) -> Exception | None:
        """Why nothing will be received any more, or ``None``."""
        return self._reason

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        """See `Transport.listen`."""
        self._listener = listener
        self._serving = listener is None or serve > 0
        if listener is None:
            return
        for envelope in self._queue.extract(lambda item: not self._is_request(item)):
            self._tell(listener, envelope)
        if not self._serving:
            self.unserved += len(self._queue.extract(self._is_request))
        if self._reason is not None:
            listener.ended(self._reason)

    def deliver(self, envelope: Envelope, size: int = 0) -> bool:
        """Take a received envelope; return false if it found no room and the policy is to block."""
        if self._reason is not None:
            return True
        listener = self._listener
        if listener is not None and not self._is_request(envelope):
            self._tell(listener, envelope)
            return True
        if not self._serving:
            self.unserved += 1
            return True
        record = envelope.record
        if envelope.sent_at is None and isinstance(record, Request) and record.d is not UNSET:
            envelope.sent_at = current_time()
        try:
            self._queue.put_nowait(envelope, size)
        except WouldBlock:
            return False
        return True

    async def receive(self) -> Envelope:
        """See `Transport.receive`."""
        return await self._queue.get()

    def end(self, reason: Exception) -> None:
        """Note that nothing more will come; only the first reason counts.

        After a clean end, what is queued is still received.
        """
        if self._reason is not None:
            return
        self._reason = reason
        self._queue.close(reason, discard=not isinstance(reason, EndOfStream))
        if self._listener is not None:
            self._listener.ended(copy.copy(reason))

    @staticmethod
    def _is_request(envelope: Envelope) -> bool:
        return envelope.record.__class__ is Request and envelope.error is None

    def _tell(self, listener: Listener, envelope: Envelope) -> None:
        try:
            listener.received(envelope)
        except Exception:
            logger.exception("a listener failed at %s", type(envelope.record).__name__)
