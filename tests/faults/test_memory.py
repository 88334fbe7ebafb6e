"""Much of everything: memory stays bounded, here and in Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import anyio
import psutil
import pytest
import redis

from anyio_kkrpc import OverloadedError, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

MIB = 1 << 20


class Api:
    def __init__(self) -> None:
        self.ran = 0

    def work(self, n: int) -> int:
        self.ran += 1
        return n


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.02)


async def test_million_entries(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A stream with a million entries costs a peer that connects nothing."""
    script = """
    for i = 1, tonumber(ARGV[1]) do
      redis.call('XADD', KEYS[1], '*', 'from', 'x', 'json', ARGV[2])
    end
    """
    request = '{"t":"q","id":"1","op":"call","p":["work"],"a":[1],"o":true}'
    for _ in range(20):
        witness.eval(script, 1, stream_name, 50_000, request)
    before = resident()
    api = Api()
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as serving,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        assert (await using.get_stream_info()).length == 1_000_000
        assert await client.get_api().work(1) == 1
        assert api.ran == 1
        assert resident() - before < 30 * MIB
        assert await using.trim_stream(10) == 999_991
    witness.delete(stream_name)


@pytest.mark.one_server
@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_abandoned_clients(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """Ten thousand clients that ask and vanish, with and without an inbox, leave nothing."""
    inbox = f"{{{stream_name}}}:inbox:"
    api = Api()
    async with (
        RedisStreamsTransport(
            redis_server.url,
            stream=stream_name,
            session_id="serving",  # a random one might look like a client's
            use_consumer_group=grouped,
            max_queue_size=20_000,
        ) as serving,
        RPCChannel(serving, expose=api) as server,
    ):
        pipe = witness.pipeline()
        for n in range(10_000):
            request = b'{"t":"q","id":"%d","op":"call","p":["work"],"a":[1]}' % n
            if n % 2:
                pipe.xadd(f"{inbox}c{n}", {"hint": "hello"})
                pipe.pexpire(f"{inbox}c{n}", 2000)
            pipe.xadd(stream_name, {"from": f"c{n}", "json": request})
        pipe.execute()
        await until(lambda: api.ran == 10_000)
        await until(lambda: serving.statistics().undeliverable >= 5000)
        assert server.statistics().handlers == 0
        assert len(serving._writer.commands._inboxes.by_peer) <= 4096
        await until(lambda: witness.keys(f"{inbox}c*") == [])
        if grouped:
            await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)


async def test_client_that_sends_faster_than_it_is_served(
    redis_server: RedisServer, stream_name: str
) -> None:
    """In a broadcast what finds no room is refused, and memory doesn't grow with what is sent."""

    class Slow:
        async def work(self, payload: str) -> None:
            await anyio.sleep(0.01)

    before = resident()
    outcomes = {"served": 0, "refused": 0}
    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, max_queue_bytes=MIB, max_len=100
        ) as serving,
        RedisStreamsTransport(redis_server.url, stream=stream_name, max_len=100) as using,
        RPCChannel(serving, expose=Slow(), max_concurrency=5),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        payload = "x" * 100_000

        async def flood() -> None:
            for _ in range(40):
                try:
                    await client.get_api().work(payload)
                    outcomes["served"] += 1
                except OverloadedError:
                    outcomes["refused"] += 1

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(flood)
        assert sum(outcomes.values()) == 2000
        assert outcomes["refused"] == serving.statistics().queue.dropped > 0
        assert serving.statistics().queue.high_water_bytes <= MIB + len(payload) + 200
    # 200 MB were sent.
    assert resident() - before < 100 * MIB


async def test_trimmed_past_the_reader(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A subscriber that comes back after the stream was trimmed says that it may have missed some."""
    api = Api()
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as serving,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        assert await client.get_api().work(1) == 1
        with caplog.at_level(logging.WARNING):
            # In one step, so that the subscriber can't read in between.
            pipe = witness.pipeline()
            for entry in witness.client_list():
                if entry["name"].endswith(serving.session_id):
                    pipe.client_kill_filter(_id=entry["id"])
            pipe.xadd(stream_name, {"x": "1"})
            pipe.xadd(stream_name, {"x": "2"})
            pipe.xtrim(stream_name, maxlen=1, approximate=False)
            pipe.execute()
            await until(lambda: "was trimmed past" in caplog.text)
        assert await client.get_api().work(2) == 2
