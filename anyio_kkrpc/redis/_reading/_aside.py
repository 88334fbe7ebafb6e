"""What waits to be served beside the queue: what is for this peer alone, and what is large."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from anyio.lowlevel import checkpoint

from ...abc import Envelope
from ...codecs._weight import LARGE
from ...kit._inbound import Inbound, refusal
from ...kit._queue import BoundedQueue, QueueStatistics
from ...records import Record, Request
from ..dialects import SharedPeer
from ._large import LargeRequest, LargeRequests

logger = logging.getLogger("anyio_kkrpc")

# Whoever takes what is at hand yields to other tasks once in so many times.
_YIELD_EVERY = 32


class Aside:
    """Requests that aren't received from the queue, in its place.

    A request for this peer alone has room of its own: what others ask of anybody must not take it,
    and what follows in the inbox must not wait. It is received in turn with the queue's.

    :param queue: of the others
    :param bounds: number and bytes of those that are for this peer alone; the bytes also bound what
        large ones weigh while they run
    :param decode: returns the record of an entry
    :param answer: is given the answers to those that find no room, to be sent
    :param invalid: told of a large one whose arguments can't be decoded
    :ivar addressed: those that are for this peer alone
    :ivar waiting: whether `receive` is to be asked, and not the queue
    """

    def __init__(
        self,
        queue: BoundedQueue[Envelope],
        inbound: Inbound,
        bounds: tuple[int, int],
        decode: Callable[[list[bytes]], Record],
        answer: Callable[[Envelope], object],
        invalid: Callable[[Envelope], object],
    ) -> None:
        self._queue = queue
        self._inbound = inbound
        self.addressed: BoundedQueue[Envelope]
        self.addressed = BoundedQueue(*bounds, "drop_newest", on_drop=self.refuse)
        self._answer = answer
        self._large = LargeRequests(bounds[1], decode)
        self._invalid = invalid
        self._addressed_first = True
        self._taken = 0
        self.waiting = False

    def deliver(self, envelope: Envelope, size: int) -> None:
        """Take a request that is for this peer alone."""
        inbound = self._inbound
        if not inbound.serving or inbound.ended_reason is not None:
            inbound.deliver(envelope, size)  # which throws it away
        elif self.addressed.put_nowait(envelope, size):
            self.waiting = True
            self.go_on()

    def take_back(self, envelope: Envelope) -> None:
        """Take one that was in the queue, where others got its room; refuse it if that was all."""
        if envelope.recipient is None or isinstance(envelope.sender, SharedPeer):
            self.refuse(envelope)
        else:
            size = envelope.size if isinstance(envelope, LargeRequest) else LARGE
            self.deliver(envelope, size)

    def refuse(self, envelope: Envelope) -> None:
        """Tell a caller that there is no room."""
        reply = refusal(envelope)
        if reply is not None:
            self._answer(Envelope(reply, None, envelope.sender))

    async def receive(self) -> Envelope:
        """Return the next request: what was put aside, or in turn one for this peer and another."""
        self._taken += 1
        if not self._taken % _YIELD_EVERY:
            await checkpoint()
        large, addressed = self._large, self.addressed
        while True:
            request = large.next()
            if request is not None:
                self._look()
                return request
            if large.crowded:
                await large.wait()
            elif len(addressed) and (self._addressed_first or not self._queue.at_hand):
                return self._next_addressed()
            else:
                self._addressed_first = True
                return await self._inbound.receive()

    def go_on(self) -> None:
        """Wake whoever waits at the queue, if there is something else for it."""
        if len(self._queue) or not self._queue.waiting_receivers:
            return
        request: Envelope | None = self._large.next()
        if request is None and len(self.addressed) and not self._large.crowded:
            request = self._next_addressed()
        if request is not None:
            self._queue.put_nowait(request)  # an empty queue takes anything
            self._look()

    def begin(self, envelope: Envelope) -> bool:
        """Decode a large request that was received; return false if it isn't served, for now."""
        assert isinstance(envelope, LargeRequest)
        try:
            if not self._large.begin(envelope):
                self.waiting = True
                return False
        except Exception as exc:  # its arguments weren't looked at before
            logger.warning("skipped a request of %s: %s", envelope.sender, exc)
            self._invalid(envelope)
            return False
        if isinstance(envelope.sender, SharedPeer):
            assert isinstance(envelope.record, Request)
            envelope.sender.dialect.begin(envelope.record, envelope.sender)
        return True

    def end(self, envelope: Envelope) -> None:
        """Note that a large request is settled."""
        self._large.end(envelope)
        self.go_on()

    def lend(self, change: int) -> None:
        """Note that more handlers wait for calls of their own, or fewer."""
        self._large.lend(change)
        if self.waiting:
            self.go_on()

    def forget(self, *, begun: bool) -> None:
        """Forget what waits, unless it is kept for who comes next; a group gets its own back.

        :param begun: whether nobody will settle what was begun either
        """
        inbound, ended = self._inbound, self._inbound.ended_reason is not None
        kept = inbound.serving and not ended
        forgotten = self._large.forget(lambda one: one.token is not None or not kept)
        if begun:
            self._large.forget_begun()
        if not kept:
            forgotten += self.addressed.extract(lambda one: True)
        if not ended:
            inbound.note_unserved(sum(one.token is None for one in forgotten))
        self._look()

    def statistics(self) -> QueueStatistics:
        """Return what the queue holds and has seen, and what is beside it."""
        queue, addressed = self._queue.statistics(), self.addressed.statistics()
        items = queue.current_items + addressed.current_items + len(self._large.aside)
        size = queue.current_bytes + addressed.current_bytes + self._large.bytes_aside
        return replace(
            queue,
            current_items=items,
            current_bytes=size,
            high_water_items=max(items, queue.high_water_items),
            high_water_bytes=max(size, queue.high_water_bytes),
            dropped=queue.dropped + addressed.dropped,
        )

    def _next_addressed(self) -> Envelope:
        self._addressed_first = False
        envelope = self.addressed.get_nowait()
        self._look()
        return envelope

    def _look(self) -> None:
        self.waiting = len(self.addressed) > 0 or len(self._large.aside) > 0
