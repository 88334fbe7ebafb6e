"""A stream in several shards, for the transport what a lane is where there is one.

In each shard this peer has an address of its own: its session id, and behind it, but for shard 0,
the shard's number, as in `k3n...q8@3`. So whatever is for a peer goes where its address says, and
all that belongs to a call, its reply, the items of its streams, its callbacks and its cancel, is in
the Cluster slot of its request. Nobody has to be asked, and no table be kept.

A lane is opened when it is needed: the one in which this peer is at home on entering, those that it
serves once it does, others with the first record for them. Opening one takes as long as it takes,
and what is for it waits meanwhile, as it does while a connection is away: no shard waits for
another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat

from anyio import CancelScope, current_time, move_on_after
from anyio.abc import TaskGroup

from ..._exceptions import TransportConnectionError
from ..._runtime._at_once import at_once
from ...abc import Envelope, Explanation, KeyedCalls, Listener, Role
from ...records import CallbackCall, Request, StreamReply
from .._connection._errors import Meaning, meaning_of
from .._connection._resp import Connection
from .._enter import enter
from .._group._held import HeldEntry
from .._group._room import SharedRoom
from .._lane import Lane
from .._making import make_reasons
from .._options import Options
from .._reading._reception import Reception
from .._stream._places import home_of
from ._admin import ShardedAdmin
from ._behind import Behind, Shown
from ._calls import ShardedCalls
from ._home import Home
from ._lanes import Lanes
from ._parts import PartListener
from ._routes import Routes

__all__ = ("WAITING", "Shards")

# Records whose senders wait until there is room for them. The others are few and small, and one
# task sends those for all shards: it doesn't wait for one that is away.
WAITING = (Request, StreamReply, CallbackCall)
# How many shards a peer tries to be at home in on entering, and for how many seconds each, until
# it waits for the first one.
_HOMES = 3
_PATIENCE = 1.0
# Once one shard has told why requests have no answer, others have so many seconds still, or so many
# times as long as that took.
_LATER = 0.02
_TIMES = 2


class Shards:
    """The lanes of one transport, which it begins and ends together.

    :param options: of the transport
    :param reception: where what was read waits to be served, from whatever shard
    :param failed: told of the error of Redis after which nothing goes on
    :param destroyed: told why a destroy signal ends this peer
    :ivar lanes: one for each shard that is needed
    :ivar routes: which of them a record takes
    :ivar wanted: whether requests are read
    :ivar calls: keeps calls that have a key
    """

    def __init__(
        self,
        options: Options,
        reception: Reception,
        *,
        failed: Callable[[Exception], object],
        destroyed: Callable[[Exception], object],
    ) -> None:
        self._options = options
        self._count = options.shards
        self._room = SharedRoom(reception.room, len(options.served))
        self.lanes = Lanes(
            options,
            reception,
            self._room,
            failed=failed,
            destroyed=destroyed,
            made=self._listen_to,
            opened=self._begin_lane,
        )
        self._home = Home(options, self.lanes.connected, self.lanes.open)
        self.routes = Routes(options, self.lanes, self._home)
        shown = Shown(options, self.lanes, self._unanswered, self.routes.place)
        self._behind = Behind(self._home, self.lanes.open, shown)
        self._listener: Listener | None = None
        self._listens = self._has_unknown_reader = False
        self._serves = 0
        self.wanted = False
        routes = self.routes
        self.calls: KeyedCalls = ShardedCalls(routes.calls_of, routes.calls_with, routes.all_calls)

    # Beginning

    async def enter(self, tasks: TaskGroup) -> TransportConnectionError | None:
        """Connect to the shard in which this peer is at home, or to another one if that is away;
        return the error if that takes too long.

        :param tasks: where the lanes' tasks run
        """
        shard, connection = await self._find_home()
        options = self._options.of_shard(shard)
        late = await enter(self.lanes.make(shard), options, tasks, connection)
        if late is not None:
            return late
        self.lanes.begin(shard, tasks)
        self._home.begin(shard, tasks)
        tasks.start_soon(self._behind.run, name="anyio_kkrpc redis behind")
        if self._serves:
            self.serve(self._serves, listening=self._listener is not None)
        return None

    async def _find_home(self) -> tuple[int, Connection]:
        """Connect to a shard: the first one that is there. Only in a Cluster others may be."""
        options = self._options
        homes = min(_HOMES, self._count) if options.target.kind == "cluster" else 0
        for turn in range(homes):
            shard = home_of(options.session_id, self._count, turn)
            with move_on_after(_PATIENCE):
                try:
                    return shard, await self._connect(shard)
                except TransportConnectionError as exc:
                    if meaning_of(exc) is not Meaning.ELSEWHERE:
                        raise
        return options.home, await self._connect(options.home)

    async def _connect(self, shard: int) -> Connection:
        return await self.lanes.make(shard).dials.dialer("writer").first()

    def _begin_lane(self, shard: int, lane: Lane) -> None:
        """Do what is wanted of all, in a lane that was opened."""
        if self._has_unknown_reader:
            lane.presence.watch(None, "reader", wanted=True)
        if self.wanted and shard in self._options.served:
            self._have_read(lane)

    @property
    def moved(self) -> int:
        """How often new calls went to another shard than before."""
        return self._home.moved

    def _unanswered(self) -> Sequence[Envelope]:
        """Return the requests that wait for a reply."""
        return () if self._listener is None else self._listener.waiting()

    # Serving

    def listen(self, listener: Listener | None, serve: int) -> None:
        """Tell a listener what comes from whatever shard; see `Transport.listen`."""
        self._listener, self._serves, self._listens = listener, serve, True
        for shard, lane in self.lanes.numbered:
            self._listen_to(shard, lane)

    def _listen_to(self, shard: int, lane: Lane) -> None:
        if not self._listens:
            return
        listener, place = self._listener, self.routes.place
        part = None if listener is None else PartListener(listener, lambda one: place(one) == shard)
        lane.reception.inbound.listen(part, serve=self._serves)

    def serve(self, limit: int, *, listening: bool) -> None:
        """Have requests read, at most so many at a time of all shards, or none.

        :param listening: whether there is somebody to listen
        """
        if not listening:
            self._has_unknown_reader = False
        self._room.set_limit(limit)
        if limit:
            self.want_requests()
            return
        self.wanted = False
        for lane in self.lanes.made:
            lane.serve(0, listening=listening)

    def want_requests(self) -> None:
        """Have requests read, once it has started and unless it has ended."""
        if self.lanes.begun:
            self.wanted = True
            for shard in self._options.served:
                self._have_read(self.lanes.open(shard))

    def _have_read(self, lane: Lane) -> None:
        """Have a lane read requests, if it is open; else it does once that is so."""
        limit = self._room.limit
        if limit:
            lane.serve(limit, listening=self._listener is not None)
        else:
            lane.want_requests()

    def watch(self, peer: str | None, role: Role, *, wanted: bool) -> None:
        """Look after a peer that streams need, or no longer; see `Transport.watch`."""
        if peer is not None:
            self.routes.toward(peer).presence.watch(peer, role, wanted)
            return
        self._has_unknown_reader = wanted and role == "reader"
        for lane in self.lanes.made:
            lane.presence.watch(None, role, wanted)

    async def confirm(self, held: HeldEntry) -> bool:
        """Return whether an entry may begin here; see `Keeper.confirm`."""
        return await self.lanes.of(held).worker.keeper.confirm(held)

    async def may_begin(self, held: HeldEntry) -> bool:
        """Return whether a call with a key may; see `Work.may_begin`."""
        return await self.lanes.of(held).keyed.work.may_begin(held)

    def begin(self, envelope: Envelope, held: HeldEntry) -> None:
        """Note that it does; see `Work.begin`."""
        self.lanes.of(held).keyed.work.begin(envelope, held)

    def finish(self, held: HeldEntry, reply: Envelope | None) -> None:
        """Keep what it came to; see `Work.finish`."""
        self.lanes.of(held).keyed.work.finish(held, reply)

    def answer(self, envelope: Envelope) -> None:
        """Send the answer to a request that will not run."""
        self.routes.take(envelope).writer.send_nowait(envelope)

    # What is asked

    @property
    def admin(self) -> ShardedAdmin:
        """What looks at the stream in all shards."""
        return ShardedAdmin([self.lanes.open(shard).admin for shard in range(self._count)])

    async def explain(self, requests: Sequence[Envelope]) -> list[Explanation | None]:
        """Find out why requests have no answer yet; see `Transport.explain`."""
        places = [self.routes.place(one) for one in requests]
        found: dict[int, list[Explanation | None]] = {}
        started = current_time()

        async def ask(shard: int) -> None:
            of = [one for one, place in zip(requests, places, strict=True) if place == shard]
            lane = self.lanes.open(shard)
            found[shard] = await make_reasons(self._options.of_shard(shard), lane.link).find(of)
            now = current_time()
            scope.deadline = min(scope.deadline, now + max(_LATER, (now - started) * _TIMES))

        with CancelScope() as scope:  # one that is frozen keeps nobody from being told of others
            await at_once(*(partial(ask, shard) for shard in {*places} if shard is not None))
        told = {shard: iter(of) for shard, of in found.items()}
        late = iter(repeat(Explanation("the server of its shard doesn't answer", unknown=True)))
        return [None if place is None else next(told.get(place, late)) for place in places]

    # The end

    async def signal_destroy(self) -> None:
        """Tell all other peers of the stream to end, whichever shards they are in."""
        await at_once(*(self.lanes.open(n).signal_destroy for n in range(self._count)))

    def stop(self, reason: Exception) -> None:
        """Read no more, and let nobody wait, without awaiting."""
        self.lanes.stop(reason)

    async def farewell(self) -> None:
        """Give back what was taken, and remove this peer's keys. To be bounded."""
        await self.lanes.farewell()

    def close(self, reason: Exception) -> None:
        """Write no more."""
        self.lanes.close(reason)
