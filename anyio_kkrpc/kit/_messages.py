"""All of a transport over something that carries messages, but for reading and writing them."""

from __future__ import annotations

import logging
import sys
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from typing import final

from anyio import (
    AsyncContextManagerMixin,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    Event,
    create_task_group,
    current_time,
    move_on_after,
    sleep,
)
from msgspec import Struct

from .._exceptions import (
    OverloadedError,
    TransportClosedError,
    TransportConnectionError,
)
from .._runtime._entrance import Entrance
from .._runtime._fresh import fresh_copy
from .._runtime._lone import lone_error
from .._spoken._base import DialectName
from .._spoken._dialogue import Dialogue
from ..abc import Capabilities, Envelope, Listener, Transport
from ..codecs import get_codec
from ..codecs._weight import LARGE, Scales
from ..records import CallbackRelease, Record, Reply, Request
from ._carrying import CarryingOptions
from ._inbound import Inbound, refusal
from ._options import check, takes
from ._outgoing import HIGH_WATER, Outgoing
from ._queue import BoundedQueue, QueueStatistics

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("MessageStatistics", "MessageTransport", "Messages")

logger: logging.Logger = logging.getLogger("anyio_kkrpc")

CLOSE_TIMEOUT = 2.0
# Bytes that may wait for a peer that is told of refusals and the like, and reads too slowly.
MOST_UNREAD = 16 * 1024 * 1024


class MessageStatistics(Struct, frozen=True):
    """What `Messages` have done and hold.

    :ivar queue: of requests that wait for a handler
    :ivar sent: messages written
    :ivar received: messages read
    :ivar invalid: messages that held no valid record, and were skipped
    :ivar oversized: messages larger than ``max_message_size``, which were skipped
    """

    queue: QueueStatistics
    sent: int
    received: int
    invalid: int
    oversized: int


@dataclass(frozen=True, kw_only=True, repr=False)
class MessagesOptions(CarryingOptions):
    """All that `Messages` take."""

    write: Callable[[list[bytes]], Awaitable[object]] = field(kw_only=False)
    close: Callable[[], Awaitable[object]] = field(kw_only=False)
    name: str = "transport"


@final
class Messages:
    """Carries records to one peer and back, each as a message of bytes that comes whole, in order.

    It knows how the peer is spoken to, lets requests wait, refuses those that find no room, and
    paces streams to kkrpc 0.x. Its owner is a `Transport`, which reads messages and hands each to
    `take`, and hands over its other methods: ``capabilities``, ``send``, ``settle`` and ``aclose``
    to those of the same name, ``listen`` and ``receive`` to those of ``inbound``. The rest of a
    `Transport` may be left as it is.

    :param write: writes messages, in their order; never called twice at a time. Whoever is
        cancelled lets it finish first.
    :param close: closes what carries them, as `anyio.abc.AsyncResource.aclose` does: more than
        once is harmless, and in a cancelled scope it closes at once
    :param codec: ``"json"``, ``"cbor"`` or a `Codec`; both sides need the same
    :param dialect: how this side begins: ``"native"``, or as a TypeScript peer does: ``"kkrpc-2"``,
        ``"kkrpc-0"``. To a peer of kkrpc 0.x that begins, this side speaks as it does.
    :param superjson: with ``"kkrpc-0"``, whether this side writes superjson; if not, JSON
    :param max_message_size: bytes of one message, sent or received
    :param max_queue_size: requests that may wait for a handler
    :param max_queue_bytes: their size together, in bytes; of one over 4 KiB, what it weighs decoded
    :param overflow: which request is refused when the queue is full: ``"drop_newest"`` or
        ``"drop_oldest"``
    :param write_timeout: seconds that a write may take before the connection is given up
    :param name: what it is, for errors and the names of tasks
    :ivar inbound: what came
    :ivar received: messages read
    :ivar invalid: messages that held no valid record, and were skipped
    :raises ValueError: if an option is out of range; the text names it
    :raises TypeError: if an option has the wrong type
    """

    @takes(MessagesOptions, check)
    def __init__(self, options: MessagesOptions) -> None:
        self._entrance = Entrance(options.name)
        self._name = options.name
        self._close = options.close
        self._max_size = options.max_message_size
        bounds = options.max_queue_size, options.max_queue_bytes
        self._queue: BoundedQueue[Envelope] = BoundedQueue(
            *bounds, options.overflow, on_drop=self._refuse
        )
        self.inbound: Inbound = Inbound(self._queue)
        self._dialogue = Dialogue(
            options.dialect,
            get_codec(options.codec),
            superjson=options.superjson,
            deliver=lambda record, _: self.inbound.deliver(Envelope(record)),
            now=current_time,
            max_items=options.max_queue_size,
            max_bytes=options.max_queue_bytes,
        )
        self._outgoing = Outgoing(options.write, self._failed, timeout=options.write_timeout)
        self._busy = Event()
        self._open = False
        self.received: int = 0
        self.invalid: int = 0
        self._oversized = 0

    @property
    def capabilities(self) -> Capabilities:
        """What can be carried, as the peer is spoken to now."""
        native = self._dialogue.spoken.native
        return Capabilities(keyword_arguments=native, cancellation=native, deadlines=native)

    @property
    def dialect(self) -> DialectName:
        """How the peer is spoken to now."""
        return self._dialogue.spoken.dialect

    def statistics(self) -> MessageStatistics:
        """Return what was done, and what is held."""
        return MessageStatistics(
            queue=self._queue.statistics(),
            sent=self._outgoing.sent,
            received=self.received,
            invalid=self.invalid,
            oversized=self._oversized,
        )

    # Lifecycle

    @asynccontextmanager
    async def running(self, read: Callable[[], Awaitable[object]]) -> AsyncGenerator[None, None]:
        """Run all tasks while the ``async with`` block lasts, and close in the end.

        :param read: reads for ever, and gives each message to `take`. When it returns, or raises
            `~anyio.EndOfStream`, the peer has ended the connection; other errors have broken it.
        :raises RuntimeError: if it is entered a second time
        """
        self._entrance.enter()
        self._open = self.inbound.ended_reason is None
        with lone_error():
            async with create_task_group() as tasks:
                self._outgoing.start(tasks, f"anyio_kkrpc {self._name} writer")
                tasks.start_soon(self._read, read, name=f"anyio_kkrpc {self._name} reader")
                tasks.start_soon(self._go_on, name=f"anyio_kkrpc {self._name} pacing")
                try:
                    yield
                finally:
                    await self.aclose()
                    tasks.cancel_scope.cancel()

    async def aclose(self) -> None:
        """Write what waits, as far as that is done in 2 seconds, and close. Idempotent."""
        first = self.inbound.ended_reason is None
        if first and self._open:
            for said, _ in self._dialogue.spoken.due(inf):
                self._post(said)
        self._open = False
        self.inbound.end(TransportClosedError("the transport has been closed"))
        try:
            if first:
                with move_on_after(CLOSE_TIMEOUT, shield=True):
                    await self._outgoing.drain()
                    await self._close()
        except Exception as exc:
            # TLS says so when the other side is gone without a farewell: it is closed all the same.
            logger.debug("the stream was closed with an error: %r", exc)
        finally:
            self._outgoing.stop()
            await self._close_at_once()

    async def _close_at_once(self) -> None:
        with CancelScope() as scope:
            scope.cancel()
            await self._close()

    def _end(self, reason: Exception) -> None:
        self._open = False
        self.inbound.end(reason)
        self._outgoing.clear()

    def _broken(self, exc: BaseException) -> None:
        error = TransportConnectionError(f"the connection was lost: {exc or type(exc).__name__}")
        error.__cause__ = exc
        self._end(error)

    async def _failed(self, exc: BaseException) -> None:
        self._broken(exc)
        await self._close_at_once()

    def _closed_error(self) -> Exception:
        reason = self.inbound.ended_reason
        if not self._entrance.used or reason is None:
            return RuntimeError("the transport has not been entered: use 'async with'")
        if isinstance(reason, EndOfStream):
            return TransportClosedError("the other side has closed the connection")
        return fresh_copy(reason)

    # Receiving

    async def _read(self, read: Callable[[], Awaitable[object]]) -> None:
        try:
            await read()
            self._end(EndOfStream())
        except EndOfStream as exc:
            self._end(exc)
        except ClosedResourceError:
            self._end(TransportClosedError("the transport has been closed"))
        except Exception as exc:
            self._broken(exc)

    def take(self, message: bytes) -> None:
        """Take a message that came; one that is too large or isn't valid is counted and logged."""
        size = weight = len(message)
        if size > self._max_size:
            self._oversized += 1
            logger.warning(
                "skipped a message larger than max_message_size (%d bytes)", self._max_size
            )
            return
        try:
            if size > LARGE:
                with Scales() as scales:
                    record = self._dialogue.decode(message)
                weight = scales.weight(size)
            else:
                record = self._dialogue.decode(message)
        except Exception as exc:  # a codec of the user's may keep no promise, and ends no reader
            self.invalid += 1
            logger.warning("skipped a frame of %d bytes: %s", size, exc)
            return
        self.received += 1
        spoken = self._dialogue.spoken
        taken: Record | None = record
        if spoken.native:
            pass
        elif isinstance(record, Request):
            spoken.begin(record, None)
        else:
            taken = spoken.take(record, None, size)
            for said, _ in spoken.due(current_time()):
                self._post(said)
        if taken is not None:
            self.inbound.deliver(Envelope(taken), weight)
        if self._outgoing.posted > MOST_UNREAD:
            raise OverloadedError("the peer doesn't read what it is told, and goes on asking")

    def _refuse(self, envelope: Envelope) -> None:
        reply = refusal(envelope)
        if reply is not None:
            self._post(reply)

    def _post(self, record: Record) -> None:
        message = self._encode(record)
        if message is not None:
            self._outgoing.post(message)

    # Sending

    async def send(self, item: Envelope) -> None:
        """Send a record; see `Transport.send`."""
        if not self._open:
            raise self._closed_error()
        message = self._encode(item.record)
        if message is None:
            return
        if item.record.__class__ is CallbackRelease and self._outgoing.posted < HIGH_WATER:
            self._outgoing.post(message)  # those of one turn leave in one write
            return
        await self._outgoing.send(message)
        if not self._open and isinstance(self.inbound.ended_reason, TransportConnectionError):
            raise self._closed_error()

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Send the reply to a request, if there is one; see `Transport.settle`."""
        if reply is None:
            return
        request, record, spoken = envelope.record, reply.record, self._dialogue.spoken
        if not spoken.native and isinstance(request, Request) and isinstance(record, Reply):
            reply.record = spoken.answer(request, record)
        await self.send(reply)

    def _encode(self, record: Record) -> bytes | None:
        """Return the message of a record; ``None`` if there is nothing to be said now."""
        spoken = self._dialogue.spoken
        message = spoken.encode(record, None)
        if not spoken.native and spoken.busy:
            self._busy.set()
        if message is not None and len(message) > self._max_size:
            raise OverloadedError(
                f"a message of {len(message)} bytes exceeds max_message_size "
                f"({self._max_size} bytes)"
            )
        return message

    async def _go_on(self) -> None:
        """Send what time brings, as long as there is a stream or a callback that needs it."""
        while True:
            await self._busy.wait()
            self._busy = Event()
            while (spoken := self._dialogue.spoken).busy and self.inbound.ended_reason is None:
                spoken.tick()
                for record, _ in spoken.due(current_time()):
                    try:
                        await self.send(Envelope(record))
                    except (TransportClosedError, TransportConnectionError):
                        return
                await sleep(spoken.pause)


class MessageTransport(  # type: ignore[misc]  # both bases define __aexit__
    AsyncContextManagerMixin, Transport
):
    """Hands over to `Messages`; who derives from it reads, writes and closes.

    :param messages: carry its records
    """

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        # Each step counts here, so what is handed on isn't stepped through.
        self.send = messages.send  # type: ignore[method-assign]
        self.settle = messages.settle  # type: ignore[method-assign]
        self.receive = messages.inbound.receive  # type: ignore[method-assign]

    @property
    def capabilities(self) -> Capabilities:
        """What this transport can carry between its two peers."""
        return self._messages.capabilities

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        async with self._messages.running(self._read):
            yield self

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        """Hand what isn't a request to ``listener``; see `Transport.listen`."""
        self._messages.inbound.listen(listener, serve=serve)

    async def receive(self) -> Envelope:
        """Return the next request; without a listener, the next record of any kind."""
        return await self._messages.inbound.receive()

    async def send(self, item: Envelope) -> None:
        """Send a record; see `Transport.send`. A message is sent whole, whoever is cancelled."""
        await self._messages.send(item)

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Send the reply to a request, if there is one."""
        await self._messages.settle(envelope, reply)

    @abstractmethod
    async def _read(self) -> None:
        """Read for ever, and give each message to `Messages.take`; see `Messages.running`."""
