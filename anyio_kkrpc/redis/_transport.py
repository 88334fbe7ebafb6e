"""The Redis Streams transport: options, connections, readers and writer put together."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, final

import anyio
from anyio import (
    AsyncContextManagerMixin,
    CancelScope,
    Event,
    aclose_forcefully,
    create_task_group,
    move_on_after,
    sleep,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from redis.exceptions import RedisError, ResponseError

from .._exceptions import (
    DeliveryError,
    ProtocolError,
    RPCError,
    TransportClosedError,
    TransportConnectionError,
)
from .._protocol._dependencies import Role
from .._protocol._records import Bye, Cancel, Reply, Request
from .._runtime._entrance import Entrance
from .._runtime._fresh import fresh_copy
from .._runtime._log import quoted
from .._runtime._lone import lone_error
from .._wire_errors import library_error
from ..abc import Capabilities, Envelope, Listener, Transport
from ..kit._inbound import Inbound
from ..kit._options import takes
from ..kit._queue import BoundedQueue
from ..typescript._pacing import Pacing
from ._admin import (
    StreamEntry,
    StreamInfo,
    all_entries,
    stream_info,
    trim,
)
from ._connection._entering import Entering
from ._connection._errors import Meaning, code_of, leads_elsewhere, meaning_of, reason
from ._connection._link import Dialer, Link
from ._connection._login import open_connection
from ._connection._patience import Outages, Patience
from ._connection._portion import MOST_ENTRIES, ReadPortion
from ._connection._resp import Connection, Execute
from ._connection._watch import Watch
from ._group._claiming import Claimer
from ._group._claims import Groups
from ._group._dead_letters import DeadLetter, dead_letters, purge_dead_letters, retry_dead_letter
from ._group._held import KEEP, STARTED, Held, HeldEntry
from ._group._takeover import Takeover
from ._group._trim import Trim
from ._options import GivenOptions, Options, check_options
from ._reading._aside import Aside
from ._reading._in_order import InOrder
from ._reading._inbox import MANY, Inbox
from ._reading._intake import Intake, let_others_run
from ._reading._large import LargeRequest
from ._reading._losses import Losses
from ._reading._presence import Presence
from ._reading._reader import (
    Decoder,
    GroupReader,
    Reader,
    create_group,
    last_id,
    order,
    was_trimmed,
)
from ._reading._repeats import Repeats
from ._statistics import RedisStatistics
from ._stream._clock import ServerClock
from ._stream._holders import introduction
from ._stream._keys import Keys
from ._stream._rights import check_rights
from ._stream._scripts import add_briefly
from ._stream._server import check_server
from ._upkeep import Upkeep, release_callbacks
from ._writing._commands import CONTROL_LENGTH, CONTROL_TTL_MS, Commands, deadline_of
from ._writing._writer import Writer
from .dialects import Dialects, Entry, SharedPeer
from .dialects._signing import Signer
from .dialects.native import peer_id

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("RedisStatistics", "RedisStreamsTransport")

logger = logging.getLogger("anyio_kkrpc")

DESTROYED = "Redis Streams adapter has been destroyed"
# How long, in seconds, leaving may take to remove this peer's keys.
CLOSE_TIMEOUT = 2.0


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
    :param block_timeout: seconds that one blocking read lasts; where it takes requests of a group,
        no longer than a third of ``claim_idle``
    :param max_len: keep about this many requests in the stream; ``None`` keeps all. It is enough
        that the workers have it. What a consumer group has not acknowledged is never trimmed.
    :param session_id: this peer's id, 26 random characters if not given; unique among all peers
    :param max_queue_size: requests that may wait here for a handler
    :param max_queue_bytes: their size together, in bytes as they came, and what those over 4 KiB
        that run may weigh decoded; one always has room. What is for this peer alone has as much.
    :param use_consumer_group: whether requests are shared among the workers of the group, each
        handled by one (at least once); if not, every peer gets every request (broadcast)
    :param allow_self_messages: whether, in broadcast, this peer also gets its own requests
    :param overflow: what happens when the queue is full: ``"drop_oldest"`` (the default in
        broadcast), ``"drop_newest"``, or ``"block"`` (the default in a group), which reads no more
    :param dialect: how this peer begins: ``"native"``, or as TypeScript peers do: ``"kkrpc-2"``,
        ``"kkrpc-0"``. Whoever began otherwise is answered in kind.
    :param remote_peer_id: with ``"kkrpc-2"``, the peer that requests are for; any if not given
    :param superjson: with ``"kkrpc-0"``, whether this peer writes superjson; if not, JSON
    :param codec: ``"json"`` or ``"cbor"`` (or a `Codec`), for what this peer begins in the native
        dialect; answers are encoded as what they answer
    :param max_message_size: bytes of one encoded record, sent or received
    :param honor_destroy_signal: whether another peer's `signal_destroy` ends this one
    :param connect_timeout: seconds to connect within; on entering also for each of the server's
        answers, where one that refuses for now is none
    :param inbox_ttl: seconds after which the inbox of a peer that vanished is gone
    :param claim_idle: seconds after which a worker that isn't heard of is taken for gone by who
        reads its streams, and what it has taken is taken over by another one: after twice that if
        it was delivered twice already, four times that if three times, and so on, up to 300 seconds
    :param max_deliveries: how often an entry is delivered before it becomes a dead letter
    :param max_backlog: requests that may wait for the group before further ones are refused with
        `OverloadedError`; ``None`` for any number
    :param reconnect_timeout: seconds to go on connecting again after a connection was lost;
        ``None`` for ever
    :param health_check_interval: seconds between two looks whether the server answers. A connection
        on which nothing moves for as long, though an answer is due, is given up for a new one; one
        that is slow is not.
    :param signing_key: secret of at least 16 bytes that all peers share: entries are signed, and
        those that are not, or were written before, are refused
    :param credential_provider: redis-py's, in place of a password in the URL
    :param ssl_context: for ``rediss://``
    :raises ValueError: if an option is out of range; the text names it. Nothing was connected.
    :raises TypeError: if an option has the wrong type
    """

    @takes(GivenOptions, check_options)
    def __init__(self, options: Options) -> None:
        self._options = options
        keys = self._keys = Keys.of(options.stream)
        self._clock, self._outages = ServerClock(), Outages(options.address)
        key = options.signing_key
        self._signer = None if key is None else Signer(key, self._clock.now)
        self._queue: BoundedQueue[Envelope] = BoundedQueue(
            options.max_queue_size, options.max_queue_bytes, options.overflow, on_drop=self._on_drop
        )
        self._inbound = Inbound(self._queue)
        self._intake: Intake[Envelope] = Intake(self._queue)
        self._dialects = Dialects(
            options.dialect,
            options.session_id,
            options.codec,
            superjson=options.superjson,
            remote_peer_id=options.remote_peer_id,
            skips_own=not (options.use_consumer_group or options.allow_self_messages),
            max_queue_size=options.max_queue_size,
            max_queue_bytes=options.max_queue_bytes,
            deliver=lambda record, sender: self._inbound.deliver(Envelope(record, sender)),
        )
        inbox = keys.inbox(options.session_id)
        self._repeats = Repeats(inbox)
        self._in_order = InOrder(self._repeats, self._take_addressed)
        self._refusals: deque[Envelope] = deque()
        aside = (self._dialects.decode_whole, self._refusals.append, self._drop_invalid)
        bounds = options.max_queue_size, options.max_queue_bytes
        self._aside = Aside(self._queue, self._inbound, bounds, *aside)
        self._pacing = Pacing(self._dialects.classic.streams, self._inbound)
        silent = None if options.use_consumer_group else keys.stream
        rest = (self._signer, self._refusals.append, silent, self._in_order.skipped)
        self._decoder = Decoder(self._dialects, options.max_message_size, self._on_hint, *rest)
        self._trim = None
        if options.max_len is not None:
            grouped = options.use_consumer_group
            self._trim = Trim(keys.stream, options.max_len, grouped, self._outages)
        self._writer = Writer(
            _commands(options, keys, self._dialects, self._signer, self._trim),
            self._dialects.native,
            returned=self._inbound.deliver,
            patience=Patience("writes", self._outages),
            given_up=lambda *entry: self._held.give_back(*entry),
            failed=self._broken,
            chance=options.inbox_ttl,
            absent=lambda peer, error: self._presence.tell(peer, error),
        )
        patience = Patience("a new connection", self._outages)
        self._link = Link(self._dialer("writer"), self._prepare, self._writer.detach, patience)
        times = options.claim_idle, options.inbox_ttl
        parts = (self._link, self._clock, self._outages, self._inbound.lose_peer)
        self._presence = Presence(keys, options.session_id, times, *parts)
        group = options.consumer_group.encode() if options.use_consumer_group else None
        where = (keys.stream, group, inbox, self._inbound, self._repeats, self._link)
        undelivered, presence = self._writer.undelivered, self._presence
        self._losses = Losses(*where, (undelivered.open, lambda now: presence.lose()))
        self._inbox = Inbox(inbox, options.inbox_ttl, self._link.request, self._losses.lost)
        self._upkeep = Patience("housekeeping", self._outages, spare=True)
        names = options.consumer_group.encode(), options.consumer_name.encode()
        self._groups = Groups(
            self._link,
            keys,
            *names,
            claim_idle=options.claim_idle,
            max_deliveries=options.max_deliveries,
            introduction=introduction(keys, *names, options.session_id, options.inbox_ttl),
        )
        tell, room, idle = partial(self._tell_peers, b"claim"), self._queue_room, options.claim_idle
        self._held = Held(self._groups, self._writer, self._outages, idle, room, tell)
        intake = (self._outages, self._decoder, self._clock.now, self._take, self._admit)
        self._takeover = Takeover(self._groups, self._writer, self._held, *intake)
        self._claimer: Claimer | None = None
        self._group: TaskGroup | None = None
        self._entrance = Entrance("RedisStreamsTransport")
        self._writer_scope: CancelScope | None = None
        self._inbox_scope: CancelScope | None = None
        self._request_scope: CancelScope | None = None
        self._reading_ended: Event | None = None
        # The last says whether this peer serves a group, and has seen to it that there is one.
        self._requests_wanted = self._skipped = self._has_group = False
        self._watch = Watch(options.shortest_silence)
        self._start_id = self._connected_id = b"0-0"
        self._destroyed_by: str | None = None
        self._received = self._reconnects = 0

    # Accessors

    @property
    def stream(self) -> str:
        """Name of the stream."""
        return self._options.stream

    @property
    def server_address(self) -> tuple[str, int | None]:
        """Where the server is: host and port, or the path of its Unix socket and ``None``."""
        return self._options.address.where

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
        native = self._options.dialect == "native"
        return Capabilities(
            broadcast=not self._options.use_consumer_group,
            addressing=self._options.dialect != "kkrpc-0",
            keyword_arguments=native,
            cancellation=native,
            deadlines=native,
            takeover=self._options.claim_idle if self._options.use_consumer_group else None,
        )

    def statistics(self) -> RedisStatistics:
        """Return what it has done and holds."""
        return RedisStatistics(
            queue=self._aside.statistics(),
            sent=self._writer.commands.sent,
            received=self._received,
            invalid=self._decoder.invalid,
            undeliverable=self._writer.undeliverable + self._takeover.refused,
            outstanding=len(self._held.entries),
            claimed=self._takeover.claimed,
            dead_lettered=self._takeover.dead_lettered,
            handed_back=self._held.handed_back,
            lost=self._held.lost,
            repeated=self._repeats.dropped,
            reconnects=self._reconnects + self._link.reconnects,
            refused=self._outages.refused,
            unserved=self._inbound.unserved,
        )

    # Lifecycle

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        self._entrance.enter()
        self._writer_scope = CancelScope(shield=True)
        self._inbox_scope = CancelScope()
        with lone_error():
            async with anyio.create_task_group() as group:
                try:
                    await self._enter(group)
                    yield self
                finally:
                    await self.destroy()
                    group.cancel_scope.cancel()

    async def _enter(self, group: TaskGroup) -> None:
        address, timeout = self._options.address, self._options.connect_timeout
        entering = Entering(address, timeout, self._link, self._outages)
        try:
            with entering.scope:
                return await self._start(group, entering)
        except RedisError as exc:
            raise address.refuses(exc, self.stream) from exc
        assert self._writer_scope is not None
        self._writer_scope.cancel()  # a goodbye would not be answered either
        raise entering.error()

    async def _start(self, group: TaskGroup, entering: Entering) -> None:
        options = self._options
        connection = await self._dialer("writer").first()
        # Not group.start(): if that is cancelled, it waits for the task, which is shielded.
        group.start_soon(self._run_link, connection, name="anyio_kkrpc redis writer")
        group.start_soon(self._watch.run, name="anyio_kkrpc redis watch")
        group.start_soon(self._writer.run, name="anyio_kkrpc redis repeats")
        group.start_soon(self._in_order.run, name="anyio_kkrpc redis order")
        grouped = options.use_consumer_group
        modern = await check_server(entering.execute, options.address, groups=grouped)
        self._writer.commands.no_mkstream = self._inbox.modern = modern
        positions = await self._find_positions(entering)
        reading = await self._dialer("inbox").first()
        self._group = self._pacing.group = group
        reader = Reader(positions, self._decoder, options.block_timeout)
        self._losses.reader = reader
        group.start_soon(self._read_inbox, reader, reading, name="anyio_kkrpc redis inbox")
        request = self._link.request
        steps = (
            partial(self._clock.read, request),
            partial(self._restore, request),
            self._inbox.trim,
            partial(release_callbacks, self._dialects.compact.releases, self._writer.send),
            partial(reader.take_back, request),
        )
        interval = min(options.health_check_interval, options.inbox_ttl / 3)
        upkeep = Upkeep(steps, interval, self._upkeep)
        group.start_soon(self._part, upkeep.run, name="anyio_kkrpc redis housekeeping")
        dial = partial(self._dial, "upkeep")
        group.start_soon(self._inbox.run, dial, name="anyio_kkrpc redis inbox upkeep")
        wait = partial(self._writer.undelivered.run, request, self._inbox.keep)
        group.start_soon(self._part, wait, name="anyio_kkrpc redis undelivered")
        look = partial(self._part, self._presence.run, reader.positions)
        group.start_soon(look, name="anyio_kkrpc redis presence")
        if not self._dialects.own.shared:
            group.start_soon(self._part, self._losses.run, name="anyio_kkrpc redis losses")
            look = partial(self._losses.look, self._inbox.keep)
            group.start_soon(self._part, look, name="anyio_kkrpc redis look")
        if self._trim is not None:
            group.start_soon(self._part, self._trim.run, self._link, name="anyio_kkrpc redis trim")
        if options.use_consumer_group:
            group.start_soon(self._part, self._held.run, name="anyio_kkrpc redis touch")
        else:
            self._start_requests()

    async def _run_link(self, connection: Connection) -> None:
        # Not cancelled with the rest: the goodbye still has to be written. `destroy` bounds it.
        assert self._writer_scope is not None
        with self._writer_scope:
            await self._part(self._link.run, connection)

    async def _part(self, run: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run one of the parts; an error of Redis that ends it ends all."""
        try:
            await run(*args)
        except (RPCError, RedisError) as exc:
            self._broken(exc)

    async def _prepare(self, connection: Connection) -> None:
        """Make a new connection of the link ready, before anybody else uses it."""
        await self._clock.read(connection.execute)
        if self._group is not None:
            self._presence.lose()
            try:
                await self._restore(connection.execute)
                await self._presence.sign.keep(connection.execute)
            except RedisError as exc:
                if leads_elsewhere(exc):
                    raise
                self._upkeep.pause(exc)  # what can't be made now, housekeeping makes
        await self._writer.attach(connection, self._clock.offset)

    async def _restore(self, execute: Execute) -> None:
        """Make again what this peer needs, should the server have lost it."""
        await self._inbox.keep(execute)
        if self._has_group:
            await self._make_group(execute)

    async def _make_group(self, execute: Execute) -> None:
        """Make the group unless it is there. A client doesn't: nobody would read what is in it."""
        made = await create_group(execute, self._keys.stream, self._options.consumer_group.encode())
        if made and self._has_group:
            logger.warning("the consumer group was gone from Redis, and was made again")
            self._held.own_all()
        self._has_group = True
        await self._groups.introduce(execute)

    def _dialer(self, what: str) -> Dialer:
        heals = () if self._options.address.credential_provider is None else (Meaning.LOGIN,)
        patience = Patience("the login", self._outages, heals=heals)
        return Dialer(lambda: self._dial(what), self._options.reconnect_timeout, patience)

    async def _dial(self, what: str) -> Connection:
        connection = await open_connection(
            self._options.address,
            client_name=f"anyio_kkrpc:{what}:{self._options.session_id[:32]}",
            timeout=self._options.connect_timeout,
            silence=self._options.health_check_interval,
        )
        self._watch.add(connection)
        return connection

    async def _find_positions(self, entering: Entering) -> dict[bytes, bytes]:
        """Make the inbox; note where to read on, so that nothing from now on is missed."""
        keys = self._keys
        inbox_id = await self._inbox.make(entering.execute)
        ids = []
        for key in (keys.control, keys.stream):
            try:
                ids.append(await last_id(entering.ask, key))
                if key == keys.control:  # whoever was to see to that may have been killed
                    await entering.execute(b"PEXPIRE", key, CONTROL_TTL_MS)
            except ResponseError as exc:
                # Whoever reads the control stream sees to one that is none.
                is_left_out = key == keys.control and code_of(exc) == "WRONGTYPE"
                if meaning_of(exc) is not Meaning.GONE and not is_left_out:
                    raise
                ids.append(b"0-0")
        self._start_id = self._connected_id = ids[1]
        positions = {keys.control: ids[0], self._inbox.key: inbox_id}
        if self._dialects.own.shared:
            positions[keys.stream] = ids[1]
        return positions

    async def destroy(self) -> None:
        """End it: readers stop, this peer's keys are removed, and later calls fail. Idempotent.

        What this worker has taken and not finished goes back to the group, where another one takes
        it at once.
        """
        self._end(TransportClosedError(DESTROYED))
        if self._writer_scope is None or self._writer_scope.cancel_called:
            return
        try:
            with move_on_after(CLOSE_TIMEOUT, shield=True):
                if self._link.connection is not None:
                    await self._remove_traces()
        finally:
            self._link.end(TransportClosedError(DESTROYED))
            self._writer_scope.cancel()

    async def aclose(self) -> None:
        """The same as `destroy`."""
        await self.destroy()

    async def signal_destroy(self) -> None:
        """Tell all other peers of the stream to end; those that don't honor it go on.

        Peers of kkrpc 0.x are told if this one speaks their dialect, or has heard from one. kkrpc 2
        has no such signal.

        :raises TransportClosedError: after `destroy`
        """
        writer, dialects = self._open_writer(), self._dialects
        await writer.send_and_confirm(Envelope(Bye()))
        if dialects.classic_seen:
            everyone = SharedPeer.of("", dialects.classic)
            await writer.send_and_confirm(Envelope(Bye(), None, everyone))

    async def _remove_traces(self) -> None:
        steps: list[Callable[[], Awaitable[object]]]
        steps = [self._inbox.remove, self._presence.sign.remove]
        if self._trim is not None:
            steps.append(partial(self._trim.finish, self._link))
        if self._has_group:
            if self._claimer is not None:
                steps.append(self._claimer.resign)
            steps += [self._held.hand_back, self._groups.leave]
            if self._reading_ended is not None:
                with move_on_after(CLOSE_TIMEOUT / 4):  # the cancelled read: then nothing comes
                    await self._reading_ended.wait()
        for step in steps:
            try:
                await step()
            except (RPCError, RedisError) as exc:
                logger.info("leaving %s: %s", self._options.address, reason(exc))

    def _end(self, reason: Exception) -> None:
        """Settle everyone, without awaiting."""
        self._inbound.end(reason)
        self._aside.forget(begun=True)
        self._writer.end(reason)
        self._held.end()
        for scope in (self._inbox_scope, self._request_scope):
            if scope is not None:
                scope.cancel()

    def _broken(self, exc: Exception) -> None:
        """End it because of an error, which is logged once."""
        if self._inbound.ended_reason is not None:
            return
        if not isinstance(exc, TransportConnectionError):
            exc = self._options.address.refuses(exc, self.stream)
        if self._group is not None:  # else it is raised to who enters
            logger.error("the transport ends: %s", exc)
        self._end(exc)

    def _open_writer(self) -> Writer:
        reason = self._inbound.ended_reason
        if reason is not None:
            raise fresh_copy(reason)
        if not self._entrance.used:
            raise RuntimeError("the transport has not been entered: use 'async with'")
        return self._writer

    # Sending and receiving

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        """Hand what isn't a request to ``listener``; see `Transport.listen`.

        What a worker of a group holds and hasn't begun goes back to the group when it is to serve
        no more; when its listener is taken away, all that it holds does.
        """
        self._inbound.listen(listener, serve=serve)
        if listener is None:
            self._presence.forget()
        self._held.limit = serve
        if serve:
            self._held.notify()
            self._start_requests()
            return
        grouped = self._options.use_consumer_group
        self._aside.forget(begun=listener is None)
        if listener is None and not grouped:
            return  # what others ask is kept for who comes next
        self._requests_wanted = False
        if self._request_scope is not None:
            self._request_scope.cancel()
        forgotten = self._intake.clear()
        if not grouped:
            self._inbound.note_unserved(forgotten)
        else:
            self._queue.extract(lambda envelope: envelope.token is not None)
            self._held.release(begun=listener is None)

    def watch(self, peer: str | None, role: Role, wanted: bool) -> None:
        """Look after a peer that streams need, or no longer; see `Transport.watch`."""
        self._presence.watch(peer, role, wanted)

    def serve_more(self, change: int) -> None:
        """Take more requests, or fewer; see `Transport.serve_more`."""
        self._held.limit += change
        self._aside.lend(change)
        self._held.notify()

    async def receive(self) -> Envelope:
        """Return the next request; without a listener, the next record of any kind."""
        if not self._requests_wanted and self._inbound.serving:
            await checkpoint_if_cancelled()  # who is leaving reads nothing
            self._start_requests()
        aside, held = self._aside, self._held
        while True:
            entry = None
            envelope = await (aside.receive() if aside.waiting else self._inbound.receive())
            if envelope.token is not None:
                entry = held.entries.get(envelope.token)
                if entry is None or entry.sure_until < held.now():
                    entry = await held.confirm(envelope.token)
                    if entry is None:
                        continue
            if envelope.__class__ is Envelope or aside.begin(envelope):
                break
        if aside.waiting:
            aside.go_on()
        if entry is not None:
            entry.sure_until = STARTED
        return envelope

    async def send(self, item: Envelope) -> None:
        """Write an envelope; see `Transport.send`."""
        writer, record = self._writer, item.record
        if not self._entrance.used or self._inbound.ended_reason is not None:
            self._open_writer()
        if isinstance(record, Request) and record.o is True:
            await writer.send_and_confirm(item)
            return
        post = writer.send_nowait(item)
        if post is not None:
            await writer.wait_flushed(post, item.deadline)
        if self._dialects.classic_seen:
            self._pacing.go_on()

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Finish a request; one of the group is acknowledged in one write with its reply."""
        writer, sender = self._writer, envelope.sender
        if not self._entrance.used or self._inbound.ended_reason is not None:
            self._open_writer()
        if sender.__class__ is not str and reply is not None and isinstance(sender, SharedPeer):
            request, record = envelope.record, reply.record
            assert isinstance(request, Request)
            assert isinstance(record, Reply)
            reply.record = sender.dialect.answer(request, record)
        if envelope.token is None:
            post = None if reply is None else writer.send_nowait(reply)
            flushed = post is None
        else:
            post = writer.settle(envelope.token, reply, envelope.attempt)
            held = self._held
            held.entries.pop(envelope.token, None)
            envelope.token = None
            if held.wanted is not None:
                held.notify()
            flushed = writer.flush_nowait()
        if envelope.__class__ is not Envelope:
            self._aside.end(envelope)
        if not flushed:
            await writer.wait_flushed(post, deadline_of(envelope))
        if self._dialects.classic_seen:
            self._pacing.go_on()

    # What is addressed to this peer

    async def _keep_reading(
        self,
        what: str,
        read: Callable[[Connection, ReadPortion], Awaitable[None]],
        patience: Patience,
        connection: Connection | None = None,
    ) -> None:
        """Read on one connection after the other, until that is of no use any more."""
        dialer, portion = self._dialer(what), ReadPortion(self._options.max_message_size)
        try:
            while True:
                if connection is None:
                    connection = await dialer.again()
                try:
                    await read(connection, portion)
                except (RPCError, RedisError) as exc:
                    if meaning_of(exc) is not Meaning.GONE and not leads_elsewhere(exc):
                        await sleep(patience.pause(exc))
                        continue
                    if isinstance(exc, TransportConnectionError):
                        portion.cut(what)
                    logger.warning("%s; reading %s again", exc, what)
                await aclose_forcefully(connection)
                connection = None
                self._reconnects += 1
        except (RPCError, RedisError) as exc:
            self._broken(exc)
        finally:
            patience.leave()
            if connection is not None:
                await aclose_forcefully(connection)

    async def _read_inbox(self, reader: Reader, connection: Connection) -> None:
        patience = Patience("reading the inbox", self._outages, heals=())

        async def read(connection: Connection, portion: ReadPortion) -> None:
            await reader.rewind(connection, self._inbox.key)
            connection.silence = self._options.read_silence
            while True:
                try:
                    await reader.read(connection, portion, self._handle_addressed)
                except ResponseError as exc:
                    await self._mend_inbox(reader, connection.execute, exc)
                    continue
                if not patience.calm:
                    patience.worked()
                if reader.count > 1:
                    self._writer.expect_more()
                await self._after_reading()
                await let_others_run()

        assert self._inbox_scope is not None
        with self._inbox_scope:
            await self._keep_reading("inbox", read, patience, connection)

    async def _mend_inbox(self, reader: Reader, execute: Execute, exc: ResponseError) -> None:
        """Leave out a key that holds something else than a stream; raise any other error again."""
        wrong = await reader.not_streams(execute) if code_of(exc) == "WRONGTYPE" else set()
        if not wrong or self._keys.stream in wrong:
            raise exc
        self._decoder.invalid += len(wrong)
        for key in wrong:
            logger.warning("%s holds something else than a stream", key.decode())
        inbox = self._inbox.key
        if inbox in wrong:
            await execute(b"DEL", inbox)
            reader.positions[inbox] = await self._inbox.make(execute)
        reader.set_aside(wrong - {inbox})

    def _handle_addressed(self, stream: bytes, entry_id: bytes, entry: Entry) -> None:
        record, sender, number = entry.record, entry.sender, entry.number
        addressed = stream == self._inbox.key
        if addressed:
            self._inbox.consumed.append(entry_id)
        elif stream == self._keys.stream:
            self._handle_shared(entry)
            return
        if number is not None and self._repeats.came_before(stream, sender, number):
            return
        self._received += 1
        if addressed:
            if number is not None and self._repeats.disorder:
                self._in_order.sort(stream, entry_id, entry, number)
            elif sender.__class__ is str and record.__class__ is not Request:
                self._inbound.deliver(Envelope(record, sender, self._options.session_id))
            else:
                self._take_addressed(entry_id, entry)
        elif sender == self._options.session_id:
            return
        elif isinstance(record, Cancel):
            self._inbound.deliver(Envelope(record, sender))
        elif isinstance(record, Bye):
            self._take_destroy_signal(sender)
        else:
            self._decoder.invalid += 1
            logger.warning("skipped a %s on the control stream", type(record).__name__)

    def _take_addressed(self, entry_id: bytes, entry: Entry) -> None:
        # What is of a SharedPeer was forwarded by a worker of a group; else this peer has read it
        # from the stream.
        if self._options.use_consumer_group or not isinstance(entry.sender, SharedPeer):
            self._deliver(entry, entry_id, self._options.session_id, None)

    def _take_destroy_signal(self, sender: str) -> None:
        if self._options.honor_destroy_signal:
            self._inbound.deliver(Envelope(Bye(), sender))
            self._end(TransportClosedError(f"{DESTROYED} by a destroy signal of {quoted(sender)}"))

    # What is addressed to this peer on the stream itself, as TypeScript peers do

    def _handle_shared(self, entry: Entry) -> None:
        """Take what isn't a request from the stream. Requests are read elsewhere."""
        record, sender = entry.record, entry.sender
        if not isinstance(sender, SharedPeer) or isinstance(record, Request):
            return
        if self._is_own(entry):
            return
        if isinstance(record, Bye):
            # Whoever serves the group acknowledges it first, and tells the others.
            if not (self._options.use_consumer_group and self._requests_wanted):
                self._take_destroy_signal(sender)
            return
        if self._is_for_others(entry):
            return
        taken = sender.dialect.take(record, sender, entry.size)
        if taken is not None:
            self._received += 1
            addressed = entry.recipient == self._options.session_id
            recipient = entry.recipient if addressed else None
            self._inbound.deliver(Envelope(taken, sender, recipient))

    def _is_own(self, entry: Entry) -> bool:
        """Whether it is of this peer and unwanted. In a group anybody's request is."""
        options = self._options
        return (
            entry.sender == options.session_id
            and not options.use_consumer_group
            and not options.allow_self_messages
        )

    def _is_for_others(self, entry: Entry) -> bool:
        """Whether an entry of the stream is of no interest here.

        kkrpc 2 addresses all that it writes to one peer; that may be a group of workers.
        """
        options, recipient = self._options, entry.recipient
        if recipient is None:
            is_ours = entry.sender == options.session_id and isinstance(entry.sender, SharedPeer)
            return is_ours and self._dialects.classic.streams.was_addressed(entry.record)
        if recipient == options.session_id:
            return False
        return not (options.use_consumer_group and recipient == options.consumer_group)

    def _listen_to_stream(self, after: bytes) -> None:
        """Read replies and the like from the stream, too, now that a peer there uses it."""
        reader = self._losses.reader
        if reader is None or self._keys.stream in reader.positions:
            return
        reader.positions[self._keys.stream] = max(after, self._connected_id, key=order)
        self._inbox.wake_wanted = True

    async def _after_reading(self) -> None:
        """Send what handling entries called for, and drop what was consumed."""
        if self._inbound.ended_reason is not None:
            await checkpoint()  # a destroy signal has cancelled this
        cancels = self._dialects.classic.streams.to_send
        while cancels:
            record, producer = cancels.popleft()
            await self._writer.send(Envelope(record, None, producer))
        while self._refusals:
            await self.send(self._refusals.popleft())
        try:
            if self._inbox.wake_wanted:
                await self._inbox.wake()
            if len(self._inbox.consumed) >= MANY:
                await self._inbox.trim()
            if self._held.dropped:
                await self._held.hand_back()
        except RedisError as exc:
            self._upkeep.pause(exc)  # housekeeping makes up for it
        if self._destroyed_by is not None:
            # Only this worker of the group got it.
            await self._tell_peers(b"destroy " + self._destroyed_by.encode())
            self._take_destroy_signal(self._destroyed_by)
            await checkpoint()

    # Requests

    def _start_requests(self) -> None:
        """Have requests read. A task that has been told to stop and hasn't yet goes on after it."""
        if self._group is None or self._inbound.ended_reason is not None:
            return
        self._requests_wanted = True
        if self._request_scope is None:
            self._request_scope, ended = CancelScope(), Event()
            self._reading_ended = ended
            self._group.start_soon(self._read_requests, ended, name="anyio_kkrpc redis requests")

    async def _read_requests(self, ended: Event) -> None:
        grouped = self._options.use_consumer_group
        patience = Patience("reading requests", self._outages, heals=())  # it needs rights at once
        if grouped:
            read = partial(self._read_group, patience)
        else:
            positions = {self._keys.stream: self._start_id}
            reader = Reader(positions, self._decoder, self._options.block_timeout)
            read = partial(self._read_broadcast, patience, reader)
        try:
            while self._requests_wanted and self._inbound.ended_reason is None:
                with CancelScope() as self._request_scope:
                    async with create_task_group() as group:
                        if grouped:
                            run = self._make_claimer().run
                            group.start_soon(self._part, run, name="anyio_kkrpc redis claims")
                        await self._keep_reading("requests", read, patience)
                        group.cancel_scope.cancel()
        finally:
            self._request_scope = None
            ended.set()

    def _make_claimer(self) -> Claimer:
        self._claimer = Claimer(
            self._groups,
            self._takeover,
            self._held,
            self._options.claim_idle,
            tell=partial(self._tell_peers, b"claim"),
            patience=Patience("claims", self._outages, spare=True),
        )
        return self._claimer

    async def _read_broadcast(
        self, patience: Patience, reader: Reader, connection: Connection, portion: ReadPortion
    ) -> None:
        stream = self._keys.stream
        # That asks for two entries: not where one may be all that the server can send.
        if portion.size > 1 and await was_trimmed(connection, stream, self._start_id):
            logger.warning(
                "%s was trimmed past what this peer had read: it may have missed requests",
                self._options.stream,
            )
        await reader.rewind(connection, self._inbox.key)
        connection.silence = self._options.read_silence

        def handle(key: bytes, entry_id: bytes, entry: Entry) -> None:
            if not self._is_own(entry) and not self._is_for_others(entry):
                self._received += 1
                self._deliver(entry, entry_id, None, None)

        while True:
            await reader.read(connection, portion, handle)
            if not patience.calm:
                patience.worked()
            if reader.count > 1:
                self._writer.expect_more()
            if self._trim is not None:
                self._trim.count(reader.count)
            self._start_id = reader.positions[stream]
            await self._after_reading()
            if self._intake.waiting:
                await self._intake.wait()
            await let_others_run()

    async def _read_group(
        self, patience: Patience, connection: Connection, portion: ReadPortion
    ) -> None:
        options, stream = self._options, self._keys.stream
        name, consumer = options.consumer_group.encode(), options.consumer_name.encode()
        await self._make_group(connection.execute)
        # What a read took is surely held from when it was sent, so it is not to take long.
        block = min(options.block_timeout, options.claim_idle * KEEP)
        reader = GroupReader(stream, name, consumer, self._decoder, block)
        if not patience.calm:
            await check_rights(connection, self._keys, name, consumer)
        await self._takeover.recover()
        if self._claimer is not None:
            self._claimer.wake()  # now there is a group
        connection.silence = self._options.read_silence
        held, sure_until = self._held, 0.0

        def handle(key: bytes, entry_id: bytes, entry: Entry) -> None:
            self._take(entry_id, entry, 1, sure_until)

        while True:
            room = held.room()
            if room <= 0:
                room = await held.wait_room()
            sure_until = held.now() + held.sure_for
            for entry_id in await reader.read(connection, portion, room, handle):
                self._skip(entry_id)
            if not patience.calm:
                patience.worked()
            if reader.count > 1:
                self._writer.expect_more()
            if self._skipped:
                self._skipped = False
                await self._writer.flush()
            await self._after_reading()
            if self._intake.waiting:
                await self._intake.wait()
            await let_others_run()

    def _take(self, entry_id: bytes, entry: Entry, attempt: int, sure_until: float) -> None:
        """Take an entry of the group."""
        self._received += 1
        if entry.sender.__class__ is not str and self._is_for_others(entry):
            if entry.recipient is None or entry.fields is None:
                self._skip(entry_id)
                return
            # A Python worker of this group wouldn't see it; TypeScript peers read the stream.
            self._open_writer().forward(entry_id, attempt, entry.recipient, entry.fields)
            self._skipped = True
            return
        entries = self._held.entries
        entries[entry_id] = HeldEntry(attempt, sure_until)
        if not self._deliver(entry, entry_id, None, entry_id, attempt):
            del entries[entry_id]
            self._skip(entry_id)

    def _skip(self, entry_id: bytes) -> None:
        """Acknowledge an entry that isn't for this worker to run. To be flushed."""
        self._open_writer().settle(entry_id, None)
        self._skipped = True

    async def _admit(self) -> None:
        """Wait until what was taken over is in the queue, or has gone back."""
        await self._writer.flush()
        await self._intake.wait()
        await self._held.hand_back()

    def _on_hint(self, kind: bytes) -> None:
        """Another worker has handed something back, or was the one that got a destroy signal."""
        if kind == b"claim" and self._claimer is not None:
            self._claimer.wake()
        elif kind.startswith(b"destroy ") and self._signer is None:
            sender = peer_id(kind[8:])
            if sender != self._options.session_id:
                self._take_destroy_signal(sender)

    async def _tell_peers(self, hint: bytes) -> None:
        """Give all peers of the stream a word that is no record; it may be lost."""
        entry, part = (b"MAXLEN", b"~", CONTROL_LENGTH, b"*", b"hint", hint), "words to all peers"
        try:
            await self._link.request(*add_briefly(self._keys.control, CONTROL_TTL_MS, *entry))
        except RedisError as exc:
            self._outages.leave_out(part, exc)
        else:
            self._outages.end(part)

    def _queue_room(self) -> int:
        return min(MOST_ENTRIES, self._options.max_queue_size - len(self._queue))

    def _drop_invalid(self, envelope: Envelope) -> None:
        """Acknowledge a request of the group that turned out to be none."""
        self._decoder.invalid += 1
        entries = self._held.entries
        if envelope.token is not None and entries.pop(envelope.token, None) is not None:
            self._skip(envelope.token)
            self._writer.flush_nowait()

    # Delivery

    def _deliver(
        self,
        entry: Entry,
        entry_id: bytes,
        recipient: str | None,
        token: bytes | None,
        attempt: int = 1,
    ) -> bool:
        """Hand on what an entry holds; return false if it has no business where it was."""
        record, sender = entry.record, entry.sender
        if entry.__class__ is Entry:
            envelope = Envelope(record, sender, recipient, attempt, token=token)
        else:
            envelope = LargeRequest(record, sender, recipient, attempt, token=token)
            envelope.leave_out(entry)
        if sender.__class__ is SharedPeer and not self._prepare_shared(envelope, entry_id):
            return False
        if record.__class__ is Request:
            envelope.sent_at = int(entry_id.partition(b"-")[0]) / 1000 + self._clock.offset
            if recipient is not None:
                self._aside.deliver(envelope, entry.size)
            elif self._intake.waiting or not self._inbound.deliver(envelope, entry.size):
                self._intake.add(envelope, entry.size)
            return True
        if recipient is not None:
            self._inbound.deliver(envelope, entry.size)
            return True
        self._decoder.invalid += 1
        logger.warning("skipped a %s among the requests", type(record).__name__)
        return False

    def _prepare_shared(self, envelope: Envelope, entry_id: bytes) -> bool:
        """Make a request of a TypeScript peer ready; return false if it is none."""
        sender = envelope.sender
        assert isinstance(sender, SharedPeer)
        if not isinstance(envelope.record, Request):
            if isinstance(envelope.record, Bye) and order(entry_id) > order(self._connected_id):
                if envelope.token is None:
                    self._take_destroy_signal(sender)
                elif self._options.honor_destroy_signal:
                    self._destroyed_by = sender
            return False
        if self._is_history(envelope, entry_id, sender.dialect.stale_after):
            error = DeliveryError("the request is older than this worker, and was not run")
            reply = Reply(envelope.record.id, e=library_error(error))
            self._refusals.append(Envelope(reply, None, sender))
            logger.warning(
                "skipped entry %s: asked long before this worker came", entry_id.decode()
            )
            return False
        self._listen_to_stream(entry_id)
        sender.dialect.begin(envelope.record, sender)
        if sender.dialect.answers_unknown:
            envelope.recipient = self._options.session_id
        return True

    def _is_history(self, envelope: Envelope, entry_id: bytes, stale_after: float) -> bool:
        """Whether a new group is only now given what nobody waits for any more."""
        if envelope.token is None or envelope.attempt > 1:
            return False
        written = order(entry_id)
        age = self._clock.now() - written[0] / 1000
        return age > stale_after and written <= order(self._connected_id)

    def _on_drop(self, envelope: Envelope) -> None:
        """A request found no room: its caller is told. One of a group goes back to the group."""
        if envelope.token is not None:
            self._held.drop(envelope.token)
        else:
            self._aside.take_back(envelope)

    # Admin

    async def get_stream_info(self) -> StreamInfo:
        """Return length, number of groups and newest entry of the stream.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        with self._asking() as link:
            return await stream_info(link, self._keys.stream)

    async def trim_stream(self, max_len: int) -> int:
        """Trim the stream to exactly ``max_len`` entries, read or not; return how many went.

        :raises ValueError: if ``max_len`` is negative
        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        if isinstance(max_len, bool) or not isinstance(max_len, int):
            raise TypeError(f"max_len: needs an int, not {max_len!r:.80}")
        if max_len < 0:
            raise ValueError(f"max_len: must not be negative, not {max_len}")
        with self._asking() as link:
            return await trim(link, self._keys.stream, max_len)

    async def get_all_entries(self) -> list[StreamEntry]:
        """Return all entries of the stream, read page by page.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        with self._asking() as link:
            return await all_entries(link, self._keys.stream)

    async def delete_stream(self) -> None:
        """Delete the stream with its groups, destroy signals and dead letters. Inboxes stay.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        keys = self._keys
        with self._asking() as link:
            await link.request(b"DEL", keys.stream, keys.control, keys.dead)

    async def dead_letters(self, count: int = 1000) -> list[DeadLetter]:
        """Return the oldest dead letters: requests given up after ``max_deliveries``.

        What is there and can't be read as one, or isn't signed by who has the ``signing_key``, is
        counted as invalid, logged and skipped.

        :param count: how many at most
        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        keys, skip = self._keys, partial(self._decoder.skip, self._keys.dead)
        with self._asking() as link:
            return await dead_letters(link, keys.stream, keys.dead, count, self._signer, skip)

    async def retry_dead_letter(self, letter_id: str) -> str:
        """Put a dead letter back into the stream, as a new request; return its new id.

        :raises LookupError: if there is no dead letter with this id, or what has it can't be read
            as one or isn't signed as it must be
        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        keys = self._keys
        new: str | None = None
        with self._asking() as link:
            try:
                new = await retry_dead_letter(link, keys.stream, keys.dead, letter_id, self._signer)
            except ProtocolError as exc:
                raise LookupError(f"{quoted(letter_id)} is no dead letter: {quoted(exc)}") from exc
            except ResponseError as exc:
                if "Invalid stream ID" not in str(exc):
                    raise
        if new is None:
            raise LookupError(f"there is no dead letter {letter_id!r:.80}")
        return new

    async def purge_dead_letters(self) -> int:
        """Remove all dead letters; return how many there were.

        :raises RPCError: if Redis refuses it
        :raises TransportClosedError: after `destroy`
        """
        with self._asking() as link:
            return await purge_dead_letters(link, self._keys.dead)

    @contextmanager
    def _asking(self) -> Iterator[Link]:
        """Raise what Redis refuses as an error of this library."""
        self._open_writer()
        try:
            yield self._link
        except RedisError as exc:
            raise self._options.address.refusal(exc) from exc


def _commands(
    options: Options, keys: Keys, dialects: Dialects, signer: Signer | None, trim: Trim | None
) -> Commands:
    added = None if trim is None else trim.count
    group = options.consumer_group.encode() if options.use_consumer_group else None
    sizes = options.max_message_size, options.max_backlog
    return Commands(keys, dialects, group, options.consumer_name.encode(), *sizes, signer, added)
