"""What a transport has received: requests wait in a queue, the rest goes to a listener at once."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import final

from anyio import EndOfStream, WouldBlock, current_time
from msgspec import UNSET

from .._exceptions import OverloadedError
from .._runtime._fresh import fresh_copy
from .._wire_errors import library_error
from ..abc import Envelope, Listener, Role
from ..records import Reply, Request
from ._queue import BoundedQueue

__all__ = ("Inbound", "refusal")

logger = logging.getLogger("anyio_kkrpc")


@final
class Inbound:
    """Implements `Transport.listen` and `Transport.receive` for a transport that has a reader.

    :param queue: for requests (without a listener: for everything); its owner decides what becomes
        of those that are dropped
    :ivar poll: returns a request at hand, if there is one; once in 32 times ``None`` all the same
    :ivar wait: returns the next request, after ``poll`` has returned none
    :ivar unserved: requests thrown away because the listener serves none
    :ivar listener_errors: exceptions that listeners raised; they are logged and go no further
    """

    def __init__(self, queue: BoundedQueue[Envelope]) -> None:
        self._queue = queue
        self.poll: Callable[[], Envelope | None] = queue.poll
        self.wait: Callable[[], Awaitable[Envelope]] = queue.get
        self._listener: Listener | None = None
        self._told: Listener | None = None
        self._serving = True
        self._reason: Exception | None = None
        self.unserved: int = 0
        self.listener_errors: int = 0

    @property
    def serving(self) -> bool:
        """Whether requests are wanted: without a listener, or with one that serves them."""
        return self._serving

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
        for envelope in self._queue.extract(lambda item: not _is_request(item)):
            self.deliver(envelope)
        if not self._serving:
            self.note_unserved(len(self._queue.extract(_is_request)))
        if self._reason is not None:
            self._tell_ended(listener, self._reason)

    def deliver(self, envelope: Envelope, size: int = 0) -> bool:
        """Take a received envelope; what comes after the end is thrown away.

        :param size: its bytes
        :return: false if the queue's policy is ``block`` and there is no room: the reader waits in
            ``queue.wait_room(size)`` and delivers it again
        """
        if self._reason is not None:
            return True
        listener = self._listener
        if listener is not None and (
            envelope.record.__class__ is not Request or envelope.error is not None
        ):
            try:
                listener.received(envelope)
            except KeyboardInterrupt:
                raise
            except BaseException:  # a model's code, say, may raise what no reader expects
                self._note_failure(type(envelope.record).__name__)
            return True
        if not self._serving:
            self.note_unserved(1)
            return True
        record = envelope.record
        if envelope.sent_at is None and isinstance(record, Request) and record.d is not UNSET:
            envelope.sent_at = current_time()
        try:
            self._queue.put_nowait(envelope, size)
        except WouldBlock:
            return False
        return True

    def note_unserved(self, count: int) -> None:
        """Count and log requests that are thrown away because the listener serves none."""
        if count:
            self.unserved += count
            logger.info("%d requests were thrown away: nobody serves them here", count)

    def lose_peer(self, peer: str, role: Role, error: Exception) -> None:
        """Tell the listener that a peer is gone; see `Listener.peer_gone`."""
        if self._listener is None:
            return
        self._tell("a peer that is gone", self._listener.peer_gone, peer, role, error)

    async def receive(self) -> Envelope:
        """See `Transport.receive`."""
        return self.poll() or await self.wait()

    def expects(self) -> bool:
        """See `Listener.expects`."""
        return self._listener is not None and self._reason is None and self._listener.expects()

    def waiting(self) -> list[Envelope]:
        """See `Listener.waiting`."""
        listener = self._listener
        return [] if listener is None or self._reason is not None else [*listener.waiting()]

    def lose(self, reason: Exception) -> None:
        """See `Listener.lost`."""
        if self._listener is None or self._reason is not None:
            return
        self._tell("a loss of its transport", self._listener.lost, reason)

    def doubt(self) -> None:
        """See `Listener.doubted`."""
        if self._listener is not None and self._reason is None:
            self._tell("records that may be lost", self._listener.doubted)

    def end(self, reason: Exception) -> None:
        """Note that nothing more will come; only the first reason counts.

        After a clean end, `~anyio.EndOfStream`, what is queued is still received. Otherwise it is
        thrown away, and those who wait fail at once.
        """
        if self._reason is not None:
            return
        self._reason = reason
        self._queue.close(reason, discard=not isinstance(reason, EndOfStream))
        if self._listener is not None:
            self._tell_ended(self._listener, reason)

    def _tell(self, what: str, method: Callable[..., object], *args: object) -> None:
        try:
            method(*args)
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._note_failure(what)

    def _note_failure(self, what: str) -> None:
        self.listener_errors += 1
        logger.exception("a listener failed at %s", what)

    def _tell_ended(self, listener: Listener, reason: Exception) -> None:
        if listener is self._told:
            return
        self._told = listener
        self._tell("the end of its transport", listener.ended, fresh_copy(reason))


def _is_request(envelope: Envelope) -> bool:
    """Whether somebody asks this side, and it isn't a request of ours that came back."""
    return envelope.record.__class__ is Request and envelope.error is None


def refusal(envelope: Envelope) -> Reply | None:
    """Return the reply to a request that found no room, if its caller wants one."""
    record = envelope.record
    if not isinstance(record, Request) or record.o is True:
        return None
    error = OverloadedError("the queue of requests is full; the request did not run")
    return Reply(record.id, e=library_error(error))
