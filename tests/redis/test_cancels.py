"""Cancels of requests to a group: they reach who has the request, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server]

GROUP = "kkrpc-group"


class Api:
    def __init__(self) -> None:
        self.running: set[int] = set()
        self.ran: list[int] = []

    async def work(self, n: int) -> None:
        self.ran.append(n)
        self.running.add(n)
        try:
            await anyio.sleep_forever()
        finally:
            self.running.discard(n)

    def ping(self) -> str:
        return "pong"


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def peer(server: RedisServer, stream: str, **options: Any) -> RedisStreamsTransport:
    return RedisStreamsTransport(server.url, stream=stream, use_consumer_group=True, **options)


def waiting(witness: redis.Redis, stream: str, group: str = GROUP) -> int | None:
    """What Redis says is left for a group; what really is, before Redis 7.0."""
    (info,) = [one for one in witness.xinfo_groups(stream) if one["name"] == group.encode()]
    if "lag" in info:
        return info["lag"]
    return len(witness.xrange(stream, f"({info['last-delivered-id'].decode()}"))


@pytest.mark.parametrize("key", [None, b"sixteen bytes or more"], ids=["plain", "signed"])
@pytest.mark.parametrize("name", [None, "blue", "consumer-blue"])
async def test_reaches_who_has_it(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    name: str | None,
    key: bytes | None,
) -> None:
    """A cancel goes to the inbox of the worker that has the request, and to nobody else."""
    api = Api()
    async with (
        peer(redis_server, stream_name, consumer_name=name, signing_key=key) as serving,
        peer(redis_server, stream_name, signing_key=key) as using,
        RPCChannel(serving, expose=api, max_concurrency=20),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            for n in range(10):
                group.start_soon(channel.get_api().work, n)
            await until(lambda: len(api.running) == 10)
            group.cancel_scope.cancel()
        await until(lambda: not api.running)
        await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 0)
        assert witness.xlen(stream_name) == 0
        assert not witness.exists(f"{{{stream_name}}}:control")
        assert await channel.get_api().ping() == "pong"


async def test_what_was_taken_by_one_who_died(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A request that was cancelled after its worker was killed isn't run by another one."""
    api = Api()
    async with (
        peer(redis_server, stream_name) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().work, 1)
            await until(lambda: witness.xlen(stream_name))
            witness.xgroup_create(stream_name, GROUP, "0")
            assert witness.xreadgroup(GROUP, "consumer-gone", {stream_name: ">"})
            group.cancel_scope.cancel()
        await until(lambda: witness.xlen(stream_name) == 0)
        async with (
            peer(redis_server, stream_name, claim_idle=0.1) as serving,
            RPCChannel(serving, expose=api),
        ):
            await until(lambda: witness.xpending(stream_name, GROUP)["pending"] == 0)
            assert await channel.get_api().ping() == "pong"
    assert api.ran == []


@pytest.mark.parametrize("how", ["unanswered", "away"])
async def test_before_it_is_known_where_it_is(
    server_executable: str, stream_name: str, how: str
) -> None:
    """A request that was cancelled before Redis had answered isn't run by who comes later."""
    api = Api()
    with RedisServer(server_executable, appendonly=True) as server:
        async with (
            peer(server, stream_name) as using,
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            if how == "away":
                server.kill()
            else:
                server.pause()
            async with anyio.create_task_group() as group:
                for n in range(20):
                    group.start_soon(channel.get_api().work, n)
                await anyio.wait_all_tasks_blocked()
                group.cancel_scope.cancel()
            if how == "away":
                await anyio.to_thread.run_sync(server.start)
            else:
                server.resume()
            with redis.Redis.from_url(server.url) as witness:
                async with (
                    peer(server, stream_name) as serving,
                    RPCChannel(serving, expose=api),
                ):
                    assert await channel.get_api().ping() == "pong"
                await until(lambda: witness.xlen(stream_name) == 1)
    assert api.ran == []


async def test_what_is_left_is_counted(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What Redis says is left for each group stays right, whatever was cancelled."""
    async with (
        peer(redis_server, stream_name) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as group,
    ):
        scopes: list[anyio.CancelScope] = []

        async def call(n: int) -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await channel.get_api().work(n)

        for n in range(30):
            group.start_soon(call, n)
        await until(lambda: witness.xlen(stream_name) == 30)
        for name in ("new", "half", "done"):
            witness.xgroup_create(stream_name, name, "0")
        witness.xreadgroup("half", "somebody", {stream_name: ">"}, count=15)
        witness.xreadgroup("done", "somebody", {stream_name: ">"})
        left = {"new": 30, "half": 15, "done": 0}
        for n in (0, 29, 14, 15, 16, 3):
            scopes[n].cancel()
            left["new"] -= 1
            left["half"] -= n >= 15
            await until(lambda: witness.xlen(stream_name) == left["new"])
            for name, expected in left.items():
                assert waiting(witness, stream_name, name) == expected, (name, n)
        for scope in scopes:
            scope.cancel()
        await until(lambda: witness.xlen(stream_name) == 0)
        for name in left:
            assert waiting(witness, stream_name, name) == 0
        witness.xadd(stream_name, {"from": "x"})
        assert [waiting(witness, stream_name, name) for name in left] == [1, 1, 1]
