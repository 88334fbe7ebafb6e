"""More than can be served: what waits, what is refused, and that nobody waits for himself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import OverloadedError, RedisStreamsTransport, RPCChannel, with_call_options
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]


def group(server: RedisServer, stream: str, **options: Any) -> RedisStreamsTransport:
    return RedisStreamsTransport(server.url, stream=stream, use_consumer_group=True, **options)


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


class Mutual:
    """Each call makes another one, through the group, until it has gone deep enough."""

    def __init__(self) -> None:
        self.channel: RPCChannel | None = None

    async def down(self, depth: int) -> int:
        assert self.channel is not None
        if depth == 0:
            return 0
        return 1 + await self.channel.get_api().down(depth - 1)


async def test_workers_that_call_each_other(redis_server: RedisServer, stream_name: str) -> None:
    """Two workers of one handler and one place in the queue each, called by more than they can
    take, whose handlers call the group themselves: all make progress."""
    async with AsyncExitStack() as stack:
        for _ in range(2):
            api = Mutual()
            transport = await stack.enter_async_context(
                group(redis_server, stream_name, max_queue_size=1)
            )
            api.channel = await stack.enter_async_context(
                RPCChannel(transport, expose=api, max_concurrency=1, timeout=CALL_BOUND)
            )
        using = await stack.enter_async_context(group(redis_server, stream_name))
        client = await stack.enter_async_context(RPCChannel(using, timeout=CALL_BOUND))
        results: list[int] = []

        async def call(depth: int) -> None:
            results.append(await client.get_api().down(depth))

        async with anyio.create_task_group() as tasks:
            for depth in range(12):
                tasks.start_soon(call, depth)
        assert sorted(results) == list(range(12))


async def test_reverse_calls_to_a_full_peer(redis_server: RedisServer, stream_name: str) -> None:
    """A handler calls back a peer whose own single handler is busy calling: it is served."""

    class Peer:
        def __init__(self) -> None:
            self.channel: RPCChannel | None = None
            self.other = ""

        async def ping(self, n: int) -> int:
            assert self.channel is not None
            return n if n == 0 else await self.channel.get_api(to=self.other).ping(n - 1)

    peers = [Peer(), Peer()]
    async with AsyncExitStack() as stack:
        transports = [
            await stack.enter_async_context(group(redis_server, stream_name, max_queue_size=1))
            for _ in peers
        ]
        for peer, transport, other in zip(peers, transports, reversed(transports), strict=True):
            peer.other = other.session_id
            peer.channel = await stack.enter_async_context(
                RPCChannel(transport, expose=peer, max_concurrency=1, timeout=CALL_BOUND)
            )
        assert peers[0].channel is not None
        assert await peers[0].channel.get_api(to=peers[0].other).ping(6) == 0


async def test_max_backlog(redis_server: RedisServer, stream_name: str) -> None:
    """With no worker there, requests beyond the backlog are refused; the others are answered."""

    class Api:
        def work(self, n: int) -> int:
            return n

    results: list[int] = []
    refused: list[str] = []
    async with (
        group(redis_server, stream_name, max_backlog=5) as using,
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):

        async def call(n: int) -> None:
            try:
                results.append(await client.get_api().work(n))
            except OverloadedError as exc:
                refused.append(str(exc))

        async with anyio.create_task_group() as tasks:
            for n in range(8):
                tasks.start_soon(call, n)
            await until(lambda: len(refused) == 3)
            with pytest.raises(OverloadedError, match="max_backlog"):
                await with_call_options(client.get_api(), reply=False).work(9)
            serving = await tasks.start(_serve, group(redis_server, stream_name), Api())
            await until(lambda: len(results) == 5)
            serving.cancel()
        assert "max_backlog is reached: 5 requests" in refused[0]


async def _serve(transport: RedisStreamsTransport, api: object, *, task_status: Any) -> None:
    with anyio.CancelScope() as scope:
        async with transport, RPCChannel(transport, expose=api):
            task_status.started(scope)
            await anyio.sleep_forever()


async def test_backlog_is_not_trimmed(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Ten times `max_len` waits for workers that are down: all of it is answered, then trimmed."""

    class Api:
        def work(self, n: int) -> int:
            return n

    results: list[int] = []
    async with (
        group(redis_server, stream_name, max_len=20) as using,
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        api = client.get_api()

        async def call(n: int) -> None:
            results.append(await api.work(n))

        async with anyio.create_task_group() as tasks:
            for n in range(200):
                tasks.start_soon(call, n)
            await until(lambda: witness.xlen(stream_name) == 200)
            serving = await tasks.start(_serve, group(redis_server, stream_name), Api())
            await until(lambda: len(results) == 200)
            for n in range(50):
                await api.work(n)
            await until(lambda: witness.xlen(stream_name) <= 40)
            serving.cancel()
    assert sorted(results) == list(range(200))


async def test_dropped_in_a_group_is_late_not_lost(
    redis_server: RedisServer, stream_name: str
) -> None:
    """With `drop_oldest` a request of a group goes back to the group, and is answered later."""

    class Slow:
        async def work(self, n: int) -> int:
            await anyio.sleep(0.01)
            return n

    results: list[int] = []
    async with (
        group(
            redis_server,
            stream_name,
            overflow="drop_oldest",
            max_queue_size=100,
            max_queue_bytes=2000,
            claim_idle=0.2,
        ) as serving,
        RPCChannel(serving, expose=Slow(), max_concurrency=100),
        group(redis_server, stream_name) as using,
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):

        async def call(n: int) -> None:
            results.append(await client.get_api().work(n))

        async with anyio.create_task_group() as tasks:
            for n in range(300):
                tasks.start_soon(call, n)
    assert sorted(results) == list(range(300))


async def test_new_and_claimed_requests_wait_for_the_same_room(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A full worker that reads and claims at once runs each request once."""
    ran: list[int] = []

    class Api:
        async def work(self, n: int, data: str) -> int:
            ran.append(n)
            await anyio.sleep(0.02)
            return n

    results: list[int] = []
    witness.xgroup_create(stream_name, "kkrpc-group", "0", mkstream=True)
    async with group(redis_server, stream_name) as using, RPCChannel(using) as client:

        async def call(n: int) -> None:
            results.append(await client.get_api().work(n, "x" * 1000))

        async with anyio.create_task_group() as tasks:
            for n in range(60):
                tasks.start_soon(call, n)
            await until(lambda: witness.xlen(stream_name) == 60)
            # Half of them were taken by a worker that was killed.
            witness.xreadgroup("kkrpc-group", "dead", {stream_name: ">"}, count=30)
            await anyio.sleep(0.1)
            async with (
                group(redis_server, stream_name, claim_idle=0.1, max_queue_bytes=2500) as serving,
                RPCChannel(serving, expose=Api(), max_concurrency=8),
            ):
                await until(lambda: len(results) == 60)
                assert serving.statistics().outstanding == 0
    assert sorted(ran) == sorted(results) == list(range(60))


async def test_fair_among_workers(redis_server: RedisServer, stream_name: str) -> None:
    """A slow worker with room for one takes one; the idle ones serve the rest meanwhile."""
    gate = anyio.Event()

    class Slow:
        ran = 0

        async def work(self) -> str:
            self.ran += 1
            await gate.wait()
            return "slow"

    class Quick:
        def work(self) -> str:
            return "quick"

    slow = Slow()
    async with (
        group(redis_server, stream_name) as one,
        group(redis_server, stream_name) as using,
        RPCChannel(one, expose=slow, max_concurrency=1),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        results: list[str] = []

        async def call() -> None:
            results.append(await client.get_api().work())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await until(lambda: slow.ran)
            async with group(redis_server, stream_name) as two, RPCChannel(two, expose=Quick()):
                for _ in range(20):
                    tasks.start_soon(call)
                await until(lambda: len(results) == 20)
                assert set(results) == {"quick"}
                assert slow.ran == 1
            gate.set()
