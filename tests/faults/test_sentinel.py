"""Peers of a server that sentinels look after: it fails, or hands over, and they go after it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, TransportConnectionError
from tests.bounds import BOUND, CALL_BOUND
from tests.faults.keyed_load import KeyedLoad
from tests.topologies import Node, SentinelSetup

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

T = TypeVar("T")

# What a user of the sentinels needs, and no more.
RIGHTS = "-@all +auth +ping +client|setname +sentinel|get-master-addr-by-name"
WATCHER = "sentinel_username=watcher&sentinel_password=s3cret"
# Calls at a time, and how many are to be answered before something happens, and after it.
AT_ONCE, SOME = 8, 20


@pytest.fixture(scope="module")
def servers(server_executable: str) -> Iterator[SentinelSetup]:
    """A master with two replicas, and three sentinels."""
    lines = [f"user watcher on >s3cret {RIGHTS}"]
    with SentinelSetup(server_executable, sentinel_lines=lines) as setup:
        yield setup


@pytest.fixture
def watched(servers: SentinelSetup) -> SentinelSetup:
    """The same, whole again."""
    servers.heal()
    return servers


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b


@asynccontextmanager
async def peers(url: str) -> AsyncIterator[Any]:
    """Have a worker and a client; give the proxy."""
    options: dict[str, Any] = {"stream": "jobs", "use_consumer_group": True}
    async with (
        RedisStreamsTransport(url, **options) as serving,
        RedisStreamsTransport(url, **options) as using,
        RPCChannel(serving, expose=Api()),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        yield channel.get_api()


async def beside(function: Callable[[], T]) -> T:
    """Do what blocks in a thread, so that the peers go on."""
    return await anyio.to_thread.run_sync(function)


def connected(node: Node) -> bool:
    """Whether peers have connections to a server."""
    return any(" name=anyio_kkrpc:" in line for line in node.lines("CLIENT", "LIST"))


async def test_one_that_hands_over(
    watched: SentinelSetup, caplog: pytest.LogCaptureFixture
) -> None:
    """The old master is left by who knows that there is another one, not because it hangs up, which
    it does ten seconds later. The sentinels are asked by a user who may do that only.
    """
    old = await beside(watched.master)
    async with peers(f"{watched.url}?{WATCHER}") as api:
        assert await api.add(1, 2) == 3
        await beside(watched.failover)
        with anyio.fail_after(BOUND):
            while await beside(lambda: connected(old)):
                await anyio.sleep(0.05)
        assert await api.add(3, 4) == 7
        assert await beside(lambda: connected(watched.master()))
    # On a busy machine one or the other may be lost before, as it is silent for long.
    assert any("somewhere else now" in message for message in caplog.messages)
    assert not any("closed by the server" in message for message in caplog.messages)


async def test_one_that_fails(watched: SentinelSetup) -> None:
    """One does nothing any more, one is gone: all calls on their way are answered."""
    answered = 0

    async def call(api: Any) -> None:
        nonlocal answered
        while True:
            assert await api.add(answered, 1)
            answered += 1

    async def wait_for_some() -> None:
        end = answered + SOME
        while answered < end:
            await anyio.sleep(0.02)

    def freeze() -> None:
        master = watched.master()
        master.freeze()
        watched.wait_master(master)

    def kill() -> None:
        master = watched.master()
        master.kill()
        watched.wait_master(master)

    with anyio.fail_after(CALL_BOUND):
        async with peers(watched.url) as api, anyio.create_task_group() as group:
            for _ in range(AT_ONCE):
                group.start_soon(call, api)
            for event in (freeze, watched.heal, kill):
                await wait_for_some()
                await beside(event)
            await wait_for_some()
            group.cancel_scope.cancel()


async def test_calls_with_keys(watched: SentinelSetup) -> None:
    """Their master hands over, which may lose what it said last, and another one is killed: each call
    is answered, and each item of a stream that is kept comes in order, or an error says that it won't.
    """

    def kill() -> None:
        watched.heal()
        master = watched.master()
        master.kill()
        watched.wait_master(master)

    load = KeyedLoad()
    await load.see(watched.url, watched.failover, kill)


@pytest.mark.one_server
async def test_sentinels_come_and_go(watched: SentinelSetup) -> None:
    """One of them is enough, also one that the URL doesn't name; without any, nobody can enter."""
    first, *others = watched.sentinels
    master = await beside(watched.master)
    async with peers(f"redis+sentinel://127.0.0.1:{first.port}/{watched.name}") as api:
        await beside(first.kill)
        await beside(lambda: master.run("CLIENT", "KILL", "TYPE", "normal"))
        assert await api.add(1, 2) == 3
        for sentinel in others:
            await beside(sentinel.kill)
        assert await api.add(3, 4) == 7
    with pytest.raises(TransportConnectionError, match=r"no sentinel tells .* Connection refused"):
        async with RedisStreamsTransport(f"{watched.url}?socket_connect_timeout=0.5"):
            pass


@pytest.mark.one_server
async def test_wrong_urls(watched: SentinelSetup) -> None:
    """Another name than that of the service, and a sentinel for the server: the error says so."""
    url = watched.url.replace("mymaster", "master?socket_connect_timeout=0.5")
    with pytest.raises(TransportConnectionError, match="Check the service in the url"):
        async with RedisStreamsTransport(url):
            pass
    with pytest.raises(TransportConnectionError, match=r"it is a sentinel.*redis\+sentinel://"):
        async with RedisStreamsTransport(watched.sentinels[0].url):
            pass
