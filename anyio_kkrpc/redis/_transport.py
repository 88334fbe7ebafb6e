"""The Redis Streams transport: options, connections, readers and writer put together."""

from __future__ import annotations

import logging
import ssl
import sys
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, final

import anyio
from anyio import (
    AsyncContextManagerMixin,
    CancelScope,
    Event,
    aclose_forcefully,
    current_time,
    move_on_after,
)
from anyio.abc import TaskGroup
from msgspec import Struct
from redis.exceptions import RedisError, ResponseError

from .._errors_wire import library_error
from .._exceptions import (
    OverloadedError,
    RPCError,
    TransportClosedError,
    TransportConnectionError,
)
from .._groups import lone_error
from .._inbound import Inbound
from .._protocol._records import Bye, Cancel, Reply, Request
from .._queue import BoundedQueue, QueueStatistics
from ..abc import Capabilities, Codec, Envelope, Listener, Transport
from ._admin import (
    TRIM_ACKNOWLEDGED,
    StreamEntry,
    StreamInfo,
    all_entries,
    stream_info,
    trim,
)
from ._connection import Connection, open_connection
from ._connection import _pack as pack_command
from ._keys import Keys
from ._options import Overflow, check_options
from ._reader import COUNT, Decoder, GroupReader, Reader, create_group, last_id
from ._writer import Writer
from .dialects import Entry, NativeDialect

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

if TYPE_CHECKING:
    from redis.credentials import CredentialProvider

__all__ = ("RedisStatistics", "RedisStreamsTransport")

logger = logging.getLogger("anyio_kkrpc")

DESTROYED = "Redis Streams adapter has been destroyed"
# How long, in seconds, leaving may take to remove this peer's keys.
CLOSE_TIMEOUT = 2.0
# Consumed inbox entries that are deleted together.
_DELETE_BATCH = 128
# Requests sent between two trims, where max_len is larger.
_TRIM_AT_MOST = 1000

# Removes a consumer only if it holds nothing, decided in one step by Redis.
_REMOVE_CONSUMER = b"""
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return -1 end
return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
"""


class RedisStatistics(Struct, frozen=True):
    """What a Redis Streams transport has done and holds.

    :ivar queue: of requests that wait for a handler
    :ivar sent: records written
    :ivar received: records read
    :ivar invalid: entries that could not be read, and were skipped
    :ivar undeliverable: records that Redis refused, or whose recipient was gone
    :ivar outstanding: entries of the group that were taken and not yet acknowledged
    """

    queue: QueueStatistics
    sent: int
    received: int
    invalid: int
    undeliverable: int
    outstanding: int


@final
class RedisStreamsTransport(  # type: ignore[misc]  # both bases define __aexit__
    AsyncContextManagerMixin, Transport
):
    """Carries envelopes over Redis Streams.

    It is an async context manager that owns its connections and tasks; `destroy` ends it early.
    Requests go to the stream. Everything else goes to the inbox of the peer that it is for.

    :param url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with user, password and database
    :param stream: name of the stream (key) for requests
    :param consumer_group: name of the group, with ``use_consumer_group``
    :param consumer_name: this peer's name in the group; ``consumer-{session_id}`` if not given
    :param block_timeout: seconds that one blocking read lasts
    :param max_len: keep about this many requests in the stream; ``None`` keeps all. What a consumer
        group has not acknowledged is never trimmed.
    :param session_id: this peer's id, 26 random characters if not given; unique among all peers
    :param max_queue_size: requests that may wait here for a handler
    :param max_queue_bytes: their size together, in bytes
    :param use_consumer_group: whether requests are shared among the workers of the group, each
        handled by one (at least once); if not, every peer gets every request (broadcast)
    :param allow_self_messages: whether, in broadcast, this peer also gets its own requests
    :param overflow: what happens when the queue is full: ``"drop_oldest"`` (the default in
        broadcast), ``"drop_newest"``, or ``"block"`` (the default in a group), which reads no more
    :param dialect: ``"native"``
    :param codec: ``"json"`` or ``"cbor"`` (or a `Codec`), for what this peer begins; answers are
        encoded as what they answer
    :param max_message_size: bytes of one encoded record, sent or received
    :param honor_destroy_signal: whether another peer's `signal_destroy` ends this one
    :param connect_timeout: seconds to connect within
    :param inbox_ttl: seconds after which the inbox of a peer that vanished is gone
    :param credential_provider: redis-py's, in place of a password in the URL
    :param ssl_context: for ``rediss://``
    :raises ValueError: if an option is out of range; the text names it. Nothing was connected.
    :raises TypeError: if an option has the wrong type
    """

    def __init__(
        self,
        url: str = "redis://localhost:6379",
        *,
        stream: str = "kkrpc-stream",
        consumer_group: str = "kkrpc-group",
        consumer_name: str | None = None,
        block_timeout: float = 5.0,
        max_len: int | None = None,
        session_id: str | None = None,
        max_queue_size: int = 1000,
        max_queue_bytes: int = 64 * 1024 * 1024,
        use_consumer_group: bool = False,
        allow_self_messages: bool = False,
        overflow: Overflow | None = None,
        dialect: str = "native",
        codec: str | Codec = "json",
        max_message_size: int = 16 * 1024 * 1024,
        honor_destroy_signal: bool = True,
        connect_timeout: float = 5.0,
        inbox_ttl: float = 60.0,
        credential_provider: CredentialProvider | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        options = self._options = check_options(
            url,
            stream=stream,
            consumer_group=consumer_group,
            consumer_name=consumer_name,
            block_timeout=block_timeout,
            max_len=max_len,
            session_id=session_id,
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
            use_consumer_group=use_consumer_group,
            allow_self_messages=allow_self_messages,
            overflow=overflow,
            dialect=dialect,
            codec=codec,
            max_message_size=max_message_size,
            honor_destroy_signal=honor_destroy_signal,
            connect_timeout=connect_timeout,
            inbox_ttl=inbox_ttl,
            credential_provider=credential_provider,
            ssl_context=ssl_context,
        )
        self._keys = Keys.of(options.stream)
        self._inbox = self._keys.inbox(options.session_id)
        self._dialect = NativeDialect(options.session_id, options.codec)
        self._decoder = Decoder(self._dialect, options.max_message_size)
        self._queue: BoundedQueue[Envelope] = BoundedQueue(
            options.max_queue_size,
            options.max_queue_bytes,
            options.overflow,
            on_drop=self._on_drop,
        )
        self._inbound = Inbound(self._queue)
        self._capabilities = Capabilities(broadcast=not options.use_consumer_group, addressing=True)
        self._group: TaskGroup | None = None
        self._connection: Connection | None = None
        self._writer: Writer | None = None
        self._writer_scope: CancelScope | None = None
        self._inbox_scope: CancelScope | None = None
        self._request_scope: CancelScope | None = None
        self._reading_requests = False
        self._start_id = b"0-0"
        self._limit = 0
        self._outstanding = 0
        self._room: Event | None = None
        self._clock_offset = 0.0
        self._consumed: list[bytes] = []
        self._overloaded: list[Envelope] = []
        self._waiting: deque[tuple[Envelope, int]] = deque()
        self._received = 0
        self._sent_since_trim = 0
        self._trim_wanted: Event | None = None

    # Accessors

    @property
    def stream(self) -> str:
        """Name of the stream."""
        return self._options.stream

    @property
    def consumer_group(self) -> str:
        """Name of the consumer group, whether it is used or not."""
        return self._options.consumer_group

    @property
    def consumer_name(self) -> str:
        """This peer's name in the group."""
        return self._options.consumer_name

    @property
    def session_id(self) -> str:
        """This peer's id: what others give as ``to``."""
        return self._options.session_id

    @property
    def capabilities(self) -> Capabilities:
        """What this transport can carry."""
        return self._capabilities

    def statistics(self) -> RedisStatistics:
        """Return what it has done and holds."""
        writer = self._writer
        return RedisStatistics(
            queue=self._queue.statistics(),
            sent=0 if writer is None else writer.sent,
            received=self._received,
            invalid=self._decoder.invalid,
            undeliverable=0 if writer is None else writer.undeliverable,
            outstanding=self._outstanding,
        )

    # Lifecycle

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        if self._group is not None:
            raise RuntimeError("a transport can be entered once; make a new one")
        self._writer_scope = CancelScope(shield=True)
        self._inbox_scope = CancelScope()
        with lone_error():
            async with anyio.create_task_group() as self._group:
                try:
                    await self._start(self._group)
                    yield self
                finally:
                    await self.destroy()
                    self._writer_scope.cancel()
                    self._group.cancel_scope.cancel()

    async def _start(self, group: TaskGroup) -> None:
        options, keys = self._options, self._keys
        self._connection = connection = await self._dial("writer")
        # Not group.start(): if that is cancelled, it waits for the task, which is shielded.
        group.start_soon(self._run_writer, connection, name="anyio_kkrpc redis writer")
        version, policy = await self._look_at_server(connection)
        if policy not in ("noeviction", ""):
            logger.warning(
                "maxmemory-policy of Redis is %s: it may evict streams and inboxes; set noeviction",
                policy,
            )
        modern = version >= (6, 2)
        if options.use_consumer_group and not modern:
            raise TransportConnectionError(
                f"Redis Streams connection error: consumer groups need Redis 6.2 or later, "
                f"{options.address} is {version[0]}.{version[1]}"
            )
        self._writer = Writer(
            connection,
            keys,
            self._dialect,
            group=(keys.stream, options.consumer_group.encode())
            if options.use_consumer_group
            else None,
            max_message_size=options.max_message_size,
            no_mkstream=modern,
            returned=self._inbound.deliver,
        )
        positions = await self._find_positions(connection)
        if options.use_consumer_group:
            await create_group(connection, keys.stream, options.consumer_group.encode())
        reading = await self._dial("inbox")
        group.start_soon(self._read_inbox, reading, positions, name="anyio_kkrpc redis inbox")
        group.start_soon(self._keep_house, name="anyio_kkrpc redis housekeeping")
        if not options.use_consumer_group:
            self._start_requests()

    async def _run_writer(self, connection: Connection) -> None:
        # Not cancelled with the rest: the goodbye still has to be written. `destroy` bounds it.
        assert self._writer_scope is not None
        with self._writer_scope:
            try:
                await connection.run()
            except (RPCError, RedisError) as exc:
                self._broken(exc)

    async def _dial(self, what: str) -> Connection:
        return await open_connection(
            self._options.address,
            client_name=f"anyio_kkrpc:{what}:{self._options.session_id[:32]}",
            timeout=self._options.connect_timeout,
        )

    async def _look_at_server(self, connection: Connection) -> tuple[tuple[int, ...], str]:
        """Return version and eviction policy; of a server that hides them, modern guesses."""
        try:
            text = await connection.request(b"INFO")
        except ResponseError:
            return (6, 2), ""
        facts = dict(
            line.split(":", 1) for line in text.decode(errors="replace").splitlines() if ":" in line
        )
        version = tuple(int(part) for part in facts.get("redis_version", "6.2").split(".")[:2])
        return version, facts.get("maxmemory_policy", "")

    async def _find_positions(self, connection: Connection) -> dict[bytes, bytes]:
        """Make the inbox; note where to read on, so that nothing from now on is missed."""
        keys = self._keys
        await self._read_clock(connection)
        inbox_id = await connection.request(
            b"XADD", self._inbox, b"MAXLEN", b"0", b"*", b"hello", b"1"
        )
        await connection.request(b"PEXPIRE", self._inbox, self._ttl)
        ids = []
        for key in (keys.control, keys.stream):
            try:
                reply: Any = await connection.request(b"XINFO", b"STREAM", key)
            except ResponseError as exc:
                reply = exc
            ids.append(last_id(reply))
        self._start_id = ids[1]
        return {keys.control: ids[0], self._inbox: inbox_id}

    @property
    def _ttl(self) -> bytes:
        return b"%d" % round(self._options.inbox_ttl * 1000)

    async def destroy(self) -> None:
        """End it: readers stop, this peer's keys are removed, and later calls fail. Idempotent."""
        self._end(TransportClosedError(DESTROYED))
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with move_on_after(CLOSE_TIMEOUT, shield=True):
            await self._remove_traces(connection)
        await aclose_forcefully(connection)

    async def aclose(self) -> None:
        """The same as `destroy`."""
        await self.destroy()

    async def signal_destroy(self) -> None:
        """Tell all other peers of the stream to end; those that don't honor it go on.

        :raises TransportClosedError: after `destroy`
        """
        await self._open_writer().send_and_confirm(Envelope(Bye()))

    async def _remove_traces(self, connection: Connection) -> None:
        options = self._options
        if self._writer is None or connection.closed:
            return
        try:
            await connection.request(b"DEL", self._inbox)
            if options.use_consumer_group:
                await connection.request(
                    b"EVAL",
                    _REMOVE_CONSUMER,
                    b"1",
                    self._keys.stream,
                    options.consumer_group.encode(),
                    options.consumer_name.encode(),
                )
        except (RPCError, RedisError) as exc:
            logger.info("leaving %s: %s", options.address, exc)

    def _end(self, reason: Exception) -> None:
        """Settle everyone, without awaiting."""
        self._inbound.end(reason)
        self._notify_room()
        for scope in (self._inbox_scope, self._request_scope):
            if scope is not None:
                scope.cancel()

    def _broken(self, exc: Exception) -> None:
        if isinstance(exc, TransportConnectionError):
            self._end(exc)
            return
        error = TransportConnectionError(
            f"Redis Streams connection error: {self._options.address}: {exc}"
        )
        error.__cause__ = exc
        self._end(error)

    def _open_writer(self) -> Writer:
        reason = self._inbound.ended_reason
        if reason is not None:
            error = type(reason)(*reason.args)
            error.__cause__ = reason.__cause__
            raise error
        if self._writer is None:
            raise RuntimeError("the transport has not been entered: use 'async with'")
        return self._writer

    # Sending and receiving

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        """Hand what isn't a request to ``listener``; see `Transport.listen`."""
        self._inbound.listen(listener, serve=serve)
        self._limit = serve
        if listener is None:
            return
        if serve:
            self._start_requests()
        elif self._request_scope is not None:
            self._request_scope.cancel()

    async def receive(self) -> Envelope:
        """Return the next request; without a listener, the next record of any kind."""
        self._start_requests()
        return await self._inbound.receive()

    async def send(self, item: Envelope) -> None:
        """Write an envelope; see `Transport.send`."""
        writer = self._open_writer()
        record = item.record
        if isinstance(record, Request):
            if self._options.max_len is not None and item.recipient is None:
                self._count_for_trim(self._options.max_len)
            if record.o is True:
                await writer.send_and_confirm(item)
                return
        await writer.send(item)

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Finish a request; one of the group is acknowledged in one write with its reply."""
        writer = self._open_writer()
        if envelope.token is None:
            if reply is not None:
                await writer.send(reply)
            return
        writer.settle(envelope.token, reply)
        envelope.token = None
        self._outstanding -= 1
        self._notify_room()
        await writer.flush()

    # What is addressed to this peer

    async def _read_inbox(self, connection: Connection, positions: dict[bytes, bytes]) -> None:
        reader = Reader(positions, self._decoder, self._options.block_timeout)
        assert self._inbox_scope is not None
        with self._inbox_scope:
            try:
                while True:
                    await reader.read(connection, self._handle_addressed)
                    await self._after_reading()
            except (RPCError, RedisError) as exc:
                self._broken(exc)
            finally:
                await aclose_forcefully(connection)

    def _handle_addressed(self, stream: bytes, entry_id: bytes, entry: Entry) -> None:
        record, sender = entry.record, entry.sender
        self._received += 1
        if stream == self._inbox:
            self._consumed.append(entry_id)
            self._writer_of(entry)
            self._deliver(entry, entry_id, self._options.session_id, None)
        elif sender == self._options.session_id:
            return
        elif isinstance(record, Cancel):
            self._inbound.deliver(Envelope(record, sender))
        elif isinstance(record, Bye):
            if self._options.honor_destroy_signal:
                self._inbound.deliver(Envelope(record, sender))
                self._end(TransportClosedError(f"{DESTROYED} by a destroy signal of {sender}"))
        else:
            self._decoder.invalid += 1
            logger.warning("skipped a %s on the control stream", type(record).__name__)

    async def _after_reading(self) -> None:
        """Send what handling entries called for, and drop what was consumed."""
        overloaded, self._overloaded = self._overloaded, []
        for envelope in overloaded:
            await self.send(envelope)
        if len(self._consumed) >= _DELETE_BATCH:
            await self._delete_consumed()

    async def _delete_consumed(self) -> None:
        connection = self._connection
        if self._consumed and connection is not None:
            consumed, self._consumed = self._consumed, []
            connection.post(pack_command((b"XDEL", self._inbox, *consumed)))
            await connection.flush()

    # Requests

    def _start_requests(self) -> None:
        if self._group is None or self._reading_requests or self._inbound.ended_reason is not None:
            return
        self._reading_requests = True
        self._request_scope = CancelScope()
        self._group.start_soon(self._read_requests, name="anyio_kkrpc redis requests")

    async def _read_requests(self) -> None:
        read = self._read_group if self._options.use_consumer_group else self._read_broadcast
        assert self._request_scope is not None
        with self._request_scope:
            try:
                connection = await self._dial("requests")
                try:
                    await read(connection)
                finally:
                    await aclose_forcefully(connection)
            except (RPCError, RedisError) as exc:
                self._broken(exc)
            finally:
                self._reading_requests = False

    async def _read_broadcast(self, connection: Connection) -> None:
        stream = self._keys.stream
        options = self._options
        reader = Reader({stream: self._start_id}, self._decoder, options.block_timeout)

        def handle(key: bytes, entry_id: bytes, entry: Entry) -> None:
            self._start_id = entry_id
            if entry.sender != options.session_id or options.allow_self_messages:
                self._received += 1
                self._writer_of(entry)
                self._deliver(entry, entry_id, None, None)

        while True:
            await reader.read(connection, handle)
            await self._after_reading()
            await self._wait_for_queue()

    async def _read_group(self, connection: Connection) -> None:
        options, stream = self._options, self._keys.stream
        reader = GroupReader(
            stream,
            options.consumer_group.encode(),
            options.consumer_name.encode(),
            self._decoder,
            options.block_timeout,
        )

        misplaced: list[bytes] = []

        def handle(key: bytes, entry_id: bytes, entry: Entry) -> None:
            self._received += 1
            self._outstanding += 1
            self._writer_of(entry)
            if not self._deliver(entry, entry_id, None, entry_id):
                self._outstanding -= 1
                misplaced.append(entry_id)

        while True:
            invalid = await reader.read(connection, await self._wait_room(), handle)
            for entry_id in (*invalid, *misplaced):
                self._open_writer().settle(entry_id, None)
            misplaced.clear()
            await self._after_reading()
            await self._wait_for_queue()

    async def _wait_room(self) -> int:
        """Return how many entries may be taken now, once that is at least one."""
        while True:
            room = min(COUNT, self._options.max_queue_size - len(self._queue))
            if self._limit:
                room = min(room, self._limit - self._outstanding)
            if room > 0:
                return room
            self._room = Event()
            await self._room.wait()

    def _notify_room(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    # Delivery

    def _writer_of(self, entry: Entry) -> None:
        if entry.flavor is not self._options.codec and self._writer is not None:
            self._writer.remember(entry.sender, entry.flavor)

    def _deliver(
        self, entry: Entry, entry_id: bytes, recipient: str | None, token: bytes | None
    ) -> bool:
        """Hand on what an entry holds; return false if it has no business where it was."""
        record = entry.record
        envelope = Envelope(record, entry.sender, recipient, token=token)
        if record.__class__ is Request:
            envelope.sent_at = int(entry_id.partition(b"-")[0]) / 1000 + self._clock_offset
            if not self._inbound.deliver(envelope, entry.size):
                if recipient is None:
                    self._waiting.append((envelope, entry.size))
                else:
                    self._on_drop(envelope)  # what follows in the inbox must not wait
            return True
        if recipient is not None:
            self._inbound.deliver(envelope, entry.size)
            return True
        self._decoder.invalid += 1
        logger.warning("skipped a %s among the requests", type(record).__name__)
        return False

    async def _wait_for_queue(self) -> None:
        """Wait until what the policy ``block`` kept out of the queue is in it."""
        while self._waiting:
            envelope, size = self._waiting[0]
            await self._queue.put(envelope, size)
            self._waiting.popleft()

    def _on_drop(self, envelope: Envelope) -> None:
        """A request found no room: its caller is told. One of a group stays with Redis instead."""
        record = envelope.record
        if envelope.token is None and isinstance(record, Request) and record.o is not True:
            error = OverloadedError("the queue of requests is full; the request did not run")
            reply = Reply(record.id, e=library_error(error))
            self._overloaded.append(Envelope(reply, None, envelope.sender))

    # Housekeeping

    async def _keep_house(self) -> None:
        """Keep the inbox alive, and the clock offset right."""
        connection = self._connection
        if connection is None:
            return
        try:
            while True:
                with move_on_after(self._options.inbox_ttl / 3):
                    self._trim_wanted = Event()
                    await self._trim_wanted.wait()
                    await self._trim_requests()
                    continue
                await self._delete_consumed()
                connection.post(pack_command((b"PEXPIRE", self._inbox, self._ttl)))
                await self._read_clock(connection)
        except (RPCError, RedisError) as exc:
            self._broken(exc)

    async def _read_clock(self, connection: Connection) -> None:
        before = current_time()
        seconds, micros = await connection.request(b"TIME")
        redis_time = int(seconds) + int(micros) / 1e6
        self._clock_offset = (before + current_time()) / 2 - redis_time

    def _count_for_trim(self, max_len: int) -> None:
        self._sent_since_trim += 1
        if self._sent_since_trim >= min(max(max_len // 10, 1), _TRIM_AT_MOST):
            self._sent_since_trim = 0
            if self._trim_wanted is not None:
                self._trim_wanted.set()

    async def _trim_requests(self) -> None:
        connection = self._connection
        if connection is None or self._options.max_len is None:
            return
        length = b"%d" % self._options.max_len
        try:
            await connection.request(b"EVAL", TRIM_ACKNOWLEDGED, b"1", self._keys.stream, length)
        except ResponseError as exc:
            logger.warning("max_len: the stream could not be trimmed: %s", exc)

    # Admin

    async def get_stream_info(self) -> StreamInfo:
        """Return length, number of groups and newest entry of the stream.

        :raises TransportClosedError: after `destroy`
        """
        return await stream_info(self._open_connection(), self._keys.stream)

    async def trim_stream(self, max_len: int) -> int:
        """Trim the stream to exactly ``max_len`` entries, read or not; return how many went.

        :raises ValueError: if ``max_len`` is negative
        :raises TransportClosedError: after `destroy`
        """
        if isinstance(max_len, bool) or not isinstance(max_len, int):
            raise TypeError(f"max_len: needs an int, not {max_len!r:.80}")
        if max_len < 0:
            raise ValueError(f"max_len: must not be negative, not {max_len}")
        return await trim(self._open_connection(), self._keys.stream, max_len)

    async def get_all_entries(self) -> list[StreamEntry]:
        """Return all entries of the stream, read page by page.

        :raises TransportClosedError: after `destroy`
        """
        return await all_entries(self._open_connection(), self._keys.stream)

    async def delete_stream(self) -> None:
        """Delete the stream with its groups, destroy signals and dead letters. Inboxes stay.

        :raises TransportClosedError: after `destroy`
        """
        keys = self._keys
        await self._open_connection().request(b"DEL", keys.stream, keys.control, keys.dead)

    def _open_connection(self) -> Connection:
        self._open_writer()
        assert self._connection is not None
        return self._connection
