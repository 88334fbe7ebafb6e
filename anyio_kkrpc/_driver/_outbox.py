"""What a channel sends without waiting, and what the garbage collector has left behind."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from anyio import Event, move_on_after

from .._protocol._ahead import Ahead
from .._protocol._conversation import Conversation
from .._protocol._records import CallbackRelease, Record
from .._protocol._streams import Consumer
from .._runtime._clock import scheduler
from ..abc import Envelope, Transport

logger = logging.getLogger("anyio_kkrpc")


class Outbox:
    """Sends records one after the other, from one task, for those who can't wait.

    Before it was opened nothing is sent, and after it was closed nothing is taken.
    """

    def __init__(self, peer: Conversation, transport: Transport) -> None:
        self._conversation = peer
        self._transport = transport
        self._waiting: deque[Envelope] = deque()
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

    def post(self, record: Record, recipient: str | None, token: Any = None) -> None:
        """Send a record.

        :param token: see `Envelope.token`
        """
        if not self._closed:
            self._waiting.append(Envelope(record, None, recipient, token=token))
            self._wake()

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
            self._soon(self._wake)

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            self._filled = Event()
            self._collect()
            while self._waiting:
                envelope = self._waiting.popleft()
                try:
                    await self._transport.send(envelope)
                except Exception as exc:  # what can't be sent is no reason to end the channel
                    if not self._closed:
                        what = type(envelope.record).__name__
                        logger.warning("a %s was not sent: %r", what, exc)
            if not (self._released or self._abandoned):
                await self._filled.wait()

    def _collect(self) -> None:
        """Turn what the garbage collector left behind into records."""
        self._collecting = False
        while self._abandoned:
            consumer = self._abandoned.popleft()
            record = self._conversation.leave(consumer)
            if consumer.handle is not None:
                consumer.handle.left()
            if record is not None:
                self._waiting.append(Envelope(record, None, consumer.producer))
        by_owner: dict[str | None, tuple[list[str], list[str]]] = {}
        while self._released:
            callback_id, owner, request_id, ahead = self._released.popleft()
            if ahead is not None:
                self._conversation.end_callback(ahead)
            ids, calls = by_owner.setdefault(owner, ([], []))
            ids.append(callback_id)
            calls.append(request_id)
        for owner, (ids, calls) in by_owner.items():
            self._waiting.append(Envelope(CallbackRelease(ids, q=calls), None, owner))

    async def finish(self, seconds: float) -> None:
        """Send what is left, as far as that takes no longer."""
        self._collect()
        if not self._waiting:
            return
        with move_on_after(seconds, shield=True):
            try:
                while self._waiting:
                    await self._transport.send(self._waiting.popleft())
            except Exception as exc:
                logger.info("the other side was not told all of the end: %r", exc)

    def close(self) -> None:
        """Throw away what is left, and take no more."""
        self._closed = True
        self._waiting.clear()
