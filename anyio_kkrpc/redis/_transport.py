"""The Redis Streams transport: the page that puts its parts together.

`Lane` has all that belongs to one stream: connections, writer, readers, what a worker holds, its
tasks. `Reception` is where requests wait until they are received. The transport has one of each,
and says who begins and who ends:

- There is one task group, that of ``async with``, in which all tasks of the lane run. The body is
  not cancelled when the server is gone for good: whoever sends or receives then is told.
- `Life` has the phases, and each comes once. NEW; ENTERING, until the server has answered; OPEN;
  ENDED, by `destroy`, a destroy signal, an error, or because the body was left; CLOSED.
- ENDED comes at once, without awaiting: the reception throws away what waits and wakes who waits
  there, the listener is told, the readers' scopes are cancelled, and writers wait no more.
- CLOSED comes up to `CLOSE_TIMEOUT` seconds later, in `destroy`: what was taken goes back, this
  peer's keys are removed, and then the shielded scope of the link is cancelled. Leaving the body
  cancels the task group last.

A message takes no detour: `send` and `settle` go straight to the writer, `receive` to the
reception, and what is read is handed on by the reader's own task.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, final

import anyio
from anyio import AsyncContextManagerMixin, move_on_after
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from .._exceptions import TransportClosedError, TransportConnectionError
from .._runtime._lone import lone_error
from ..abc import (
    Capabilities,
    Envelope,
    Explanation,
    KeyedCalls,
    Listener,
    Role,
    Transport,
)
from ..kit._options import takes
from ..records import Request
from ._admin import Admin
from ._administering import Administering
from ._connection._patience import Outages
from ._enter import enter
from ._group._held import STARTED, HeldEntry
from ._keyed._work import Work
from ._lane import Lane
from ._life import Life, Phase
from ._making import make_capabilities, make_dialects, make_reasons, make_reception
from ._options import GivenOptions, Options, check_options
from ._reading._destroying import DESTROYED
from ._reading._shared import answer_shared
from ._sharding._admin import ShardedAdmin
from ._sharding._shards import WAITING, Shards
from ._statistics import RedisStatistics, statistics_of
from ._writing._kinds import deadline_of

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("RedisStatistics", "RedisStreamsTransport")

logger = logging.getLogger("anyio_kkrpc")

# How long, in seconds, leaving may take to remove this peer's keys.
CLOSE_TIMEOUT = 2.0


@final
class RedisStreamsTransport(  # type: ignore[misc]  # both bases define __aexit__
    AsyncContextManagerMixin, Administering, Transport
):
    """Carries envelopes over Redis Streams.

    It is an async context manager that owns its connections and tasks; `destroy` ends it early.
    Requests go to the stream. Everything else goes to the inbox of the peer that it is for.

    :param url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with user, password and database
    :param stream: name of the stream (key) for requests
    :param consumer_group: name of the group, with ``use_consumer_group``
    :param consumer_name: this peer's name in the group; ``consumer-{session_id}`` if not given
    :param block_timeout: seconds, at most 300, that one blocking read lasts; where it takes
        requests of a group, no longer than a third of ``claim_idle``. One of the inbox alone lasts
        half of ``health_check_interval`` longer.
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
    :param connect_timeout: seconds, at most 300, to connect within; on entering also for each of
        the server's answers, where one that refuses for now is none
    :param inbox_ttl: seconds after which the inbox of a peer that vanished is gone
    :param claim_idle: seconds after which a worker that isn't heard of is taken for gone by who
        reads its streams, and what it has taken is taken over by another one: after twice that if
        it was delivered twice already, four times that if three times, and so on, up to 300 seconds
    :param max_deliveries: how often an entry is delivered before it becomes a dead letter
    :param max_backlog: requests that may wait for the group before further ones are refused with
        `OverloadedError`; ``None`` for any number
    :param replicas_to_confirm: how many replicas are to have a one-way call before it returns (by
        WAIT); 0 for none. It is a measure, not a promise, unless it is all of them.
    :param reconnect_timeout: seconds to go on connecting again after a connection was lost;
        ``None`` for ever
    :param health_check_interval: seconds, at most 300, that the server may be silent: a connection
        on which nothing moves for as long, though an answer is due, is given up for a new one; one
        that is slow is not. One and a half times that, at most, lie between two commands that ask
        for an answer while there is nothing else to do.
    :param watch_interval: seconds, at most 300, between two looks where the server is while all
        seems well: whether sentinels name another one, or a server with replicas has become one.
        One peer of a process does it for all that connect to the same.
    :param read_from: ``"replica"``: a broadcast's requests are read from a replica of the server,
        as long as there is one that isn't cut off or more than 5 seconds behind; all else is read
        from the server itself. Not with a consumer group.
    :param shards: over how many streams this one is spread, each of which a master of a Cluster may
        have; at most 256. Only with a consumer group; workers are to have as many as their callers.
    :param serve_shards: the numbers of those, from 0 on, that this peer serves; all if not given
    :param route: ``"sticky"``: calls go to the shard in which this peer is at home, and so
        together; ``"spread"``: to all in turn, for few peers that have more calls than one server
        takes
    :param signing_key: secret of at least 16 bytes that all peers share: entries are signed, and
        those that are not, or were written before, are refused
    :param credential_provider: in place of a password in the URL: redis-py's, or what has the same
            method ``get_credentials``
    :param ssl_context: for ``rediss://``
    :raises ValueError: if an option is out of range; the text names it. Nothing was connected.
    :raises TypeError: if an option has the wrong type
    """

    @takes(GivenOptions, check_options)
    def __init__(self, options: Options) -> None:
        self._options = options
        self._life = Life("RedisStreamsTransport")
        reception = self._reception = make_reception(
            options,
            decode=lambda parts: lane.dialects.decode_whole(parts),
            dropped=lambda held: self._of(held).worker.held.drop(held),
            finished=lambda held: self._of(held).worker.finish(held),
            answer=self._answer if options.shards > 1 else None,
        )
        end: dict[str, Any] = {"failed": self._broken, "destroyed": self._end}
        self._shards = Shards(options, reception, **end) if options.shards > 1 else None
        if self._shards is None:
            dialects = make_dialects(options, reception.inbound.deliver)
            outages = Outages(options.target)
            lane = self._lane = Lane(options, dialects, reception, outages, **end)
        else:
            lane = self._lane = self._shards.lanes.make(0)
        self._parts: Lane | Shards = self._shards or lane
        self._outages, self._reasons = lane.outages, make_reasons(options, lane.link)
        # Asked for each message, and so without a detour.
        self._inbound, self._aside = reception.inbound, reception.aside
        self._dialects, self._pacing = lane.dialects, lane.shared.pacing
        self._writer, self._entries = lane.writer, lane.worker.held.entries
        self._keeper, self._room = lane.worker.keeper, lane.worker.keeper.room
        work: Work | Shards = lane.keyed.work if self._shards is None else self._shards
        self._requests = lane.requests if self._shards is None else self._shards
        self._confirm = (self._keeper if self._shards is None else self._shards).confirm
        self._may_begin, self._begin, self._finish = work.may_begin, work.begin, work.finish
        if options.use_consumer_group and options.dialect == "native":
            calls = lane.keyed.calls if self._shards is None else self._shards.calls
            self.keyed: KeyedCalls | None = calls

    # Accessors

    @property
    def stream(self) -> str:
        """Name of the stream."""
        return self._options.stream

    @property
    def shards(self) -> int:
        """Over how many streams this one is spread."""
        return self._options.shards

    def shard_of(self, peer: str | None = None, key: str | None = None) -> int | None:
        """Return the shard of a peer's address, or of a ``shard_key`` or ``key``, or the one where
        new calls that have neither go now. ``None`` where there is one stream, and for such calls
        with ``route="spread"``.
        """
        return None if self._shards is None else self._shards.routes.tell(peer, key)

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
        """This peer's id: what others give as ``to``. With shards, the one in which it is at home
        stands behind it, as in ``"me@3"``.
        """
        return self._options.of_shard(self._options.home).session_id

    @property
    def server_address(self) -> tuple[str, int | None]:
        """Where the server is: host and port, or the path of its Unix socket and ``None``.

        With sentinels or a Cluster, it is the one of them that the URL names first until a peer of
        this process has connected.
        """
        lane = self._lane
        if self._shards is not None:
            lane = self._shards.lanes.make(self._options.home)
        address = lane.dials.address
        return (self._options.target if address is None else address).where

    @property
    def capabilities(self) -> Capabilities:
        """What this transport can carry."""
        return make_capabilities(self._options)

    def statistics(self) -> RedisStatistics:
        """Return what it has done and holds."""
        shards = self._shards
        if shards is None:
            return statistics_of(self._reception, [self._lane])
        return statistics_of(self._reception, shards.lanes.made, shards.moved)

    # Lifecycle

    def _answer(self, reply: Envelope) -> None:
        """Send the answer to a request that will not run, in the shard of its caller."""
        assert self._shards is not None
        self._shards.answer(reply)

    def _of(self, held: HeldEntry) -> Lane:
        """Return the lane that an entry was taken from."""
        return self._lane if self._shards is None else self._shards.lanes.of(held)

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self, None]:
        self._life.enter()
        with lone_error():
            async with anyio.create_task_group() as tasks:
                try:
                    await self._enter(tasks)
                    yield self
                finally:
                    await self.destroy()
                    tasks.cancel_scope.cancel()

    async def _enter(self, tasks: TaskGroup) -> None:
        if self._shards is None:
            late = await enter(self._lane, self._options, tasks)
        else:
            late = await self._shards.enter(tasks)
        if late is None:
            self._life.turn(Phase.OPEN)
            return
        self._life.turn(Phase.CLOSED)
        self._parts.close(TransportClosedError(DESTROYED))  # a goodbye would not be answered either
        raise late

    async def destroy(self) -> None:
        """End it: readers stop, this peer's keys are removed, and later calls fail. Idempotent.

        What this worker has taken and not finished goes back to the group, where another one takes
        it at once.
        """
        self._end(TransportClosedError(DESTROYED))
        if not self._life.entered or self._life.phase is Phase.CLOSED:
            return
        try:
            with move_on_after(CLOSE_TIMEOUT, shield=True):
                await self._parts.farewell()
        finally:
            self._life.turn(Phase.CLOSED)
            self._parts.close(TransportClosedError(DESTROYED))

    async def aclose(self) -> None:
        """The same as `destroy`."""
        await self.destroy()

    async def signal_destroy(self) -> None:
        """Tell all other peers of the stream to end; those that don't honor it go on.

        Peers of kkrpc 0.x are told if this one speaks their dialect, or has heard from one. kkrpc 2
        has no such signal.

        :raises TransportClosedError: after `destroy`
        """
        self._life.check()
        await self._parts.signal_destroy()

    def _end(self, reason: Exception) -> None:
        """End it for everyone, without awaiting. Only the first reason counts."""
        self._life.end(reason)
        self._reception.end(reason)
        self._parts.stop(reason)

    def _broken(self, exc: Exception) -> None:
        """End it because of an error, which is logged once."""
        if self._life.phase >= Phase.ENDED:
            return
        if not isinstance(exc, TransportConnectionError):
            exc = self._options.target.refuses(exc, self.stream)
        if self._life.phase is Phase.OPEN:  # else it is raised to who enters
            logger.error("the transport ends: %s", exc)
        self._end(exc)

    # Sending and receiving

    def listen(self, listener: Listener | None, *, serve: int = 0) -> None:
        """Hand what isn't a request to ``listener``; see `Transport.listen`.

        What a worker of a group holds and hasn't begun goes back to the group when it is to serve
        no more; when its listener is taken away, all that it holds does.
        """
        self._inbound.listen(listener, serve=serve)
        if self._shards is not None:
            self._shards.listen(listener, serve)
        if not serve:
            self._aside.forget(begun=listener is None)
        self._parts.serve(serve, listening=listener is not None)

    def watch(self, peer: str | None, role: Role, wanted: bool) -> None:
        """Look after a peer that streams need, or no longer; see `Transport.watch`."""
        if self._shards is None:
            self._lane.presence.watch(peer, role, wanted)
        else:
            self._shards.watch(peer, role, wanted=wanted)

    async def explain(self, requests: Sequence[Envelope]) -> Sequence[Explanation | None]:
        """Find out why requests have no answer yet; see `Transport.explain`."""
        if self._shards is not None:
            return await self._shards.explain(requests)
        return await self._reasons.find(requests)

    def serve_more(self, change: int) -> None:
        """Take more requests, or fewer; see `Transport.serve_more`."""
        self._aside.lend(change)
        self._room.lend(change)

    async def receive(self) -> Envelope:
        """Return the next request; without a listener, the next record of any kind."""
        if not self._requests.wanted and self._inbound.serving:
            await checkpoint_if_cancelled()  # who is leaving reads nothing
            self._parts.want_requests()
        aside, keeper, inbound = self._aside, self._keeper, self._inbound
        while True:
            envelope = None if aside.waiting else inbound.poll()
            if envelope is None:
                envelope = await (aside.receive() if aside.waiting else inbound.wait())
            entry: HeldEntry | None = envelope.token
            if (
                entry is not None
                and entry.sure_until < keeper.now()
                and not await self._confirm(entry)
            ):
                continue
            if entry is not None and entry.keyed is not None and not await self._may_begin(entry):
                continue
            if envelope.__class__ is Envelope or aside.begin(envelope):
                break
        if aside.waiting:
            aside.go_on()
        if entry is not None:
            entry.sure_until = STARTED  # as `HeldEntry.start` does
            if entry.keyed is not None:
                self._begin(envelope, entry)
        return envelope

    async def send(self, item: Envelope) -> None:
        """Write an envelope; see `Transport.send`."""
        writer, record = self._writer, item.record
        if not self._life.running and not await self._life.wait_open(item.deadline):
            return
        if self._shards is not None:
            writer = self._shards.routes.take(item).writer
            if not (isinstance(record, WAITING) or writer.waiting.admits(record)):
                return
        if isinstance(record, Request) and record.o is True:
            await writer.send_and_confirm(item)
            return
        post = writer.send_nowait(item)
        if post is not None and (self._shards is None or isinstance(record, WAITING)):
            await writer.wait_flushed(post, item.deadline)
        if self._dialects.classic_seen:
            self._pacing.go_on()

    async def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Finish a request; one of the group is acknowledged in one write with its reply."""
        writer, entries, sender = self._writer, self._entries, envelope.sender
        if not self._life.running:
            await self._life.wait_open()
        if self._shards is not None:
            writer, entries = self._shards.routes.back(envelope)
        if sender.__class__ is not str and reply is not None:
            answer_shared(envelope, reply)
        if envelope.token is None:
            post = None if reply is None else writer.send_nowait(reply)
            flushed = post is None
        elif envelope.token.keyed is not None:
            self._finish(envelope.token, reply)
            envelope.token, post, flushed = None, None, True
        else:
            entry_id, room = envelope.token.id, self._room
            post = writer.settle(entry_id, reply, envelope.attempt)
            entries.pop(entry_id, None)
            envelope.token = None
            if room.wanted is not None:
                room.notify()
            flushed = writer.flush_nowait()
        if envelope.__class__ is not Envelope:
            self._aside.end(envelope)
        if not flushed:
            await writer.wait_flushed(post, deadline_of(envelope))
        if self._dialects.classic_seen:
            self._pacing.go_on()

    # Admin

    @property
    def _admin(self) -> Admin | ShardedAdmin:
        self._life.check()
        return self._parts.admin
