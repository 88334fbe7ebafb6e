"""What has several lanes, without a server: whom each asks, and what takes which lane."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from anyio_kkrpc import TransportClosedError
from anyio_kkrpc._protocol._records import CallbackRelease, Cancel, Reply, Request
from anyio_kkrpc.abc import Envelope, KeyedCalls, KeyedRequest, Listener, Role
from anyio_kkrpc.redis._admin import Admin
from anyio_kkrpc.redis._administering import Administering
from anyio_kkrpc.redis._group._held import HeldEntry
from anyio_kkrpc.redis._making import make_reception
from anyio_kkrpc.redis._options import GivenOptions, Options, check_options
from anyio_kkrpc.redis._sharding._admin import ShardedAdmin
from anyio_kkrpc.redis._sharding._calls import ShardedCalls
from anyio_kkrpc.redis._sharding._lanes import Lanes
from anyio_kkrpc.redis._sharding._parts import PartListener
from anyio_kkrpc.redis._sharding._routes import Routes
from anyio_kkrpc.redis._sharding._shards import Shards
from anyio_kkrpc.redis._stream._places import home_of, shard_of_key
from tests.bounds import BOUND

SHARDS = 4


def checked(url: str = "redis://nowhere", **options: Any) -> Options:
    given = {"session_id": "me", "shards": SHARDS, "use_consumer_group": True} | options
    return check_options(GivenOptions(url, **given))


def make(**given: Any) -> tuple[Shards, Lanes, Routes]:
    options = checked(**given)
    failures: list[Exception] = []
    reception = make_reception(
        options, decode=lambda parts: Cancel("1"), dropped=failures.append, finished=failures.append
    )
    shards = Shards(options, reception, failed=failures.append, destroyed=failures.append)
    return shards, shards.lanes, shards.routes


def asked(**given: Any) -> Envelope:
    return Envelope(Request("1", "call", ["f"]), **given)


def test_what_is_asked_of_one_is_asked_of_several() -> None:
    """Each method of `Admin` is one of a transport, and there is one for several shards."""

    def methods(kind: type) -> set[str]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name for name, _ in found if not name.startswith("_")}

    assert methods(Admin) == methods(ShardedAdmin) == methods(Administering)


def test_routes() -> None:
    """A request remembers where it was sent, and its cancel goes there; what is for a peer goes
    where that is.
    """
    _, lanes, routes = make()
    home = home_of("me", SHARDS)
    request = asked()
    assert routes.take(request) is lanes.make(home)
    assert request.route == home
    key = next(f"k{n}" for n in range(99) if shard_of_key(f"k{n}", SHARDS) != home)
    other = asked(route=key)
    assert routes.take(other) is lanes.make(shard_of_key(key, SHARDS))
    assert routes.place(other) == shard_of_key(key, SHARDS) != home
    cancel = Envelope(Cancel("1"), None, None, route=other.route)
    assert routes.take(cancel) is routes.take(asked(route=key))
    for address, shard in (("peer@3", 3), ("peer", 0), ("peer@9", 0)):
        named = asked(recipient=address)
        assert routes.take(named) is lanes.make(shard)
        assert routes.place(named) == shard
        released = Envelope(CallbackRelease("c"), None, address)
        assert routes.take(released) is lanes.make(shard)
    held = HeldEntry(b"1-1", 1, 0.0, shard=3)
    assert lanes.of(held) is lanes.make(3)
    writer, entries = routes.back(asked(sender="peer@1", token=held))
    assert writer is lanes.make(3).writer  # where it is held, whatever its sender says
    assert entries is lanes.make(3).worker.held.entries
    assert routes.back(asked(sender="peer@1"))[0] is lanes.make(1).writer
    assert routes.calls_of(key) is lanes.make(shard_of_key(key, SHARDS)).keyed.calls
    assert routes.calls_with(asked(sender="peer@1", token=held)) is lanes.make(3).keyed.calls


def test_spread_calls_go_home_until_a_shard_is_there() -> None:
    _, lanes, routes = make(route="spread")
    home = home_of("me", SHARDS)
    assert {asked_at(routes) for _ in range(SHARDS * 16)} == {home}
    assert len(lanes.made) == SHARDS
    assert not any(lanes.connected(shard) for shard in range(SHARDS))


def asked_at(routes: Routes) -> Any:
    request = asked()
    routes.take(request)
    return request.route


class Told(Listener):
    def __init__(self) -> None:
        self.told: list[Any] = []
        self.requests = [asked(route=0), asked(route=1), asked(recipient="x@1"), asked()]

    def received(self, envelope: Envelope) -> None:
        self.told.append(envelope)

    def ended(self, reason: Exception) -> None:
        self.told.append(reason)

    def peer_gone(self, peer: str, role: Role, error: Exception) -> None:
        self.told.append((peer, role))

    def waiting(self) -> Sequence[Envelope]:
        return self.requests

    def expects(self) -> bool:
        return True

    def lost(self, reason: Exception) -> None:
        self.told.append("lost")

    def doubted(self) -> None:
        self.told.append("doubted")


def test_each_shard_is_told_of_its_own_requests() -> None:
    """What one has lost isn't looked for in another one; the end is told once, by who has them."""
    _, _, routes = make()
    listener = Told()
    part = PartListener(listener, lambda one: routes.place(one) == 1)
    assert part.waiting() == listener.requests[1:3]
    reply = Envelope(Reply("1"))
    part.received(reply)
    part.peer_gone("x@1", "source", ValueError())
    part.lost(ValueError())
    part.doubted()
    part.ended(ValueError())
    assert part.expects()
    assert listener.told == [reply, ("x@1", "source"), "lost", "doubted"]


class Kept(KeyedCalls):
    """Notes what it is asked, and answers with that."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.items = SimpleNamespace(unread=len(name))

    async def start(self, call: KeyedRequest) -> Any:
        return self.name

    async def call(
        self, call: KeyedRequest, *, cancel_when_left: bool = False, deadline: float | None = None
    ) -> Any:
        return self.name, cancel_when_left, deadline

    async def wait(self, key: str) -> Any:
        return self.name, "wait"

    async def state(self, key: str) -> Any:
        return self.name, "state"

    async def cancel(self, key: str) -> Any:
        return self.name, "cancel"

    async def forget(self, key: str) -> Any:
        return self.name, "forget"

    async def report(self, envelope: Envelope, value: Any) -> None:
        assert (self.name, value) == ("of the request", 5)

    async def progress(self, key: str) -> Any:
        return self.name, "progress"


@pytest.mark.anyio
async def test_calls_with_keys() -> None:
    """Each is asked of its key's shard, and what a handler reports goes where its request came from."""
    every = [Kept("a"), Kept("bcd")]
    calls: Any = ShardedCalls(Kept, lambda envelope: Kept("of the request"), every.copy)
    request = KeyedRequest("k", "d", Request("1", "call", ["f"]), 1.0, 1.0)
    assert await calls.start(request) is None
    assert await calls.call(request, cancel_when_left=True, deadline=5.0) == ("k", True, 5.0)
    for name in ("wait", "state", "cancel", "forget", "progress"):
        assert await getattr(calls, name)("k") == ("k", name)
    await calls.report(asked(), 5)
    assert calls.items.unread == 4


@pytest.mark.anyio
async def test_progress_of_what_is_settled() -> None:
    """It has no token any more; what it reports then is too late, and no error."""
    shards, _, _ = make()
    with anyio.fail_after(BOUND):
        await shards.calls.report(asked(sender="peer@1"), 5)


@pytest.mark.anyio
async def test_nothing_begins_by_itself() -> None:
    """It can end before it has begun."""
    shards, lanes, _ = make()
    shards.listen(Told(), 5)
    shards.serve(5, listening=True)
    shards.want_requests()
    assert not shards.wanted
    lanes.open(2)
    shards.stop(TransportClosedError("over"))
    with anyio.fail_after(BOUND):
        await shards.farewell()
    shards.close(TransportClosedError("over"))
    with pytest.raises(TransportClosedError, match="over"):
        await lanes.make(2).writer.flush()


@pytest.mark.anyio
async def test_who_asks_after_the_end_is_told() -> None:
    """Also what nobody had asked before, and what would have been opened for it."""
    shards, lanes, routes = make()
    lanes.make(0)
    shards.stop(TransportClosedError("over"))
    await shards.farewell()
    shards.close(TransportClosedError("over"))
    key = next(f"k{n}" for n in range(99) if shard_of_key(f"k{n}", SHARDS) == 3)
    for name in ("state", "wait", "cancel", "forget", "progress"):
        with anyio.fail_after(BOUND), pytest.raises(TransportClosedError, match="over"):
            await getattr(shards.calls, name)(key)
    with pytest.raises(TransportClosedError, match="over"):
        await routes.take(asked(recipient="x@2")).writer.flush()
