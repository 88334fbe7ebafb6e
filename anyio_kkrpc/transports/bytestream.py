"""RPC over any byte stream: TCP, TLS, Unix sockets, pipes."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import final

import anyio
from anyio import (
    AsyncContextManagerMixin,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    Event,
    aclose_forcefully,
    move_on_after,
)
from anyio.abc import AnyByteStream, TaskGroup
from msgspec import Struct

from .._errors_wire import library_error
from .._exceptions import (
    OverloadedError,
    ProtocolError,
    TransportClosedError,
    TransportConnectionError,
)
from .._groups import lone_error
from .._inbound import Inbound
from .._protocol._records import Reply, Request
from .._queue import BoundedQueue, Overflow, QueueStatistics
from ..abc import Capabilities, Codec, Envelope, Listener, Transport
from ..codecs import get_codec
from ._framing import Framing, LengthFraming, LineFraming

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("ByteStreamStatistics", "ByteStreamTransport")

logger = logging.getLogger("anyio_kkrpc")

# Bytes that wait for a write under way before those who add more wait too.
HIGH_WATER = 1024 * 1024
READ_SIZE = 64 * 1024
CLOSE_TIMEOUT = 2.0


class ByteStreamStatistics(Struct, frozen=True):
    """What a `ByteStreamTransport` has done and holds.

    :ivar queue: of requests that wait for a handler
    :ivar sent: records written
    :ivar received: records read
    :ivar invalid: frames that held no valid record, and were skipped
    :ivar oversized: frames larger than ``max_message_size``, which were skipped unread
    """

    queue: QueueStatistics
    sent: int
    received: int
    invalid: int
    oversized: int


@final
class ByteStreamTransport(  # type: ignore[misc]  # both bases define __aexit__
    AsyncContextManagerMixin, Transport
):
    """Carries records over a byte stream: JSON in lines, as kkrpc's stdio, or CBOR with lengths.

    It is an async context manager that owns the stream. Reading goes on while requests wait, so
    that replies behind them aren't held up; a request that finds no room is answered with
    `OverloadedError`.

    :param stream: any AnyIO byte stream
    :param codec: ``"json"``, ``"cbor"`` or a `Codec`; both sides need the same
    :param max_message_size: bytes of one encoded record, sent or received
    :param max_queue_size: requests that may wait for a handler
    :param max_queue_bytes: their size together, in bytes
    :param overflow: which request is refused when the queue is full: ``"drop_newest"`` or
        ``"drop_oldest"``
    :param write_timeout: seconds that the other side may take no data before this one gives up
    :raises ValueError: if an option is out of range; the text names it
    :raises TypeError: if an option has the wrong type
    """

    def __init__(
        self,
        stream: AnyByteStream,
        *,
        codec: str | Codec = "json",
        max_message_size: int = 16 * 1024 * 1024,
        max_queue_size: int = 1000,
        max_queue_bytes: int = 64 * 1024 * 1024,
        overflow: Overflow = "drop_newest",
        write_timeout: float = 10.0,
    ) -> None:
        if overflow == "block":
            raise ValueError("overflow: 'block' would hold up replies behind the requests")
        if isinstance(max_message_size, bool) or not isinstance(max_message_size, int):
            raise TypeError(f"max_message_size: needs an int, not {max_message_size!r:.80}")
        if not 0 < max_message_size < 1 << 32:
            raise ValueError(f"max_message_size: from 1 to 2**32 - 1, not {max_message_size}")
        if isinstance(write_timeout, bool) or not isinstance(write_timeout, (int, float)):
            raise TypeError(f"write_timeout: needs seconds, not {write_timeout!r:.80}")
        if not write_timeout > 0:
            raise ValueError(f"write_timeout: must be positive, not {write_timeout}")
        self._stream = stream
        self._codec = get_codec(codec)
        self._max_size = max_message_size
        self._write_timeout = write_timeout
        kind = LineFraming if self._codec.name == "json" else LengthFraming
        self._framing: Framing = kind(max_message_size)
        self._queue: BoundedQueue[Envelope] = BoundedQueue(
            max_queue_size, max_queue_bytes, overflow, on_drop=self._refuse
        )
        self._inbound = Inbound(self._queue)
        self._group: TaskGroup | None = None
        self._writer_scope: CancelScope | None = None
        self._outgoing: list[bytes] = []
        self._outgoing_size = 0
        self._writing = False
        self._handed_over = Event()
        self._room: Event | None = None
        self._sent = 0
        self._received = 0
        self._invalid = 0

    @property
    def capabilities(self) -> Capabilities:
        """What this transport can carry: everything, between two peers."""
        return Capabilities()

    def statistics(self) -> ByteStreamStatistics:
        """Return what it has done and holds."""
        return ByteStreamStatistics(
            queue=self._queue.statistics(),
            sent=self._sent,
            received=self._received,
            invalid=self._invalid,
            oversized=self._framing.oversized,
        )

    # Lifecycle

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        if self._group is not None:
            raise RuntimeError("a transport can be entered once; make a new one")
        self._writer_scope = CancelScope(shield=True)
        with lone_error():
            async with anyio.create_task_group() as self._group:
                self._group.start_soon(self._read, name="anyio_kkrpc byte stream reader")
                self._group.start_soon(self._go_on_writing, name="anyio_kkrpc byte stream writer")
                try:
                    yield self
                finally:
                    await self.aclose()
                    self._group.cancel_scope.cancel()

    async def aclose(self) -> None:
        """Write what waits, as far as that is quick, and close the stream. Idempotent."""
        first = self._inbound.ended_reason is None
        self._inbound.end(TransportClosedError("the transport has been closed"))
        try:
            if first:
                with move_on_after(CLOSE_TIMEOUT, shield=True):
                    while self._writing:
                        self._room = Event()
                        await self._room.wait()
                    await self._stream.aclose()
        except Exception as exc:
            # TLS says so when the other side is gone without a farewell: it is closed all the same.
            logger.debug("the stream was closed with an error: %r", exc)
        finally:
            if self._writer_scope is not None:
                self._writer_scope.cancel()
            await aclose_forcefully(self._stream)

    def _end(self, reason: Exception) -> None:
        self._inbound.end(reason)
        self._outgoing.clear()
        self._outgoing_size = 0
        self._notify_room()

    def _broken(self, exc: BaseException) -> None:
        error = TransportConnectionError(f"the connection was lost: {exc or type(exc).__name__}")
        error.__cause__ = exc
        self._end(error)

    def _check_open(self) -> None:
        reason = self._inbound.ended_reason
        if self._group is None:
            raise RuntimeError("the transport has not been entered: use 'async with'")
        if reason is None:
            return
        if isinstance(reason, EndOfStream):
            raise TransportClosedError("the other side has closed the connection")
        error = type(reason)(*reason.args)
        error.__cause__ = reason.__cause__
        raise error

    # Receiving

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        """Hand what isn't a request to ``listener``; see `Transport.listen`."""
        self._inbound.listen(listener, serve=serve)

    async def receive(self) -> Envelope:
        """Return the next request; without a listener, the next record of any kind."""
        return await self._inbound.receive()

    async def _read(self) -> None:
        try:
            while True:
                data = await self._stream.receive(READ_SIZE)  # type: ignore[call-arg]
                before = self._framing.oversized
                for payload in self._framing.feed(data):
                    self._take(payload)
                if self._framing.oversized > before:
                    logger.warning(
                        "skipped a message larger than max_message_size (%d bytes)", self._max_size
                    )
        except EndOfStream as exc:
            self._end(exc)
        except ClosedResourceError:
            self._end(TransportClosedError("the transport has been closed"))
        except Exception as exc:
            self._broken(exc)

    def _take(self, payload: bytes) -> None:
        try:
            record = self._codec.decode(payload)
        except ProtocolError as exc:
            self._invalid += 1
            logger.warning("skipped a frame of %d bytes: %s", len(payload), exc)
            return
        self._received += 1
        self._inbound.deliver(Envelope(record), len(payload))

    def _refuse(self, envelope: Envelope) -> None:
        """A request found no room: its caller is told."""
        record = envelope.record
        if isinstance(record, Request) and record.o is not True:
            error = OverloadedError("the queue of requests is full; the request did not run")
            self._queue_frame(self._encode(Reply(record.id, e=library_error(error))))
            if not self._writing:
                self._writing = True
                self._handed_over.set()

    # Sending

    async def send(self, item: Envelope) -> None:
        """Write a record; see `Transport.send`.

        Whoever has something to write writes at once, unless a write is under way, whose task then
        takes it along. A frame is never torn: a sender that is cancelled finishes its write first.
        """
        self._check_open()
        self._queue_frame(self._encode(item.record))
        if not self._writing:
            self._writing = True
            await self._write()
            if self._outgoing:
                self._handed_over.set()
            else:
                self._writing = False
        while self._outgoing_size > HIGH_WATER:
            if self._room is None:
                self._room = Event()
            await self._room.wait()
        if isinstance(self._inbound.ended_reason, TransportConnectionError):
            self._check_open()

    def _encode(self, record: object) -> bytes:
        payload = self._codec.encode(record)  # type: ignore[arg-type]
        if len(payload) > self._max_size:
            raise OverloadedError(
                f"a message of {len(payload)} bytes exceeds max_message_size "
                f"({self._max_size} bytes)"
            )
        return self._framing.wrap(payload)

    def _queue_frame(self, frame: bytes) -> None:
        self._sent += 1
        self._outgoing.append(frame)
        self._outgoing_size += len(frame)

    async def _write(self) -> None:
        data = self._next_batch()
        try:
            with move_on_after(self._write_timeout, shield=True) as scope:
                await self._stream.send(data)
            if scope.cancelled_caught:
                raise TimeoutError(f"it took no data for {self._write_timeout:g} seconds")
            self._outgoing_size -= len(data)
            self._notify_room()
        except BaseException as exc:
            # How much was written isn't known, so nothing can follow it.
            self._broken(exc)
            await aclose_forcefully(self._stream)
            if not isinstance(exc, Exception):
                raise

    def _next_batch(self) -> bytes:
        size = count = 0
        for frame in self._outgoing:
            size += len(frame)
            count += 1
            if size >= HIGH_WATER:
                break
        data = b"".join(self._outgoing[:count])
        del self._outgoing[:count]
        return data

    async def _go_on_writing(self) -> None:
        """Write what came up while another task wrote. Goes on while the transport is closed."""
        assert self._writer_scope is not None
        with self._writer_scope:
            while True:
                await self._handed_over.wait()
                self._handed_over = Event()
                while self._outgoing:
                    await self._write()
                self._writing = False
                self._notify_room()

    def _notify_room(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None
