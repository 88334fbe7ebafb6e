"""All that belongs to one stream key: what connects, writes, reads and keeps what was taken.

All keys of a stream are in one Cluster slot, and so on one server: the stream itself, the control
stream, the inbox of this peer. A transport has one lane; of a stream in several shards it has one
for each that it needs, see `_sharding`.

Tasks, in the order in which they begin (`Lane.start`), all in the transport's task group:

- *writer* keeps the link up: the connection on which this peer writes, and asks;
- *watch* gives up connections on which nothing moves, or that lead to where the server is no
  longer; *where* looks where that is, for all peers of this process that connect to the same;
- *repeats* writes again what Redis refused; *order* hands on what waits for something that doesn't
  come;
- *inbox* reads what is addressed to this peer, on a connection of its own;
- *housekeeping* and others do now and then what each part needs: its inbox kept and trimmed, what
  finds no inbox, peers that are gone, losses, the length of the stream, what a worker holds; those
  that most peers never need start when there is first something to do for them;
- *requests*, only as long as requests are wanted, on a connection of its own; beside it in a group
  *claims*, and *replicas* where they are read from.

They end in two steps. `Lane.stop` cancels the scopes of the two readers, so that nothing comes any
more, and lets whoever waits for a write go. What was taken then goes back to the group, the goodbye
is written, and the keys of this peer are removed (`Lane.farewell`): for this the writer runs in a
scope that is shielded. `Lane.close` cancels that scope; the transport cancels the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from math import inf
from typing import TypeAlias

from anyio import CancelScope, current_time, move_on_after
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from .._exceptions import RPCError
from .._runtime._at_once import at_once
from .._runtime._bell import Beside, start_each
from ..abc import Envelope
from ..records import Bye
from . import _making
from ._admin import Admin
from ._connection._entering import Entering
from ._connection._errors import RedisError, reason
from ._connection._link import Link
from ._connection._patience import Outages, Patience
from ._connection._resp import Connection
from ._group._keeping import Keeper
from ._group._room import SharedRoom
from ._group._worker import Worker
from ._options import Options
from ._reading._addressed import Addressed
from ._reading._arrivals import Arrivals
from ._reading._common import Common
from ._reading._destroying import DestroySignals
from ._reading._hints import Hints
from ._reading._in_order import InOrder
from ._reading._inbox import MANY, Inbox
from ._reading._loop import ReadLoop
from ._reading._losses import Losses
from ._reading._open_calls import OpenCalls
from ._reading._presence import Presence
from ._reading._reader import Decoder, Reader
from ._reading._reception import Reception
from ._reading._repeats import Repeats
from ._reading._requests import Requests
from ._reading._shared import Shared
from ._restoring import Restoring
from ._stream._clock import ServerClock
from ._stream._keys import Keys
from ._upkeep import Step, Upkeep, release_callbacks
from ._writing._writer import Writer
from .dialects import Dialects, SharedPeer
from .dialects._signing import Signer

__all__ = ("Lane",)

logger = logging.getLogger("anyio_kkrpc")

_Told: TypeAlias = Callable[[Exception], object]
# Seconds that the read of requests which was cancelled may take to end.
_STOPPING = 0.5


class Lane:
    """Puts the parts of one stream together, starts them, and ends them in order.

    :param reception: where what was read waits to be served
    :param outages: of all parts
    :param failed: told of the error of Redis after which nothing goes on
    :param destroyed: told why a destroy signal ends this peer
    :param room: how much may be taken, if that is together with other lanes
    :ivar dialects: how this peer speaks there
    :ivar reception: the same as given
    :ivar outages: the same
    """

    def __init__(
        self,
        options: Options,
        dialects: Dialects,
        reception: Reception,
        outages: Outages,
        *,
        failed: Callable[[Exception], object],
        destroyed: Callable[[Exception], object],
        room: SharedRoom | None = None,
    ) -> None:
        self._options, self.dialects = options, dialects
        self.reception, self.outages, self._failed = reception, outages, failed
        self._tasks: TaskGroup | None = None
        self._writing: CancelScope | None = None
        keys, self.clock = Keys.of(options.stream), ServerClock(current_time)
        signer = _making.make_signer(options, self.clock)
        self.trim = _making.make_trim(options, keys, outages)
        self.dials = _making.make_dials(options, outages)
        self.loop = ReadLoop(self.dials.dialer, options.max_message_size, failed)
        self.writer = Writer(
            _making.make_commands(options, keys, dialects, signer, self.trim),
            dialects.native,
            returned=reception.inbound.deliver,
            patience=Patience("writes", outages),
            given_up=lambda *entry: self.worker.keeper.give_back(*entry),
            failed=failed,
            chance=options.inbox_ttl,
            replicas=options.replicas_to_confirm,
            absent=lambda peer, error: self.presence.tell(peer, error),
        )
        patience = Patience("a new connection", outages)
        self.link = Link(self.dials.dialer("writer"), self._prepare, self.writer.detach, patience)
        times = options.claim_idle, options.inbox_ttl
        rest = (self.link, self.clock, outages, reception.inbound.lose_peer)
        self.presence = Presence(keys, options.session_id, times, *rest)
        self._make_readers(keys, signer, destroyed, room)
        parts = (self.clock, self.writer, self.addressed, self.worker, self.presence)
        upkeep = Patience("housekeeping", outages, spare=True)
        self._restoring = Restoring(*parts, upkeep, self.keyed.work.attach)
        self.admin = Admin(self.link, keys, signer, self.decoder.skip, options.target.refusal)

    def _make_readers(
        self, keys: Keys, signer: Signer | None, destroyed: _Told, room: SharedRoom | None
    ) -> None:
        """Make what all readers need, and what reads what is for this peer."""
        options, dialects, inbound = self._options, self.dialects, self.reception.inbound
        session_id, answer = options.session_id, self.reception.answers.append
        grouped = options.use_consumer_group
        signals = DestroySignals(options.honor_destroy_signal, inbound, destroyed)
        self.hints = Hints(
            keys.control,
            self.link.request,
            self.outages,
            session_id,
            signed=signer is not None,
            work=lambda word: self.worker.take_word(word),
            destroy=signals.take,
            call=lambda word: self.keyed.take_word(word),
        )
        self.shared = Shared(
            dialects,
            session_id,
            options.consumer_group if grouped else None,
            wants_own=options.allow_self_messages,
            inbound=inbound,
            signals=signals,
            answer=answer,
            now=self.clock.now,
            listen=lambda after: self.addressed.listen_to_stream(after),
        )
        parts = (self.reception, self.clock, self.shared, session_id)
        self.arrivals = Arrivals(*parts, grouped=grouped)
        inbox = keys.inbox(session_id)
        repeats = Repeats(inbox)
        in_order = InOrder(repeats, self.arrivals.deliver_addressed)
        rest = (signer, answer, None if grouped else keys.stream, in_order.skipped, inbox)
        self.decoder = Decoder(dialects, options.max_message_size, self.hints.take, *rest)
        common = Common(
            decoder=self.decoder,
            loop=self.loop,
            arrivals=self.arrivals,
            shared=self.shared,
            outages=self.outages,
            block_timeout=options.block_timeout,
            silence=options.read_silence,
            expect_more=self.writer.expect_more,
            follow_up=self._after_reading,
        )
        self._make_addressed(keys, common, repeats, in_order, signals)
        self._make_servers(keys, common, signer, room)

    def _make_addressed(
        self, keys: Keys, common: Common, repeats: Repeats, order: InOrder, signals: DestroySignals
    ) -> None:
        options, inbound, link = self._options, self.reception.inbound, self.link
        key = keys.inbox(options.session_id)
        group = options.consumer_group.encode() if options.use_consumer_group else None
        reader = Reader({}, self.decoder, options.inbox_block)
        told = (self.writer.undelivered.open, lambda now: self.presence.lose())
        parts = (inbound, repeats, link, reader, told)
        losses = Losses(
            keys.stream, group, key, *parts, lambda one: self.addressed.open_calls.looks_for(one)
        )
        writer, sender = self.writer, self.dialects.native.sender
        again = (losses.read_on, writer.send_again, writer.kept, writer.forget_repeated)
        open_calls = OpenCalls(keys.stream, sender, inbound, link, reader, *again)
        self.addressed = Addressed(
            keys,
            options.session_id,
            Inbox(key, options.inbox_ttl, link.request, losses.lost),
            reader,
            common,
            inbound=inbound,
            repeats=repeats,
            in_order=order,
            losses=losses,
            open_calls=open_calls,
            signals=signals,
            serving=lambda: self.requests.wanted,
        )

    def _make_servers(
        self, keys: Keys, common: Common, signer: Signer | None, room: SharedRoom | None
    ) -> None:
        """Make what reads requests: as a worker of a group, or in a broadcast."""
        options, writer = self._options, self.writer
        groups, turns = _making.make_groups(options, keys, self.link, self.outages)
        keeping = options.claim_idle, self.reception.room, self.hints.tell_claim
        self.worker = Worker(
            groups,
            Keeper(groups, writer, self.outages, *keeping, shared=room),
            writer,
            common,
            hints=self.hints,
            now=self.clock.now,
            claim_idle=options.claim_idle,
            beside=self._run,
            died=lambda died: self.keyed.work.died(died),
            turns=turns,
            shard=options.shard,
        )
        parts = (keys, self.link, self.dialects.native, signer, self.worker.keeper)
        rest = (self.outages, self.trim, self.reception.inbound.deliver, self.addressed.note_word)
        self.keyed = _making.make_keyed(options, *parts, *rest, self.loop.run)
        where = (self.trim, self.dials, self.link, self._failed)
        self.broadcast = _making.make_broadcast(options, keys.stream, common, *where)
        reader = self.worker if options.use_consumer_group else self.broadcast
        self.requests = Requests(reader.begin)

    # Beginning

    async def start(
        self,
        tasks: TaskGroup,
        entering: Entering,
        connection: Connection | None = None,
        *,
        patient: bool = False,
    ) -> None:
        """Connect, and start the tasks.

        :param tasks: where they run
        :param entering: bounds what the server may take for it
        :param connection: the first one, if there is one already
        :param patient: whether to go on until it is connected; what is sent meanwhile is answered
        """
        options, addressed = self._options, self.addressed
        if patient:
            self._restoring.answer_early()
        self._writing = CancelScope(shield=True)
        if connection is None:
            dialer = self.dials.dialer("writer")
            connection = await (dialer.again() if patient else dialer.first())
        # Not tasks.start(): if that is cancelled, it waits for the task, which is shielded.
        self._spawn(tasks, "writer", partial(self._run_link, self._writing, connection))
        self._spawn(tasks, "watch", self.dials.run)
        probe = partial(self.link.ask_role, self.outages)
        self._spawn(tasks, "where", partial(self.dials.look_around, options.watch_interval, probe))
        self._spawn(tasks, "repeats", self.writer.run)
        async with AsyncExitStack() as unused:
            connect = partial(self.dials.first, "inbox", unused, patient=patient)
            known = options.target, options.use_consumer_group, self.dialects.own.shared
            reading, start = await at_once(connect, partial(self._restoring.meet, entering, *known))
            unused.pop_all()
        self.shared.begin_after(start, tasks)
        self.broadcast.begin_after(start)
        self._tasks = tasks
        self._restoring.enter()
        tasks.start_soon(addressed.run, reading, name="anyio_kkrpc redis inbox")
        start_each(self._beside(), partial(self._spawn, tasks))
        if not options.use_consumer_group:
            self.want_requests()

    def _spawn(self, tasks: TaskGroup, name: str, run: Callable[[], Awaitable[None]]) -> None:
        if not self.link.ended:
            tasks.start_soon(self._run, run, name=f"anyio_kkrpc redis {name}")

    async def _run(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run one of the parts; an error of Redis that ends it ends all."""
        try:
            await run()
        except (RPCError, RedisError) as exc:
            self._failed(exc)

    async def _run_link(self, scope: CancelScope, connection: Connection) -> None:
        # Not cancelled with the rest: the goodbye still has to be written. `close` bounds it.
        with scope:
            await self._run(partial(self.link.run, connection))

    async def _prepare(self, connection: Connection) -> None:
        await self._restoring.prepare(connection)

    def _beside(self) -> list[Beside]:
        """Return what runs as long as the lane does."""
        options, addressed, request = self._options, self.addressed, self.link.request
        inbox, losses, restoring = addressed.inbox, addressed.losses, self._restoring
        steps: tuple[Step, ...] = (
            *restoring.steps(self.requests, request),
            inbox.trim,
            partial(release_callbacks, self.dialects.compact.due, self.writer.send),
            partial(addressed.reader.take_back, request),
        )
        times = options.health_check_interval, options.inbox_ttl / 3
        rest = partial(restoring.rest, self.requests, *times)
        undelivered, calls, presence = self.writer.undelivered, addressed.open_calls, self.presence
        looks, order = partial(presence.run, addressed.reader.positions), addressed.in_order
        tasks: list[Beside] = [
            ("housekeeping", Upkeep(steps, rest, restoring.patience).run, None),
            ("inbox upkeep", partial(inbox.run, partial(self.dials.dial, "upkeep")), None),
            ("order", order.run, order.bell),
            ("undelivered", partial(undelivered.run, request, inbox.keep), undelivered.bell),
            ("open calls", calls.run, calls.bell),
            ("presence", looks, presence.bell),
        ]
        if not self.dialects.own.shared:
            look = partial(losses.look, inbox.keep)
            tasks += [("losses", losses.run, losses.bell), ("look", look, None)]
        if self.trim is not None:
            tasks.append(("trim", partial(self.trim.run, self.link), None))
        if options.use_consumer_group:
            tasks += [("touch", self.worker.keeper.run, self.requests.bell), *self.keyed.tasks()]
        return tasks

    # Serving

    def serve(self, limit: int, *, listening: bool) -> None:
        """Have requests read, at most so many at a time, or none; see `Transport.listen`.

        :param listening: whether there is somebody to listen
        """
        grouped, keeper = self._options.use_consumer_group, self.worker.keeper
        if not listening:
            self.presence.forget()
            for record, peer in self.dialects.compact.due(inf):
                self.writer.send_nowait(Envelope(record, None, peer))
        keeper.room.set_limit(limit)
        if limit:
            self.want_requests()
            return
        if not listening and not grouped:
            return  # what others ask is kept for who comes next
        self.requests.stop()
        forgotten = self.arrivals.intake.clear()
        if not grouped:
            self.reception.inbound.note_unserved(forgotten)
        else:
            self.reception.forget_taken()
            keeper.release(begun=not listening)

    def want_requests(self) -> None:
        """Have requests read, once it has started and unless it has ended."""
        if self._tasks is not None and self.reception.inbound.ended_reason is None:
            self.requests.start(self._tasks)
            self.keyed.work.serve()

    async def _after_reading(self) -> None:
        """Send what handling entries called for, and drop what was consumed."""
        writer, reception, inbox = self.writer, self.reception, self.addressed.inbox
        if reception.inbound.ended_reason is not None:
            await checkpoint()  # a destroy signal has cancelled this
        cancels = self.dialects.classic.streams.to_send
        while cancels:
            record, producer = cancels.popleft()
            await writer.send(Envelope(record, None, producer))
        while reception.answers:
            await writer.send(reception.answers.popleft())
            if self.dialects.classic_seen:
                self.shared.pacing.go_on()
        try:
            if inbox.wake_wanted:
                await inbox.wake()
            if len(inbox.consumed) >= MANY:
                await inbox.trim()
            if self.worker.held.dropped:
                await self.worker.keeper.hand_back()
        except RedisError as exc:
            self._restoring.patience.pause(exc)  # housekeeping makes up for it
        sender = self.addressed.signals.unsaid
        if sender is not None:  # only this worker of the group got it
            await self.hints.tell_destroyed(sender)
            self.addressed.signals.take(sender)
            await checkpoint()

    # The end

    async def signal_destroy(self) -> None:
        """Tell all other peers of the stream to end."""
        dialects = self.dialects
        await self.writer.send_and_confirm(Envelope(Bye()))
        if dialects.classic_seen:
            everyone = SharedPeer.of("", dialects.classic)
            await self.writer.send_and_confirm(Envelope(Bye(), None, everyone))

    def stop(self, reason: Exception) -> None:
        """Read no more, and let nobody wait, without awaiting."""
        self.writer.end(reason)
        self.keyed.end(reason)
        self.worker.keeper.end()
        self.addressed.stop()
        self.requests.stop()

    async def farewell(self) -> None:
        """Give back what was taken, and remove this peer's keys. To be bounded."""
        if self.link.connection is None:
            return
        steps: list[Callable[[], Awaitable[object]]]
        steps = [self.addressed.inbox.remove, self.presence.sign.remove]
        if self.trim is not None:
            steps.append(partial(self.trim.finish, self.link))
        if self.worker.made:
            steps += self.worker.farewell()
            with move_on_after(_STOPPING):  # the cancelled read: then nothing comes
                await self.requests.wait_stopped()
        for step in steps:
            try:
                await step()
            except (RPCError, RedisError) as exc:
                logger.info("leaving %s: %s", self._options.target, reason(exc))

    def close(self, reason: Exception) -> None:
        """Write no more."""
        self.link.end(reason)
        if self._writing is not None:
            self._writing.cancel()
