"""Another server answers than before, which hasn't all that the one before had accepted.

A replica is cut off first, so that it surely misses what comes then; and then the address of the
master leads to it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    RPCTimeoutError,
    current_call,
    with_call_options,
)
from anyio_kkrpc.testing import RedisServer
from tests.bounds import CALL_BOUND

from .proxy import Proxy, proxy
from .test_connections import MODES, QUICK, until

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]


class Pair:
    """A master, its replica, and an address that leads to one of them."""

    def __init__(self, old: RedisServer, new: RedisServer, middle: Proxy) -> None:
        self.url = middle.url
        self.old, self.new = (redis.Redis.from_url(server.url) for server in (old, new))
        self._new_url = new.url
        self._middle = middle

    async def cut_off(self) -> None:
        """Let the replica have all that there is, and nothing of what comes."""
        await until(lambda: self.new.info("replication")["master_link_status"] == "up")
        self.old.wait(1, 0)
        self.new.replicaof("NO", "ONE")

    def refuse(self, refusing: bool = True) -> None:
        """Let nobody connect."""
        self._middle.refuse(refusing)

    async def fail_over(self) -> None:
        self._middle.lead_to(self._new_url)
        await self._middle.cut()


@pytest.fixture
def replica(own_server: RedisServer, server_executable: str) -> Iterator[RedisServer]:
    with RedisServer(server_executable) as server:
        with redis.Redis.from_url(own_server.url) as master:
            master.config_set("repl-diskless-sync-delay", 0)
        with redis.Redis.from_url(server.url) as client:
            client.replicaof("127.0.0.1", own_server.url.rpartition(":")[2].partition("/")[0])
        yield server


@asynccontextmanager
async def pair(old: RedisServer, new: RedisServer) -> AsyncIterator[Pair]:
    async with proxy(old.url) as middle:
        two = Pair(old, new, middle)
        with two.old, two.new:
            yield two


class Gate:
    """Handlers that wait until they may go on."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.attempts: dict[int, int] = {}
        self.open = anyio.Event()

    async def total(self, items: AsyncIterator[int], told: Callable[[int], Awaitable[None]]) -> int:
        self.ran.append(-1)
        await self.open.wait()
        found = 0
        async for item in items:
            found += item
            await told(found)
        return found

    async def work(self, key: int) -> int:
        self.ran.append(key)
        self.attempts[key] = current_call().attempt
        await self.open.wait()
        return key


@MODES
async def test_acknowledged_requests_that_are_missing(
    own_server: RedisServer,
    replica: RedisServer,
    stream_name: str,
    grouped: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All are answered: what was lost is counted and marked, and what runs still isn't run twice."""
    gate, count, running = Gate(), 40, 4
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": grouped, **QUICK}
    results: list[int] = []

    async def call(key: int) -> None:
        results.append(await api.work(key))

    async with (
        pair(own_server, replica) as two,
        RedisStreamsTransport(two.url, **options) as serving,
        RedisStreamsTransport(two.url, **options) as using,
        RPCChannel(serving, expose=gate, max_concurrency=running),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        await until(lambda: not grouped or two.old.exists(stream_name))
        await two.cut_off()
        async with anyio.create_task_group() as group:
            for key in range(count):
                group.start_soon(call, key)
            await until(lambda: two.old.exists(stream_name) and two.old.xlen(stream_name) == count)
            await until(lambda: len(gate.ran) == running)
            await until(lambda: grouped or serving.statistics().received == count)
            await until(lambda: not using._writer._outgoing.ledger.written)
            await two.fail_over()
            await until(lambda: using.statistics().sent_again == count)
            await until(lambda: grouped or serving.statistics().received == 2 * count)
            gate.open.set()
        assert sorted(results) == list(range(count))
        # In a broadcast nobody remembers what has just run.
        assert set(gate.ran) == set(range(count))
        assert len(gate.ran) <= count + (0 if grouped else running)
        again = [key for key in range(count) if gate.attempts[key] == 2]
        assert set(again) >= set(range(count)) - set(gate.ran[:running])
        assert len(again) == len(gate.ran) - running
        assert using.statistics().looked_up == count
        if grouped:
            await until(lambda: two.new.xpending(stream_name, "kkrpc-group")["pending"] == 0)
    (said,) = (one.message for one in caplog.records if "another server" in one.message)
    assert f"{count} requests were open, and {count} of them" in said


async def test_inbox_and_requests_that_are_missing(
    own_server: RedisServer, replica: RedisServer, stream_name: str
) -> None:
    """Who came after the replica was cut off has lost its inbox, too; and others were there first."""
    gate, count, running = Gate(), 20, 4
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, **QUICK}
    results: list[int] = []

    async def call(key: int) -> None:
        results.append(await api.work(key))

    async with (
        pair(own_server, replica) as two,
        RedisStreamsTransport(two.url, **options) as serving,
        RPCChannel(serving, expose=gate, max_concurrency=running),
    ):
        await until(lambda: two.old.exists(stream_name))
        two.old.xdel(stream_name, two.old.xadd(stream_name, {"left": "out"}))
        await two.cut_off()
        async with (
            RedisStreamsTransport(two.url, **options) as using,
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            api = channel.get_api()
            async with anyio.create_task_group() as group:
                for key in range(count):
                    group.start_soon(call, key)
                await until(lambda: two.old.xlen(stream_name) == count)
                await until(lambda: len(gate.ran) == running)
                await until(lambda: not using._writer._outgoing.ledger.written)
                # Others were faster.
                two.new.xadd(stream_name, {"of": "another"})
                (entry,) = two.new.xreadgroup("kkrpc-group", "other", {stream_name: ">"})[0][1]
                two.new.xack(stream_name, "kkrpc-group", entry[0])
                await two.fail_over()
                await until(lambda: using.statistics().sent_again == count)
                gate.open.set()
            assert sorted(results) == list(range(count))


async def test_requests_of_each_kind(
    own_server: RedisServer, replica: RedisServer, stream_name: str
) -> None:
    """What is sent again keeps its order. To one peer it is, too. What its caller has left meanwhile
    isn't. One with a stream and a function runs on with them.
    """
    gate, results = Gate(), dict[int, int]()
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, **QUICK}

    async def call(key: int, api: Any) -> None:
        results[key] = await api.work(key)

    async def left(key: int, scope: anyio.CancelScope) -> None:
        with scope:
            await addressed.work(key)

    async def numbers() -> AsyncIterator[int]:
        for number in range(5):
            yield number

    async def total() -> None:
        results[-1] = await api.total(numbers(), told.append)

    async with (
        pair(own_server, replica) as two,
        RedisStreamsTransport(two.url, **options) as serving,
        RedisStreamsTransport(two.url, **options) as using,
        RPCChannel(serving, expose=gate, max_concurrency=1),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        api, told = channel.get_api(), list[int]()
        await until(lambda: two.old.exists(stream_name))
        await two.cut_off()
        async with anyio.create_task_group() as group:
            group.start_soon(total)
            await until(lambda: gate.ran == [-1])
            scope = anyio.CancelScope()
            addressed = channel.get_api(to=serving.session_id)
            for key in range(9):
                if key == 3:
                    group.start_soon(left, key, scope)
                else:
                    group.start_soon(call, key, addressed if key % 2 else api)
                await until(lambda key=key: len(using._inbound.waiting()) == key + 2)
            await until(lambda: not using._writer._outgoing.ledger.written)
            await until(lambda: serving._lane.addressed.received == 4)
            two.refuse()
            await two.fail_over()
            scope.cancel()
            two.refuse(False)
            await until(lambda: using.statistics().sent_again == 9)
            await until(lambda: two.new.xlen(stream_name) == 6)
            entries = [json.loads(fields[b"json"]) for _, fields in two.new.xrange(stream_name)]
            assert [entry["a"][0] for entry in entries[1:]] == [0, 2, 4, 6, 8]
            # Three requests, behind the cancel of another one, which may come once more.
            await until(lambda: serving._lane.addressed.received >= 8)
            gate.open.set()
        assert results == {-1: 10, **{key: key for key in range(9) if key != 3}}
        assert sorted(gate.ran) == sorted(results)
        assert told == [0, 1, 3, 6, 10]


@pytest.mark.parametrize("lost", ["items", "end"])
async def test_items_that_are_lost(
    own_server: RedisServer, replica: RedisServer, stream_name: str, lost: str
) -> None:
    """The reader of a stream is told which items were lost, or that its end was."""
    gates = [anyio.Event() for _ in range(2)]
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, **QUICK}

    async def numbers() -> AsyncIterator[int]:
        for number in range(5):
            yield number
        await gates[0].wait()
        for number in range(5, 8):
            yield number
        if lost == "items":
            await gates[1].wait()
            yield 8

    async with (
        pair(own_server, replica) as two,
        pair(own_server, replica) as of_reader,
        RedisStreamsTransport(two.url, **options) as serving,
        RedisStreamsTransport(of_reader.url, **options) as using,
        RPCChannel(serving, expose={"numbers": numbers}),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        stream = await channel.get_api().numbers()
        found = [await anext(stream) for _ in range(5)]
        await two.cut_off()
        of_reader.refuse()
        await of_reader.fail_over()
        gates[0].set()
        # The three items, or these and the end.
        inbox = f"{{{stream_name}}}:inbox:{using.session_id}"
        await until(
            lambda: _ends_with(two.old, inbox, b'"v":7' if lost == "items" else b'"d":true')
        )
        await until(lambda: not serving._writer._outgoing.ledger.written)
        await two.fail_over()
        of_reader.refuse(False)
        gates[1].set()
        with pytest.raises(DeliveryError) as caught:
            async for item in stream:
                found.append(item)
    assert found == [0, 1, 2, 3, 4]
    expected = {
        "items": "items 5 to 7 of the stream were lost",
        "end": "what came behind 5 items of the stream was lost",
    }
    assert str(caught.value) == expected[lost]


def _ends_with(server: redis.Redis, inbox: str, part: bytes) -> bool:
    entries = server.xrevrange(inbox, count=1)
    return bool(entries) and part in entries[0][1].get(b"json", b"")


async def test_confirmed_by_replicas(
    own_server: RedisServer, replica: RedisServer, stream_name: str
) -> None:
    """A one-way call returns once so many have it. Where there are fewer it says so, in time."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, **QUICK}
    async with (
        pair(own_server, replica) as two,
        RedisStreamsTransport(two.url, replicas_to_confirm=1, **options) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        api = with_call_options(channel.get_api(), reply=False)
        for count in range(1, 6):
            await api.work(count)
            assert two.new.xlen(stream_name) == count
        await two.cut_off()
        await until(lambda: not two.old.info("replication")["connected_slaves"])
        with pytest.raises(RPCTimeoutError, match="0 of 1 replicas have confirmed it"):
            await with_call_options(api, timeout=1.0, reply=False).work(6)
        assert two.old.xlen(stream_name) == 6
