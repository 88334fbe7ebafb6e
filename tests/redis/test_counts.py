"""What a call costs, counted and not timed, so that a busy machine can't make it fail."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from threading import Event, get_ident
from time import monotonic
from typing import Any

import anyio
import pytest
import redis
from anyio.lowlevel import current_token

from anyio_kkrpc import (
    MemoryTransport,
    RedisStreamsTransport,
    RPCChannel,
    with_call_options,
)
from anyio_kkrpc.redis._connection import _resolver
from anyio_kkrpc.redis._connection._socket import PlainSocket
from anyio_kkrpc.redis._connection._watch import Watch
from anyio_kkrpc.testing._server import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]

CALLS = 640
IN_FLIGHT = 64
# XADDs of a call at 64 in flight. How many replies share one depends on how many requests were read
# together: a machine that is busy makes that fewer, never more, so the best of some tries counts.
XADDS = 1.1 * 1.03
TRIES = 6
ITEMS = 2000


class Api:
    async def echo(self, value: Any) -> Any:
        return value


async def calls(api: Any, server: RedisServer) -> None:
    """Make ``CALLS`` calls, 64 at a time.

    The server gets the first 64 at once, however long it takes to make them: one that gets each by
    itself answers each by itself, and then nothing is ever read or written together.
    """

    async def some() -> None:
        for _ in range(CALLS // IN_FLIGHT):
            await api.echo("x" * 100)

    server.pause()
    try:
        async with anyio.create_task_group() as group:
            for _ in range(IN_FLIGHT):
                group.start_soon(some)
            await anyio.wait_all_tasks_blocked()
            server.resume()
    finally:
        server.resume()


def commands(witness: redis.Redis) -> dict[str, int]:
    """Return how often the server has run each command."""
    return {
        name.removeprefix("cmdstat_"): stats["calls"]
        for name, stats in witness.info("commandstats").items()
    }


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the writes to sockets."""
    counter: Counter[str] = Counter()
    send = PlainSocket.send_nowait

    def counting(self: PlainSocket, data: bytes) -> int:
        counter["writes"] += 1
        return send(self, data)

    monkeypatch.setattr(PlainSocket, "send_nowait", counting)
    return counter


@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_commands_and_writes_per_call(
    own_server: RedisServer, stream_name: str, written: Counter[str], group: bool
) -> None:
    """One XADD for each request, and few for what is answered together; a group's XACK likewise."""
    witness = redis.Redis.from_url(own_server.url)
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": group}
    async with (
        RedisStreamsTransport(own_server.url, **options) as served,
        RPCChannel(served, expose=Api()),
        RedisStreamsTransport(own_server.url, **options) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        await calls(api, own_server)
        for _ in range(TRIES):
            written.clear()
            witness.config_resetstat()
            await calls(api, own_server)
            counts, writes = commands(witness), written["writes"]
            if counts["xadd"] <= XADDS * CALLS:
                break
        for _ in range(TRIES):
            witness.config_resetstat()
            written.clear()
            for _ in range(100):
                await api.echo("x" * 100)
            alone, alone_writes = commands(witness), written["writes"]
            if alone["xadd"] == 200:
                break  # else a sign of life came between, as it does when they take long
    witness.close()
    housekeeping = 30
    assert CALLS < counts["xadd"] <= XADDS * CALLS
    reads = counts.get("xread", 0) + counts.get("xreadgroup", 0)
    assert reads <= CALLS // 4
    assert counts.get("xack", 0) <= CALLS // 8
    assert writes <= CALLS // 3  # those that ask for what comes next, too
    assert sum(counts.values()) <= 1.7 * CALLS + housekeeping
    # A lone call: request and reply are added once, each is read once, and one is acknowledged.
    assert alone["xadd"] == 200
    assert alone.get("xack", 0) == (100 if group else 0)
    assert alone.get("xread", 0) + alone.get("xreadgroup", 0) <= 210
    assert sum(alone.values()) <= (500 if group else 400) + housekeeping
    assert alone_writes <= 400 + housekeeping


async def serve(url: str, stream: str, ready: Callable[[], object], stopped: Event) -> None:
    options: dict[str, Any] = {"stream": stream, "use_consumer_group": True}
    async with RedisStreamsTransport(url, **options) as served, RPCChannel(served, expose=Api()):
        ready()
        await anyio.to_thread.run_sync(stopped.wait)


async def test_system_calls_of_a_lone_call(
    redis_server: RedisServer, stream_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes, two reads, and few looks at the sockets; none is registered anew.

    How often the loop looks depends on what comes together: three to four times without a debugger,
    says strace, which makes seven to eight calls. The event loop of asyncio is written in Python:
    there they can be counted.
    """
    loop: Any = current_token().native_token
    if type(loop).__module__.partition(".")[0] != "asyncio":
        pytest.skip("of asyncio only")
    counter: Counter[str] = Counter()
    here = get_ident()

    def count(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def counting(*args: Any) -> Any:
            counter[name] += get_ident() == here
            return method(*args)

        monkeypatch.setattr(owner, name, counting, raising=False)

    ready, stopped = Event(), Event()
    url, calls = redis_server.url, 200
    async with anyio.create_task_group() as group:
        worker = partial(serve, url, stream_name, ready.set, stopped)
        group.start_soon(anyio.to_thread.run_sync, partial(anyio.run, worker, backend="trio"))
        await anyio.to_thread.run_sync(ready.wait)
        try:
            async with (
                RedisStreamsTransport(url, stream=stream_name, use_consumer_group=True) as used,
                RPCChannel(used, timeout=CALL_BOUND) as channel,
            ):
                api = channel.get_api()
                await api.echo(0)
                for name in ("send", "recv"):
                    count(socket.socket, name)
                for name in ("select", "register", "modify", "unregister"):
                    count(loop._selector, name)
                for number in range(calls):
                    await api.echo(number)
                found = {name: times / calls for name, times in counter.items()}
                monkeypatch.undo()
        finally:
            stopped.set()
    assert found.keys() & {"register", "modify", "unregister"} == set()
    assert 2 <= found["send"] < 2.1
    assert 2 <= found["recv"] < 2.1
    assert 1 < found["select"] < 7


class Streaming:
    async def count(self, number: int) -> AsyncIterator[int]:
        for item in range(number):
            yield item

    async def total(self, items: AsyncIterator[int]) -> int:
        return sum([item async for item in items])


@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_commands_per_item(own_server: RedisServer, stream_name: str, group: bool) -> None:
    """What a source yields without waiting is added with few XADDs, in either direction."""
    witness = redis.Redis.from_url(own_server.url)
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": group}
    async with (
        RedisStreamsTransport(own_server.url, **options) as served,
        RPCChannel(served, expose=Streaming()),
        RedisStreamsTransport(own_server.url, **options) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        for number in (10, ITEMS):  # by the first ones each learns what the other reads
            witness.config_resetstat()
            assert [item async for item in api.count(number)] == list(range(number))
            read = commands(witness)
            witness.config_resetstat()
            assert await api.total(Streaming().count(number)) == sum(range(number))
            passed = commands(witness)
    witness.close()
    housekeeping = 30
    for counts in (read, passed):
        assert 0 < counts["xadd"] <= 0.1 * ITEMS
        assert sum(counts.values()) <= 0.2 * ITEMS + housekeeping


async def test_idle_peers_cost_nothing_per_call(own_server: RedisServer, stream_name: str) -> None:
    """Peers that are attached and don't serve are sent nothing for the calls of others."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True}
    async with (
        RedisStreamsTransport(own_server.url, **options) as served,
        RPCChannel(served, expose=Api()),
        RedisStreamsTransport(own_server.url, **options) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
        RedisStreamsTransport(own_server.url, **options) as idle,
        RPCChannel(idle),
    ):
        await calls(channel.get_api(), own_server)
        before = idle.statistics().received
        await calls(channel.get_api(), own_server)
        assert idle.statistics().received == before == 0


@pytest.mark.parametrize("shards", [1, 4])
async def test_commands_of_an_idle_caller(
    own_server: RedisServer, stream_name: str, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.3 a second, all counted, however many shards the stream has: its read, and one thing that
    shows that the other connection lives, be it the inbox, the clock or what the server is. Here
    all times are shorter by the same factor; a busy machine makes them longer.
    """
    faster = 40.0
    monkeypatch.setattr(Watch, "look", lambda self: anyio.lowlevel.checkpoint())  # none is too slow
    monkeypatch.setattr(_resolver, "_ALONE", _resolver._ALONE / faster)
    witness = redis.Redis.from_url(own_server.url)
    defaults = RedisStreamsTransport()._options
    times = ("block_timeout", "health_check_interval", "inbox_ttl")
    options: dict[str, Any] = {name: getattr(defaults, name) / faster for name in times}
    options |= {"use_consumer_group": shards > 1, "shards": shards}
    async with (
        RedisStreamsTransport(own_server.url, stream=stream_name, **options) as used,
        RPCChannel(used),
    ):
        before: Counter[str] = Counter()
        with anyio.fail_after(BOUND):
            while before["xread"] < 2 or not before["pexpire"]:
                await anyio.sleep(0.05)
                before, began = Counter(commands(witness)), monotonic()
            counts: Counter[str] = Counter()
            while counts["xread"] < 8 or not (counts["time"] and counts["role"]):
                await anyio.sleep(0.05)
                counts = Counter(commands(witness)) - before
        seconds = (monotonic() - began) * faster
    witness.close()
    assert counts.keys() == {"xread", "pexpire", "time", "role", "info"}
    del counts["info"]  # what this test asks
    one_more_of_each = 4
    assert sum(counts.values()) <= 0.3 * seconds + one_more_of_each


@pytest.mark.parametrize("shards", [1, 4])
async def test_commands_of_an_idle_worker(
    own_server: RedisServer, stream_name: str, shards: int
) -> None:
    """Its reads tell that all is well, so it keeps its inboxes in one of four rounds; nothing is
    pending, so nobody has a lease to look for what is lost.
    """
    witness = redis.Redis.from_url(own_server.url)
    options: dict[str, Any] = {"block_timeout": 0.1, "health_check_interval": 0.2}
    options |= {"claim_idle": 0.5, "use_consumer_group": True, "shards": shards}
    async with (
        RedisStreamsTransport(own_server.url, stream=stream_name, **options) as served,
        RPCChannel(served, expose=Api()),
    ):
        with anyio.fail_after(BOUND):
            while commands(witness).get("xpending", 0) < 4 * shards:  # the second look of each
                await anyio.sleep(0.1)
        assert len(witness.client_list()) == 1 + 3 * shards
        witness.config_resetstat()
        counts: Counter[str] = Counter()
        with anyio.fail_after(BOUND):
            while counts["xreadgroup"] < 24 * shards:
                await anyio.sleep(0.1)
                counts = Counter(commands(witness))
    witness.close()
    assert counts["xpending"] > 0
    rounds = counts["xreadgroup"] / 2
    some = 3 * shards
    assert (
        counts["xrevrange"] <= some
    )  # of a shard that was the last to look; else it is a fourth of all
    assert 0 < counts["pexpire"] <= rounds / 2 + some
    assert 0 < counts["time"] <= rounds / 2 + some
    assert counts["xinfo|groups"] <= rounds / 4 + some


# Tasks of a peer that only calls, its channel's among them; what else a peer may need starts later.
TASKS = {
    *("writer", "write", "read", "watch", "where", "repeats", "inbox", "inbox upkeep", "look"),
    *("housekeeping", "outbox", "deadlines"),
}


@pytest.mark.one_server
async def test_tasks_of_a_caller(redis_server: RedisServer, stream_name: str) -> None:
    """Each costs memory: a peer that only calls has those that it needs, before and after a call."""

    def tasks() -> list[str]:
        names = [task.name or "" for task in anyio.get_running_tasks()]
        names = [name for name in names if name.startswith("anyio_kkrpc")]
        return sorted(name.removeprefix("anyio_kkrpc ").removeprefix("redis ") for name in names)

    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True
        ) as used,
        RPCChannel(used) as channel,
    ):
        await anyio.wait_all_tasks_blocked()
        assert tasks() == sorted(TASKS)
        await with_call_options(channel.get_api(), reply=False).echo(1)
        await anyio.wait_all_tasks_blocked()
        assert tasks() == sorted(TASKS)


async def test_objects_of_a_call_in_flight() -> None:
    """A call that waits keeps few objects beside its task, and none after it."""
    loop = current_token().native_token
    if isinstance(loop, asyncio.AbstractEventLoop):
        loop.set_debug(False)  # which keeps a stack for each future
    count = 500
    a, b = MemoryTransport.pair(codec="json")
    async with a, b, RPCChannel(b), RPCChannel(a) as channel:
        api = channel.get_api()

        async def objects_of(function: Any, *args: Any) -> int:
            gc.collect()
            before = len(gc.get_objects())
            async with anyio.create_task_group() as group:
                for _ in range(count):
                    group.start_soon(function, *args)
                await anyio.wait_all_tasks_blocked()
                gc.collect()
                found = len(gc.get_objects()) - before
                group.cancel_scope.cancel()
            return found

        tasks = await objects_of(anyio.Event().wait)
        calls = await objects_of(api.echo, 1)
        assert 0 < (calls - tasks) / count < 20
        assert channel.statistics().calls == 0
