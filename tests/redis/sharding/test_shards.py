"""A stream in several shards on one real server, where each is a key of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    TransportConnectionError,
    current_call,
    with_call_options,
)
from anyio_kkrpc._protocol._records import CallbackRelease, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.redis._life import Phase
from anyio_kkrpc.redis._sharding import _behind
from anyio_kkrpc.redis._stream._places import home_of, homes_of, name_of_shard, shard_of_key
from anyio_kkrpc.redis._writing import _waiting
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]

SHARDS = 4
# A key of each shard, and the id of a peer that is at home there.
KEYS = [
    next(f"k{n}" for n in count() if shard_of_key(f"k{n}", SHARDS) == one) for one in range(SHARDS)
]
PEERS = [next(f"p{n}" for n in count() if home_of(f"p{n}", SHARDS) == one) for one in range(SHARDS)]


LETTER: Any = {
    "id": "1-1",
    "group": "g",
    "reason": "a test",
    "attempts": "5",
    "first": "1",
    "last": "2",
    "from": "x",
    "json": json.dumps({"t": "q", "id": "1", "op": "call", "p": ["who"]}),
}


class Service:
    """Tells by whom, and how, it was called."""

    def __init__(self, name: str = "worker") -> None:
        self._name = name
        self._calls: list[Any] = []
        self._senders: Counter[str | None] = Counter()
        self._running = self._most = 0
        self._gate = anyio.Event()
        self._cancelled = anyio.Event()

    async def who(self, value: Any = None) -> str:
        self._calls.append(value)
        self._senders[current_call().sender] += 1
        await anyio.sleep(0)
        return self._name

    async def gated(self, value: Any) -> Any:
        self._running += 1
        self._most = max(self._most, self._running)
        try:
            await self._gate.wait()
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            self._running -= 1
        return value

    async def count(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    async def total(self, items: Any) -> int:
        return sum([item async for item in items])

    async def call_me_back(self, callback: Callable[..., Any]) -> None:
        for number in range(3):
            await callback(number)


def peer(url: str, stream: str, shards: int = SHARDS, **options: Any) -> RedisStreamsTransport:
    # A machine with much to do is slow to connect and to answer, and is there all the same.
    slow = {"connect_timeout": BOUND, "health_check_interval": BOUND, "claim_idle": BOUND}
    return RedisStreamsTransport(
        url, stream=stream, shards=shards, use_consumer_group=True, **(slow | options)
    )


@asynccontextmanager
async def opened(
    url: str, stream: str, *served: Any, concurrency: int = 100, **options: Any
) -> AsyncIterator[list[RPCChannel]]:
    """Open a channel for each; those of ``None`` serve nothing."""
    async with AsyncExitStack() as stack:
        channels = []
        for api in served:
            transport = await stack.enter_async_context(peer(url, stream, **options))
            channel = RPCChannel(
                transport, expose=api, timeout=CALL_BOUND, max_concurrency=concurrency
            )
            channels.append(await stack.enter_async_context(channel))
        yield channels


def keyed(client: RPCChannel, shard: int, **options: Any) -> Any:
    """Return a proxy whose calls go to a shard."""
    return with_call_options(client.get_api(), shard_key=KEYS[shard], **options)


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.005)


def lengths(witness: redis.Redis, stream: str) -> list[int]:
    """Return how many requests each shard has had."""
    return [witness.xlen(name_of_shard(stream, shard)) for shard in range(SHARDS)]


async def test_where_calls_go(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Calls of a peer go to its home; those with a shard key, in order, to the shard of that; and
    all that belongs to a call, whatever it is, passes there.
    """
    service = Service()
    async with opened(redis_server.url, stream_name, service) as _:
        client = peer(redis_server.url, stream_name, session_id=PEERS[2])
        assert client.session_id == f"{PEERS[2]}@2"
        async with client, RPCChannel(client, timeout=CALL_BOUND) as channel:
            api = channel.get_api()
            for _ in range(5):
                assert await api.who() == "worker"
            assert lengths(witness, stream_name) == [0, 0, 5, 0]
            for shard in range(SHARDS):
                there = keyed(channel, shard)
                assert [item async for item in await there.count(3)] == [0, 1, 2]
                assert await there.total(numbers()) == 6
                found: list[int] = []
                await there.call_me_back(found.append)
                assert found == [0, 1, 2]
                assert await there.who() == "worker"
            assert lengths(witness, stream_name) == [4, 4, 9, 4]
            senders = {PEERS[2], *(f"{PEERS[2]}@{shard}" for shard in range(1, SHARDS))}
            assert service._senders.keys() == senders


async def numbers() -> AsyncIterator[int]:
    for number in range(4):
        yield number


async def test_a_peer_by_its_address(redis_server: RedisServer, stream_name: str) -> None:
    """A call to one peer goes to the shard that its address names, its session id where it is at
    home, from whichever shard the caller is in.
    """
    one, two = Service("one"), Service("two")
    async with opened(redis_server.url, stream_name, one, session_id=PEERS[3]) as (first,):
        async with opened(redis_server.url, stream_name, two, None, session_id=None) as (_, client):
            assert first._transport.session_id == f"{PEERS[3]}@3"
            for address in (f"{PEERS[3]}@3", f"{PEERS[3]}@1", PEERS[3]):
                assert await client.get_api(to=address).who() == "one"
            with pytest.raises(DeliveryError, match="is not there"):
                await client.get_api(to="nobody@2").who()
    assert two._calls == []


@pytest.mark.one_server
async def test_some_serve_some(redis_server: RedisServer, stream_name: str) -> None:
    """Each request is run by a worker that serves its shard."""
    even, odd = Service("even"), Service("odd")
    url = redis_server.url
    async with (
        opened(url, stream_name, even, serve_shards=[0, 2]),
        opened(url, stream_name, odd, serve_shards={3, 1}),
        opened(url, stream_name, None) as (client,),
    ):
        for shard in range(SHARDS):
            expected = "odd" if shard % 2 else "even"
            assert [await keyed(client, shard).who() for _ in range(3)] == [expected] * 3


async def test_order_of_a_key(redis_server: RedisServer, stream_name: str) -> None:
    """Calls with one shard key reach the worker in the order in which they were sent, also those
    that were sent before their shard was opened.
    """
    service = Service()
    async with opened(redis_server.url, stream_name, service, concurrency=1):
        async with opened(redis_server.url, stream_name, None, session_id=PEERS[0]) as (client,):
            async with anyio.create_task_group() as tasks:
                for number in range(30):
                    tasks.start_soon(keyed(client, 3).who, number)
                    await anyio.sleep(0)
    # Tasks that trio has begun at once send in any order.
    assert sorted(service._calls) == list(range(30))


async def test_sent_in_order(redis_server: RedisServer, stream_name: str) -> None:
    service = Service()
    async with opened(redis_server.url, stream_name, service, concurrency=1):
        async with opened(redis_server.url, stream_name, None, session_id=PEERS[0]) as (client,):
            for number in range(30):
                await keyed(client, 3, reply=False).who(number)
            assert await keyed(client, 3).who(30) == "worker"
    assert service._calls == list(range(31))


async def test_cancels_go_where_the_call_went(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    service = Service()
    async with opened(redis_server.url, stream_name, service):
        async with opened(redis_server.url, stream_name, None, session_id=PEERS[1]) as (client,):
            for shard in (1, 3):
                service._cancelled = anyio.Event()
                api = client.get_api() if shard == 1 else keyed(client, shard)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(api.gated, 1)
                    await until(lambda: service._running == 1)
                    tasks.cancel_scope.cancel()
                with anyio.fail_after(BOUND):
                    await service._cancelled.wait()
                name = name_of_shard(stream_name, shard)
                await until(lambda name=name: witness.xpending(name, "kkrpc-group")["pending"] == 0)


async def test_calls_with_keys_are_kept_where_their_key_belongs(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Any peer finds them there, whichever shard it is at home in."""
    service = Service()
    url = redis_server.url
    async with opened(url, stream_name, service) as (worker,):
        async with opened(url, stream_name, None, session_id=PEERS[0]) as (one,):
            async with opened(url, stream_name, None, session_id=PEERS[3]) as (other,):
                for shard, key in enumerate(KEYS):
                    for client in (one, other, worker):
                        api = with_call_options(client.get_api(), key=key)
                        assert await api.who(shard) == "worker"
                    base = name_of_shard(stream_name, shard)
                    assert witness.exists(f"{{{base}}}:call:{key}") == 1
                    assert (await other.attach(key).state()).kind == "done"
    assert service._calls == [0, 1, 2, 3]


@pytest.mark.one_server
async def test_room_is_shared(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A worker runs so many calls at a time, of all shards together, and takes little more."""
    service = Service()
    async with opened(redis_server.url, stream_name, service, concurrency=3) as (worker,):
        async with opened(redis_server.url, stream_name, None) as (client,):
            async with anyio.create_task_group() as tasks:
                for number in range(40):
                    tasks.start_soon(keyed(client, number % SHARDS).gated, number)
                await until(lambda: sum(lengths(witness, stream_name)) == 40)
                await until(lambda: service._running == 3)
                statistics = worker._transport.statistics()
                assert 3 <= statistics.outstanding <= 3 + SHARDS + 3
                service._gate.set()
    assert service._most == 3


async def test_spread(redis_server: RedisServer, stream_name: str, witness: redis.Redis) -> None:
    """A peer whose calls are to go to all shards opens these, and uses them all alike."""
    url = redis_server.url
    async with (
        opened(url, stream_name, Service()),
        opened(url, stream_name, None, route="spread", session_id=PEERS[0]) as (client,),
    ):
        shards = client._transport._shards
        assert shards is not None
        for shard in range(SHARDS):
            shards.lanes.open(shard)
        await until(lambda: all(shards.lanes.connected(shard) for shard in range(SHARDS)))
        for _ in range(SHARDS * 16):
            await client.get_api().who()
        assert lengths(witness, stream_name) == [16] * SHARDS


async def test_peers_with_one_stream(redis_server: RedisServer, stream_name: str) -> None:
    """Shard 0 is the stream as it was: who knows nothing of shards is served by who does."""
    service = Service()
    async with opened(redis_server.url, stream_name, service):
        async with opened(redis_server.url, stream_name, None, shards=1) as (client,):
            assert await client.get_api().who() == "worker"
            assert [item async for item in await client.get_api().count(3)] == [0, 1, 2]
    async with opened(redis_server.url, stream_name, service, shards=1):
        async with opened(redis_server.url, stream_name, None) as (client,):
            assert await keyed(client, 0).who() == "worker"


async def test_shards_are_added(redis_server: RedisServer, stream_name: str) -> None:
    """Workers first, then those who call, while calls are made: each is answered."""
    url, done = redis_server.url, 0
    numbers = count()
    gone: list[int] = []
    old, new = Service("old"), Service("new")

    async def call(shards: int, stop: anyio.Event) -> None:
        nonlocal done
        async with opened(url, stream_name, None, shards=shards) as (client,):
            while not stop.is_set():
                number = next(numbers)
                await with_call_options(client.get_api(), shard_key=str(number)).who(number)
                done += 1

        gone.append(shards)

    async def serve(service: Service, shards: int, stop: anyio.Event) -> None:
        # What one gives back that leaves, the other takes within this time.
        more = {"shards": shards, "claim_idle": 1.0, "max_deliveries": 1000}
        async with opened(url, stream_name, service, **more):
            await stop.wait()

    async def served(more: int) -> None:
        target = done + more
        await until(lambda: done >= target)

    ends = [anyio.Event() for _ in range(4)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, old, 2, ends[0])
        tasks.start_soon(call, 2, ends[1])
        tasks.start_soon(call, 2, ends[1])
        await served(20)
        tasks.start_soon(serve, new, 4, ends[2])
        await until(lambda: len(new._calls) > 10)
        ends[0].set()
        await served(40)
        tasks.start_soon(call, 4, ends[3])
        await served(40)
        ends[1].set()
        await served(20)
        ends[3].set()
        await until(lambda: len(gone) == 3)
        ends[2].set()
    # What ran where the old worker left may have run once more.
    assert {*old._calls, *new._calls} == {*range(done)}


async def test_a_home_that_is_far_behind(
    redis_server: RedisServer,
    stream_name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """New calls of who is at home where no worker reads go where one does; what waits there, and
    calls with a key of that shard, wait on. Once it is served again they are answered, and it is
    gone back to.
    """
    for name, seconds in (("_INTERVAL", 0.05), ("_LEAST", 0.2), ("_MOST", 0.2), ("_BACK", 0.05)):
        monkeypatch.setattr(_behind, name, seconds)
    url, answers = redis_server.url, Counter[str]()
    session_id = next(f"p{n}" for n in count() if homes_of(f"p{n}", SHARDS)[:2] == [3, 1])
    there, other = Service("there"), Service("other")
    async with (
        opened(url, stream_name, other, serve_shards=[1]),
        opened(url, stream_name, None, session_id=session_id) as (client,),
        anyio.create_task_group() as tasks,
    ):
        transport, api = client._transport, client.get_api()
        assert isinstance(transport, RedisStreamsTransport)

        async def call(one: Any) -> None:
            answers[await one.who()] += 1

        tasks.start_soon(call, api)
        tasks.start_soon(call, keyed(client, 3))
        await until(lambda: transport.statistics().moved == 1)
        assert answers == {}
        assert await api.who() == "other"
        assert await api.who() == "other"
        assert "no longer to shard 3: shard 3 is far behind" in caplog.text
        tasks.start_soon(call, keyed(client, 3))
        async with opened(url, stream_name, there, serve_shards=[3]):
            await until(lambda: transport.statistics().moved > 1)
            await until(lambda: answers == {"there": 3})


async def test_signed_for_another_shard(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What was written to one shard is believed in no other one, nor under another address."""
    service, url = Service(), redis_server.url
    options: Any = {"signing_key": b"0123456789abcdef"}
    async with (
        opened(url, stream_name, service, **options) as (worker,),
        opened(url, stream_name, None, session_id=PEERS[2], **options) as (client,),
    ):
        for shard in range(SHARDS):
            assert await keyed(client, shard).who(shard) == "worker"
        names = [name_of_shard(stream_name, shard) for shard in range(SHARDS)]
        ((_, fields),) = witness.xrange(names[2])
        witness.xadd(names[1], fields)
        forged = {**fields, b"from": fields[b"from"].replace(b"@2", b"@3")}
        assert forged != fields
        witness.xadd(names[2], forged)
        await until(lambda: worker._transport.statistics().invalid == 2)
        assert await keyed(client, 1).who(4) == "worker"
    assert service._calls == [0, 1, 2, 3, 4]


@pytest.mark.one_server
async def test_connections(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Two in each shard that a peer calls in, three in each that a worker serves."""
    url = redis_server.url

    def kinds(channel: RPCChannel) -> Counter[str]:
        name = str(channel._transport._options.session_id)  # type: ignore[attr-defined]
        names = [one["name"].split(":") for one in witness.client_list()]
        known = [one for one in names if len(one) == 3]
        return Counter(what for _, what, of in known if of.partition("@")[0] == name)

    async def settled(channel: RPCChannel, **expected: int) -> None:
        await until(lambda: kinds(channel) == Counter(expected))

    async with (
        opened(url, stream_name, Service()) as (all_,),
        opened(url, stream_name, Service(), serve_shards=[1, 2], session_id=PEERS[0]) as (two,),
        opened(url, stream_name, None, session_id=PEERS[3]) as (client,),
    ):
        await settled(all_, writer=4, inbox=4, requests=4)
        await settled(two, writer=3, inbox=3, requests=2)
        await client.get_api().who()
        await settled(client, writer=1, inbox=1)
        for shard in range(SHARDS):
            await keyed(client, shard % 2).who()
        await settled(client, writer=3, inbox=3)


@pytest.mark.one_server
async def test_looked_at_together(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Length, entries and dead letters are those of all shards; ids tell which."""
    url = redis_server.url
    async with opened(url, stream_name, Service(), None) as (_, client):
        for shard in (0, 1, 1, 3):
            await keyed(client, shard).who()
        transport = client._transport
        assert isinstance(transport, RedisStreamsTransport)
        info = await transport.get_stream_info()
        assert (info.length, info.groups) == (4, 1)
        assert [one.length for one in info.shards] == [1, 2, 0, 1]
        assert info.last_entry == info.shards[3].last_entry
        entries = await transport.get_all_entries()
        assert len(entries) == 4
        assert entries == sorted(entries, key=lambda one: [*map(int, one.id.split("-"))])
        for shard in (2, 0):
            dead = f"{{{name_of_shard(stream_name, shard)}}}:dead"
            witness.xadd(dead, LETTER, id=f"{9 - shard}-1")
        letters = await transport.dead_letters()
        assert [one.id for one in letters] == ["2:7-1", "9-1"]
        assert len(await transport.dead_letters(1)) == 1
        new = await transport.retry_dead_letter(letters[0].id)
        assert new.startswith("2:")
        for wrong in ("9:7-1", "x:7-1", "2:7-1", "7-1", "9" * 5000 + ":7-1"):
            with pytest.raises(LookupError):
                await transport.retry_dead_letter(wrong)
        assert await transport.purge_dead_letters() == 1
        assert await transport.trim_stream(2) >= 1
        await transport.delete_stream()
        assert lengths(witness, stream_name) == [0] * SHARDS


async def for_ever(*args: object, **named: object) -> None:
    await anyio.sleep_forever()


@pytest.mark.one_server
async def test_what_waits_for_a_shard_is_bounded(
    redis_server: RedisServer, stream_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a peer tells others without waiting, while it can't connect to their shard."""
    monkeypatch.setattr(_waiting, "MOST", 5)
    async with peer(redis_server.url, stream_name, session_id=PEERS[0]) as transport:
        assert transport._shards is not None
        away = transport._shards.lanes.make(3)
        monkeypatch.setattr(away, "start", for_ever)
        for number in range(9):
            await transport.send(Envelope(CallbackRelease([str(number)]), None, "other@3"))
        assert len(away.writer.kept()) == 5
        assert transport.statistics().undeliverable == 4


@pytest.mark.one_server
async def test_why_calls_have_no_answer(
    redis_server: RedisServer, stream_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one shard tells is told though another one doesn't answer."""
    url, service = redis_server.url, Service()
    async with opened(url, stream_name, service, None, session_id=None) as (_, client):
        transport = client._transport
        assert isinstance(transport, RedisStreamsTransport)
        shards = transport._shards
        assert shards is not None
        requests: list[Envelope] = []
        for shard in (1, 3):
            assert await keyed(client, shard).who() == "worker"
            requests.append(Envelope(Request("1", "call", ["who"]), token=b"9-9", route=shard))
        with anyio.fail_after(BOUND), monkeypatch.context() as patch:
            patch.setattr(shards.lanes.make(1).link, "attempt", for_ever)
            first, second, third = await transport.explain([*requests, requests[0]])
        assert first == third
        assert first is not None
        assert first.unknown
        assert second is not None
        assert "a worker" in second.text


async def test_nobody_serves_the_shard_of_a_key(
    redis_server: RedisServer, stream_name: str
) -> None:
    """A call with a key fails at once where that is wanted, and nothing runs later."""
    url, service = redis_server.url, Service()
    async with opened(url, stream_name, service, serve_shards=[0]):
        async with opened(url, stream_name, None, session_id=PEERS[0]) as (client,):
            for shard in (3, 0):
                api = with_call_options(client.get_api(), key=KEYS[shard], fail_fast=True)
                if shard:
                    with pytest.raises(DeliveryError, match="no worker has ever served"):
                        await api.who()
                else:
                    assert await api.who() == "worker"


@pytest.mark.parametrize("shards", [1, SHARDS])
async def test_nothing_is_sent_before_it_can_be_answered(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, shards: int
) -> None:
    """What others send while a peer enters is written once its inbox is there."""
    transport = peer(redis_server.url, stream_name, shards, session_id=PEERS[2])
    entered, found = anyio.Event(), []

    async def enter() -> None:
        async with transport:
            await entered.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(enter)
        await until(lambda: transport._life.entered)
        late = Envelope(Request("1", "call", ["f"]), deadline=anyio.current_time() - 1)
        if transport._life.phase is Phase.ENTERING:
            await transport.send(late)
        await transport.send(Envelope(Request("2", "call", ["f"])))
        found.append(witness.keys(f"*{stream_name}*inbox*"))
        entered.set()
    assert found[0]


async def test_a_shard_that_refuses_is_named(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Who ends because of one is told which one, and can mend that."""
    refusing = name_of_shard(stream_name, 1)
    witness.set(refusing, "no stream")
    options: Any = {"shards": 2, "serve_shards": [1], "session_id": PEERS[0]}
    async with peer(redis_server.url, stream_name, **options) as transport:
        with (
            anyio.fail_after(BOUND),
            pytest.raises(TransportConnectionError, match=f"stream: '{refusing}', or one of"),
        ):
            await transport.receive()
