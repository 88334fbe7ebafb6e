"""What a channel sends without waiting, and what the garbage collector has left behind."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from anyio import Event, move_on_after
from msgspec import UNSET

from .._protocol._ahead import Ahead
from .._protocol._budget import BUDGET, weight_of
from .._protocol._conversation import Conversation
from .._protocol._records import CallbackRelease, Record
from .._protocol._streams import Consumer
from .._runtime._clock import scheduler
from .._runtime._sparing import Sparing
from ..abc import Envelope, Transport

logger = logging.getLogger("anyio_kkrpc")

# Records that may wait; and of those that other peers' records called forth, which they may do
# without end and without reading what they are told, and what these weigh.
MOST = 100_000
MOST_OWED = 10_000
MOST_OWED_WEIGHT = 4 * BUDGET


class Outbox:
    """Sends records one after the other, from one task, for those who can't wait.

    Before it was opened nothing is sent, and after it was closed nothing is taken. What is too much
    is thrown away, counted and logged: who is told less waits until its own time is over.

    :ivar dropped: records that were thrown away
    """

    def __init__(self, conversation: Conversation, transport: Transport) -> None:
        self._conversation = conversation
        self._transport = transport
        # With what they weigh, which is -1 for what this side sends of itself.
        self._waiting: deque[tuple[Envelope, int]] = deque()
        self._owed = self._owed_weight = 0
        self._sending = False
        self._drops = Sparing()
        self.dropped: int = 0
        self._filled: Event | None = None
        self._soon: Callable[[Callable[[], object]], None] | None = None
        # Whether the task has been asked to look at these.
        self._collecting = False
        self._released: deque[tuple[str, str | None, str, Ahead | None]] = deque()
        self._abandoned: deque[Consumer] = deque()
        self._closed = False

    def open(self) -> None:
        """Take from now on what is put into it from any thread. Called in the event loop."""
        self._soon = scheduler()

    def post(
        self, record: Record, recipient: str | None, token: Any = None, route: Any = None
    ) -> None:
        """Send a record.

        :param token: see `Envelope.token`
        :param route: see `Envelope.route`
        """
        if not self._closed:
            self._add(record, recipient, token=token, route=route)
            self._wake()

    def owe(self, record: Record, recipient: str | None) -> None:
        """Send a record that another one, of the peer that it is for, has called forth."""
        if self._closed:
            return
        value = getattr(record, "v", UNSET)
        weight = 0 if value is UNSET else weight_of(value)
        if self._owed >= MOST_OWED or self._owed_weight + weight > MOST_OWED_WEIGHT:
            self._drop(record)
        elif self._add(record, recipient, weight):
            self._owed += 1
            self._owed_weight += weight
            self._wake()

    def _add(
        self,
        record: Record,
        recipient: str | None,
        weight: int = -1,
        token: Any = None,
        route: Any = None,
    ) -> bool:
        """Have a record sent; return false if there is no room for it."""
        if len(self._waiting) >= MOST:
            self._drop(record)
            return False
        envelope = Envelope(record, None, recipient, token=token, route=route)
        self._waiting.append((envelope, weight))
        return True

    def _drop(self, record: Record) -> None:
        self.dropped += 1
        more = self._drops.admit(monotonic(), "counted only")
        if more is not None:
            what, count = type(record).__name__, len(self._waiting)
            logger.warning("a %s was thrown away: %d records wait to be sent%s", what, count, more)

    def _take(self) -> Envelope:
        envelope, weight = self._waiting.popleft()
        if weight >= 0:
            self._owed -= 1
            self._owed_weight -= weight
        return envelope

    def release(
        self, callback_id: str, owner: str | None, request_id: str, ahead: Ahead | None = None
    ) -> None:
        """Tell the owner of a callback that it won't be called again. From any thread."""
        if not self._closed:
            self._released.append((callback_id, owner, request_id, ahead))
            self._collect_soon()

    def abandon(self, consumer: Consumer) -> None:
        """End a stream at the reading side. From any thread."""
        if not self._closed and not consumer.finished:
            self._abandoned.append(consumer)
            self._collect_soon()

    def _wake(self) -> None:
        if self._filled is not None:
            self._filled.set()

    def _collect_soon(self) -> None:
        if not self._collecting and self._soon is not None:
            self._collecting = True
            self._soon(self._look)

    def _look(self) -> None:
        """Look at what the garbage collector left; the task may be held up for long by a write."""
        if not self._sending:
            self._wake()
            return
        try:
            self._collect()
        except Exception:
            logger.exception("what nobody reads any more could not be ended")

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            self._filled = Event()
            self._collect()
            while self._waiting:
                envelope = self._take()
                self._sending = True
                try:
                    await self._transport.send(envelope)
                except Exception as exc:  # what can't be sent is no reason to end the channel
                    if not self._closed:
                        what = type(envelope.record).__name__
                        logger.warning("a %s was not sent: %r", what, exc)
                finally:
                    self._sending = False
            if not (self._released or self._abandoned):
                await self._filled.wait()

    def _collect(self) -> None:
        """Turn what the garbage collector left behind into records."""
        self._collecting = False
        while self._abandoned:
            consumer = self._abandoned.popleft()
            record = self._conversation.leave(consumer)
            if consumer.driver is not None:
                consumer.driver.left()
            if record is not None:
                self._add(record, consumer.producer)
        by_owner: dict[str | None, tuple[list[str], list[str]]] = {}
        while self._released:
            callback_id, owner, request_id, ahead = self._released.popleft()
            if ahead is not None:
                self._conversation.end_callback(ahead)
            ids, calls = by_owner.setdefault(owner, ([], []))
            ids.append(callback_id)
            calls.append(request_id)
        for owner, (ids, calls) in by_owner.items():
            self._add(CallbackRelease(ids, q=calls), owner)

    async def finish(self, seconds: float) -> None:
        """Send what is left, as far as that takes no longer."""
        self._collect()
        if not self._waiting:
            return
        with move_on_after(seconds, shield=True):
            try:
                while self._waiting:
                    await self._transport.send(self._take())
            except Exception as exc:
                logger.info("the other side was not told all of the end: %r", exc)

    def close(self) -> None:
        """Throw away what is left, and take no more."""
        self._closed = True
        self._waiting.clear()
        self._owed = self._owed_weight = 0
