"""Workers of a group and what is pending: who looks for it, when it is delivered again, how much
at once.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import DeliveryError, RedisStreamsTransport, RPCChannel, current_call
from anyio_kkrpc.redis._connection._errors import RedisError, meaning_of
from anyio_kkrpc.redis._group import _claiming, _keeping
from anyio_kkrpc.redis._group import _claims as _group
from anyio_kkrpc.redis._group._claims import Groups, Look
from anyio_kkrpc.redis._stream._keys import DELAYED, Keys
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]

GROUP = "kkrpc-group"


class Api:
    def __init__(self) -> None:
        self.attempts: dict[str, int] = {}

    def note(self, key: str) -> int:
        self.attempts[key] = current_call().attempt
        return current_call().attempt


def worker(server: RedisServer, stream: str, **options: Any) -> RedisStreamsTransport:
    return RedisStreamsTransport(server.url, stream=stream, use_consumer_group=True, **options)


def lose(
    witness: redis.Redis, stream: str, *, owner: str = "gone", deliveries: int = 1, idle: float = 0
) -> Callable[[str], bytes]:
    """Return what has a request for `note` taken by a worker that is never heard of again."""

    def ask(key: str) -> bytes:
        record = json.dumps({"t": "q", "id": key, "op": "call", "p": ["note"], "a": [key]})
        entry_id: bytes = witness.xadd(stream, {"from": "nobody", "json": record})
        try:
            witness.xgroup_create(stream, GROUP, "0")
        except redis.ResponseError:
            pass
        witness.xreadgroup(GROUP, owner, {stream: ">"})
        witness.xclaim(
            stream, GROUP, owner, 0, [entry_id],
            idle=round(idle * 1000), retrycount=deliveries, justid=True,
        )  # fmt: skip
        return entry_id

    return ask


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


async def test_one_worker_looks(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many workers there are, one looks for what was lost; when it leaves, another does."""
    looks: Counter[Groups] = Counter()
    look = Groups.look

    async def count(self: Groups, *ids: Any) -> Look:
        looks[self] += 1
        return await look(self, *ids)

    monkeypatch.setattr(Groups, "look", count)
    lose(witness, stream_name, owner="holds", deliveries=4)("held")  # for 40 seconds
    workers = [worker(redis_server, stream_name, claim_idle=5.0) for _ in range(4)]
    leaders: list[RedisStreamsTransport] = []
    async with anyio.create_task_group() as group:

        async def serve(transport: RedisStreamsTransport) -> None:
            async with transport, RPCChannel(transport, expose=Api()):
                await anyio.sleep_forever()

        for transport in workers:
            group.start_soon(serve, transport)
        for leading in (1, 2):
            await until(lambda n=leading: len(looks) == n and min(looks.values()) >= 1)
            leaders += [w for w in workers if w._lane.worker.groups in looks and w not in leaders]
            await leaders[-1].destroy()
        group.cancel_scope.cancel()
    assert len(leaders) == 2


async def test_seen_to_live(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker's idle time begins anew though nothing comes, and though it has no room."""
    for module in (_claiming, _keeping):
        monkeypatch.setattr(module, "LIVES", 0.1)
    busy = anyio.Event()

    class Waiting:
        async def wait(self) -> None:
            busy.set()
            await anyio.sleep_forever()

    async def starts_anew() -> None:
        before, times = 0, 0
        while times < 3:
            for consumer in witness.xinfo_consumers(stream_name, GROUP):
                times += consumer["idle"] < before
                before = consumer["idle"]
            await anyio.sleep(0.01)

    # What makes it last long to take over others' requests makes none of it less frequent.
    slow = {"claim_idle": 1e6, "block_timeout": 300.0}
    with anyio.fail_after(BOUND):
        async with (
            worker(redis_server, stream_name, **slow) as served,
            RPCChannel(served, expose=Waiting(), max_concurrency=1, timeout=None),
            worker(redis_server, stream_name) as used,
            RPCChannel(used, timeout=None) as channel,
            anyio.create_task_group() as group,
        ):
            await until(lambda: witness.exists(stream_name))
            await starts_anew()
            group.start_soon(channel.get_api().wait)
            await busy.wait()
            await starts_anew()
            group.cancel_scope.cancel()


async def test_pauses_grow(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What was delivered twice, and may have killed two workers, waits twice as long, and so on."""
    api, idle = Api(), 100.0
    expected = {}
    for deliveries, factor in [(1, 1), (2, 2), (3, 3)]:  # 3: no more than 300 s
        for more, claimed in [(-50, False), (50, True)]:
            key = f"{deliveries}:{claimed}"
            lose(witness, stream_name, deliveries=deliveries, idle=idle * factor + more)(key)
            if claimed:
                expected[key] = deliveries + 1
    async with worker(redis_server, stream_name, claim_idle=idle) as served:
        async with RPCChannel(served, expose=api):
            await until(lambda: len(api.attempts) >= len(expected))
    assert api.attempts == expected


async def test_introduction_of_a_newer_version(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What it tells beside its session ends no worker that has its name."""
    key = Keys.of(stream_name).worker(GROUP.encode(), b"me")
    options: dict[str, Any] = {"consumer_name": "me", "health_check_interval": 0.1}
    async with worker(redis_server, stream_name, **options) as me, RPCChannel(me, expose=Api()):
        with anyio.fail_after(BOUND):
            while not witness.exists(key):
                await anyio.sleep(0.01)
            added = witness.xadd(key, {"session": "other", "since": "1"}, maxlen=1)
            while witness.xrevrange(key, count=1)[0][0] == added:
                await anyio.sleep(0.01)


async def test_two_of_one_name(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both say so, once; one that takes the place of another one doesn't."""
    key = Keys.of(stream_name).worker(GROUP.encode(), b"me")

    def told() -> list[str]:
        texts = [record.getMessage() for record in caplog.records]
        return [text for text in texts if "lives twice" in text]

    def me(name: str) -> RedisStreamsTransport:
        options: dict[str, Any] = {"session_id": name, "health_check_interval": 0.25}
        return worker(redis_server, stream_name, consumer_name="me", **options)

    async def introduced(times: int) -> None:
        seen: set[Any] = set()
        with anyio.fail_after(BOUND):
            while len(seen) < times:
                seen.update(entry_id for entry_id, _ in witness.xrange(key))
                await anyio.sleep(0.01)

    async with me("before") as before, RPCChannel(before, expose=Api()):
        await introduced(1)
    async with me("one") as one, RPCChannel(one, expose=Api()):
        await introduced(4)
        assert told() == []
        async with me("two") as two, RPCChannel(two, expose=Api()):
            await until(lambda: len(told()) == 2)
            await introduced(6)
    assert [sum(f"peer '{name}' has" in text for text in told()) for name in ("one", "two")] == [
        1,
        1,
    ]


async def test_restarted_under_its_name(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What a worker had taken is its own at once, but what it had taken twice may have killed it."""
    api = Api()
    for deliveries in (1, 2, 3):
        lose(witness, stream_name, owner="me", deliveries=deliveries, idle=1)(str(deliveries))
    lose(witness, stream_name, owner="me", deliveries=2, idle=250)("long ago")
    async with worker(redis_server, stream_name, claim_idle=100, consumer_name="me") as served:
        async with RPCChannel(served, expose=api):
            await until(lambda: len(api.attempts) == 2)
            assert api.attempts == {"1": 2, "long ago": 3}
            await until(lambda: served.statistics().outstanding == 0)
            await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 2)
            left = witness.xpending_range(stream_name, GROUP, "-", "+", 10)
            assert [(item["consumer"], item["times_delivered"]) for item in left] == [
                (DELAYED, 2),
                (DELAYED, 3),
            ]
            assert all(item["time_since_delivered"] >= 1000 for item in left)
    # That doesn't keep the consumer from being removed.
    assert b"me" not in [c["name"] for c in witness.xinfo_consumers(stream_name, GROUP)]


async def test_more_of_its_own_than_a_page(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that comes back runs all that it had, though it asks for little at a time."""
    monkeypatch.setattr(_group, "PAGE", 10)
    keys = [str(n) for n in range(95)]
    for key in keys:
        lose(witness, stream_name, owner="me")(key)
    api = Api()
    async with worker(
        redis_server, stream_name, consumer_name="me", max_queue_size=7, claim_idle=1000
    ) as served:
        async with RPCChannel(served, expose=api, max_concurrency=2):
            await until(lambda: len(api.attempts) == len(keys))
            await until(lambda: served.statistics().outstanding == 0)
            assert served.statistics().claimed == len(keys)
    assert set(api.attempts.values()) == {2}


async def test_replies_are_bounded_in_bytes(own_server: RedisServer, stream_name: str) -> None:
    """Large requests come a few at a time, whether they are a worker's own or anybody's.

    Redis cuts off whom it would have to send more than `client-output-buffer-limit`.
    """

    class Sizes:
        def __init__(self) -> None:
            self.attempts: list[int] = []

        def note(self, text: str) -> None:
            assert len(text) == 200_000
            self.attempts.append(current_call().attempt)

    api = Sizes()
    with redis.Redis.from_url(own_server.url) as client:
        for number in range(20):
            record = {
                "t": "q",
                "id": f"{number}",
                "op": "call",
                "p": ["note"],
                "a": ["x" * 200_000],
            }
            client.xadd(stream_name, {"from": "nobody", "json": json.dumps(record)})
        client.xgroup_create(stream_name, GROUP, "0")
        for name in ("me", "gone"):
            assert client.xreadgroup(GROUP, name, {stream_name: ">"}, count=10)
        pending = client.xpending_range(stream_name, GROUP, "-", "+", 10, "gone")
        lost = [item["message_id"] for item in pending]
        client.xclaim(stream_name, GROUP, "gone", 0, lost, idle=2_000_000, justid=True)
        client.config_set("client-output-buffer-limit", "normal 500000 0 0")
    # A machine that gives one of the two no time must not look like a server that is cut off.
    patient = {"health_check_interval": BOUND, "claim_idle": 1000}
    async with worker(own_server, stream_name, consumer_name="me", **patient) as served:
        async with RPCChannel(served, expose=api):
            await until(lambda: len(api.attempts) >= 20)
            assert served.statistics().reconnects == 0
    assert set(api.attempts) == {2}


async def test_dead_letters_that_redis_refuses(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker lives and takes the rest; what is given up stays until it can be a dead letter."""
    dead = Keys.of(stream_name).dead
    witness.set(dead, "no stream")
    api = Api()
    async with (
        worker(redis_server, stream_name, claim_idle=0.2, max_deliveries=2) as served,
        worker(redis_server, stream_name) as used,
        RPCChannel(used) as channel,
    ):
        errors: list[DeliveryError] = []

        async def ask() -> None:
            with pytest.raises(DeliveryError, match="could not become a dead letter") as caught:
                await channel.get_api().note("given up")
            errors.append(caught.value)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: witness.xlen(stream_name))
            (poison,) = (entry_id for entry_id, _ in witness.xrange(stream_name))
            # It was taken twice, and nobody was heard of since.
            witness.xgroup_create(stream_name, GROUP, "0")
            witness.xreadgroup(GROUP, "gone", {stream_name: ">"})
            witness.xclaim(
                stream_name, GROUP, "gone", 0, [poison], idle=10_000, retrycount=2, justid=True
            )
            lose(witness, stream_name, idle=10)("innocent")
            async with RPCChannel(served, expose=api):
                await until(lambda: errors)
                await until(lambda: api.attempts.get("innocent") == 2)
                assert await channel.get_api().note("new") == 1
                assert served.statistics().undeliverable >= 1
                assert served.statistics().dead_lettered == 0
                assert "WRONGTYPE" in caplog.text
                witness.delete(dead)
                await until(lambda: served.statistics().dead_lettered == 1)
        (letter,) = await used.dead_letters()
        assert (letter.entry_id, letter.attempts) == (poison.decode(), 2)
    assert "given up" not in api.attempts
    assert not [r for r in caplog.records if r.levelno > logging.ERROR]


async def test_nobody_has_the_lease_for_ever(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A worker that was killed while it looked is followed, and what it had is taken over."""
    lose(witness, stream_name, idle=0)("lost")
    lease = Keys.of(stream_name).claimer(GROUP.encode())
    witness.xadd(lease, {"claimer": "gone"})
    witness.pexpire(lease, 300)
    api = Api()
    async with worker(redis_server, stream_name, claim_idle=0.5) as served:
        async with RPCChannel(served, expose=api):
            await until(lambda: api.attempts)
    assert api.attempts == {"lost": 2}
    assert not witness.exists(lease)


async def test_what_a_leaving_worker_never_saw(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It wakes a worker that rests, since nothing was pending when that looked last."""
    for module in (_claiming, _keeping):
        monkeypatch.setattr(module, "LIVES", 1e6)
    api, record = Api(), json.dumps({"t": "q", "id": "1", "op": "call", "p": ["note"], "a": ["x"]})
    async with worker(redis_server, stream_name, claim_idle=1000.0) as stays:
        async with RPCChannel(stays, expose=api):
            async with worker(redis_server, stream_name, claim_idle=1000.0) as leaves:
                async with RPCChannel(leaves, expose=Api()):
                    for one in (stays, leaves):
                        await until(lambda one=one: not one._lane.worker.takeover.pending)
                    read = witness.pipeline()  # at once: nobody else reads it
                    read.xadd(stream_name, {"from": "nobody", "json": record})
                    read.xreadgroup(GROUP, leaves.consumer_name, {stream_name: ">"})
                    read.execute()
            await until(lambda: api.attempts)
    assert api.attempts == {"x": 1}


async def test_lease_key_that_is_no_stream(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the lease can't be kept, each worker looks, and says so once."""
    lease = Keys.of(stream_name).claimer(GROUP.encode())
    witness.set(lease, "no stream")
    api = Api()
    async with worker(redis_server, stream_name, claim_idle=0.05) as served:
        async with RPCChannel(served, expose=api):
            for n in range(3):
                lose(witness, stream_name, idle=1)(str(n))
                await until(lambda n=n: len(api.attempts) == n + 1)
    told = [r.getMessage() for r in caplog.records if "looks for lost requests" in r.getMessage()]
    assert len(told) == 1
    assert lease.decode() in told[0]


@pytest.mark.parametrize("option", ["maxmemory", "min-replicas-to-write"])
async def test_lease_that_is_refused_for_now(
    own_server: RedisServer, stream_name: str, option: str, caplog: pytest.LogCaptureFixture
) -> None:
    """That passes, and is no reason for each worker to look."""
    async with worker(own_server, stream_name) as served:
        with redis.Redis.from_url(own_server.url) as admin:
            admin.config_set(option, 1)
            with pytest.raises(RedisError) as caught:
                await served._lane.worker.groups.lead()
            assert meaning_of(caught.value).passes
            admin.config_set(option, 0)
        assert await served._lane.worker.groups.lead()
    assert "looks for lost requests" not in caplog.text


async def test_later_searches_cost_less(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one search has seen is looked at eight pages at a time by the next one; all is found."""
    monkeypatch.setattr(_group, "PAGE", 5)
    looks: list[tuple[Any, ...]] = []
    look = Groups.look

    async def record(self: Groups, *ids: Any) -> Look:
        looks.append(ids)
        return await look(self, *ids)

    monkeypatch.setattr(Groups, "look", record)
    ask = lose(witness, stream_name, owner="holds", idle=0)
    held = [ask(str(n)) for n in range(123)]
    api = Api()
    async with worker(redis_server, stream_name, claim_idle=2000) as served:
        async with RPCChannel(served, expose=api):
            await until(lambda: len(looks) == 25)
            looks.clear()
            claimer = served._lane.worker._claimer
            assert claimer is not None
            # One of each part is lost: seen three times, seen once, new.
            lost = [held[7], held[122], ask("new")]
            witness.xclaim(stream_name, GROUP, "holds", 0, lost, idle=3_000_000, justid=True)
            await claimer._search()
            await until(lambda: len(api.attempts) == 3)
            assert set(api.attempts) == {"7", "122", "new"}
            assert len(looks) == 3 + 1
            assert [end for _, end in looks] == [held[39], held[79], held[119], None]
