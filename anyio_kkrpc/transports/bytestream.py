"""RPC over any byte stream: TCP, TLS, Unix sockets, pipes."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal, final, get_args

import anyio
from anyio import (
    AsyncContextManagerMixin,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    Event,
    aclose_forcefully,
    current_time,
    move_on_after,
    sleep,
)
from anyio.abc import AnyByteStream, TaskGroup
from msgspec import Struct

from .._exceptions import (
    OverloadedError,
    ProtocolError,
    TransportClosedError,
    TransportConnectionError,
)
from .._protocol._records import CallbackRelease, Record, Reply, Request
from .._runtime._entrance import Entrance
from .._runtime._fresh import fresh_copy
from .._runtime._lone import lone_error
from .._wire_errors import library_error
from ..abc import Capabilities, Codec, Envelope, Listener, Transport
from ..codecs import get_codec
from ..codecs._weight import LARGE, Scales
from ..kit._inbound import Inbound
from ..kit._queue import BoundedQueue, Overflow, QueueStatistics
from ..typescript import classic, compact
from ..typescript._pacing import Pacing
from ..typescript._releases import DELAY, Releases
from ..typescript._streams import ClassicStreams
from ._framing import Framing, LengthFraming, LineFraming

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("ByteStreamStatistics", "ByteStreamTransport")

logger: logging.Logger = logging.getLogger("anyio_kkrpc")

# Bytes that wait for a write under way before those who add more wait too.
HIGH_WATER = 1024 * 1024
READ_SIZE = 64 * 1024
CLOSE_TIMEOUT = 2.0
# Items that all streams to a kkrpc 0.x peer may send in 20 ms. Here the other side can slow us
# down, so this is only so that one stream doesn't hold up everything else.
_ITEMS_PER_TICK = 1000

Dialect = Literal["native", "kkrpc-2", "kkrpc-0"]


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
    :param dialect: how this side begins: ``"native"``, or as a TypeScript peer does: ``"kkrpc-2"``,
        ``"kkrpc-0"``. To a peer of kkrpc 0.x that begins, this side speaks as it does.
    :param superjson: with ``"kkrpc-0"``, whether this side writes superjson; if not, JSON
    :param max_message_size: bytes of one encoded record, sent or received
    :param max_queue_size: requests that may wait for a handler
    :param max_queue_bytes: their size together, in bytes; of one over 4 KiB, what it weighs decoded
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
        dialect: Dialect = "native",
        superjson: bool = True,
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
        if dialect not in get_args(Dialect):
            raise ValueError(f"dialect: one of {', '.join(get_args(Dialect))}, not {dialect!r:.80}")
        if not isinstance(superjson, bool):
            raise TypeError(f"superjson: needs a bool, not {superjson!r:.80}")
        self._entrance = Entrance("ByteStreamTransport")
        self._stream = stream
        self._codec = get_codec(codec)
        if dialect != "native" and self._codec.name != "json":
            raise ValueError(f"codec: peers of dialect {dialect!r} have JSON only")
        self._dialect: Dialect = dialect
        self._reads_lines = self._codec.name == "json"
        self._max_size = max_message_size
        self._write_timeout = write_timeout
        if dialect == "kkrpc-2":
            self._codec = compact.CompactCodec()
        self._classic = classic.ClassicCodec(superjson=superjson)
        kind = LineFraming if self._reads_lines else LengthFraming
        self._framing: Framing = kind(max_message_size)
        self._queue: BoundedQueue[Envelope] = BoundedQueue(
            max_queue_size, max_queue_bytes, overflow, on_drop=self._refuse
        )
        self._inbound = Inbound(self._queue)
        self._streams = ClassicStreams(
            lambda record, _: self._inbound.deliver(Envelope(record)),
            items_per_tick=_ITEMS_PER_TICK,
            max_items=max_queue_size,
            max_bytes=max_queue_bytes,
        )
        self._pacing = Pacing(self._streams, self._inbound)
        self._releasing = self._writing = False
        self._releases = Releases()
        self._group: TaskGroup | None = None
        self._writer_scope: CancelScope | None = None
        self._outgoing: list[bytes] = []
        self._outgoing_size = 0
        self._handed_over = Event()
        self._room: Event | None = None
        self._sent = self._received = self._invalid = 0

    @property
    def capabilities(self) -> Capabilities:
        """What this transport can carry between its two peers."""
        native = self._dialect == "native"
        return Capabilities(keyword_arguments=native, cancellation=native, deadlines=native)

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
        self._entrance.enter()
        self._writer_scope = CancelScope(shield=True)
        with lone_error():
            async with anyio.create_task_group() as self._group:
                self._pacing.group = self._group
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
        raise fresh_copy(reason)

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
        size = len(payload)
        try:
            if size > LARGE:
                with Scales() as scales:
                    record = self._decode(payload)
                size = scales.weight(size)
            else:
                record = self._decode(payload)
        except Exception as exc:  # a codec of the user's may keep no promise, and ends no reader
            self._invalid += 1
            logger.warning("skipped a frame of %d bytes: %s", len(payload), exc)
            return
        self._received += 1
        if self._dialect == "kkrpc-2" and isinstance(record, Request):
            self._releases.received(record, None)
        taken: Record | None = record
        if self._dialect == "kkrpc-0" and not isinstance(record, Request):
            taken = self._streams.incoming(record, None, len(payload))
            while self._streams.to_send:
                self._queue_unasked(self._streams.to_send.popleft()[0])
        if taken is not None:
            self._inbound.deliver(Envelope(taken), size)

    def _decode(self, payload: bytes) -> Record:
        """Decode a frame, in JSON of any dialect. A kkrpc 0.x peer is recognized by its own."""
        if not self._reads_lines:
            return self._codec.decode(payload)
        if self._dialect != "kkrpc-0":
            try:
                return self._codec.decode(payload)
            except ProtocolError:
                if b'"type"' not in payload:
                    raise
        record = self._classic.decode(payload)
        rich = payload.startswith(classic.SUPERJSON)
        if isinstance(record, Request) and (
            self._dialect != "kkrpc-0" or rich is not self._classic.superjson
        ):
            self._dialect = "kkrpc-0"
            self._classic = classic.ClassicCodec(superjson=rich)
        return record

    def _refuse(self, envelope: Envelope) -> None:
        """A request found no room: its caller is told."""
        record = envelope.record
        if isinstance(record, Request) and record.o is not True:
            error = OverloadedError("the queue of requests is full; the request did not run")
            self._queue_unasked(Reply(record.id, e=library_error(error)))

    def _queue_unasked(self, record: Record) -> None:
        """Write a record from the reader, which must not wait: the writer task does it."""
        frame = self._encode(record)
        if frame is None:
            return
        self._queue_frame(frame)
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
        record = item.record
        if isinstance(record, CallbackRelease) and self._is_to_wait(record):
            self._release_later(record)
            return
        frame = self._encode(record)
        if frame is None:
            return
        self._queue_frame(frame)
        if self._streams.busy:
            self._pacing.go_on()
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

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Send the reply to a request, if there is one."""
        if reply is None:
            return
        request, record = envelope.record, reply.record
        if self._dialect != "native" and isinstance(request, Request) and isinstance(record, Reply):
            answer = compact if self._dialect == "kkrpc-2" else classic
            reply.record = answer.answer_unknown(request, record)
        await self.send(reply)

    def _is_to_wait(self, record: CallbackRelease) -> bool:
        return self._dialect == "kkrpc-2" and record.all is not True

    def _release_later(self, record: CallbackRelease) -> None:
        self._releases.released(record.ids, None, current_time())
        if not self._releasing and self._group is not None:
            self._releasing = True
            self._group.start_soon(self._send_releases, name="anyio_kkrpc byte stream releases")

    async def _send_releases(self) -> None:
        try:
            while self._releases.pending and self._inbound.ended_reason is None:
                for ids in self._releases.due(current_time()).values():
                    await self.send(Envelope(CallbackRelease(ids, all=True)))
                await sleep(DELAY / 10)
        except (TransportClosedError, TransportConnectionError):
            return
        finally:
            self._releasing = False

    def _encode(self, record: Record) -> bytes | None:
        """Return the frame of a record; ``None`` if the other side knows nothing of the kind."""
        if self._dialect == "kkrpc-0":
            payload = self._encode_classic(record)
        else:
            payload = self._codec.encode(record)
        if not payload:
            return None
        if len(payload) > self._max_size:
            raise OverloadedError(
                f"a message of {len(payload)} bytes exceeds max_message_size "
                f"({self._max_size} bytes)"
            )
        return self._framing.wrap(payload)

    def _encode_classic(self, record: Record) -> bytes:
        if isinstance(record, Request):
            payload = self._classic.encode(record)  # first: what can't be sent isn't waited for
            self._streams.outgoing(record, None)
            return payload
        outgoing = self._streams.outgoing(record, None)
        return b"" if outgoing is None else self._classic.encode(outgoing)

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
