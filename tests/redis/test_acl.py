"""A user of Redis with no more rights than docs/security.md gives it."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import pytest
import redis

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    TransportConnectionError,
    with_call_options,
)
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = pytest.mark.anyio
PAGE = Path(__file__).parents[2] / "docs" / "security.md"


class Api:
    def __init__(self) -> None:
        self.started = anyio.Event()
        self.cancelled = anyio.Event()

    def add(self, a: int, b: int) -> int:
        return a + b

    async def count_to(self, last: int) -> AsyncIterator[int]:
        for number in range(1, last + 1):
            yield number

    async def call_back(self, function: Callable[[int], Awaitable[None]]) -> None:
        await function(1)

    async def sleep(self) -> None:
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()


@pytest.fixture
def url(own_server: RedisServer) -> str:
    """The server's URL as that user."""
    found = re.search(r"```text acl\n(.*?)\n```", PAGE.read_text())
    assert found is not None
    with redis.Redis.from_url(own_server.url) as client:
        assert client.execute_command(found[1])
    return f"redis://shop:secret@127.0.0.1:{own_server.port}"


async def test_all_that_peers_do(
    own_server: RedisServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls, streams, callbacks, cancels, trimming, poison, the look at it, the end."""
    caplog.set_level(logging.WARNING)
    api = Api()
    options = {"stream": "jobs", "use_consumer_group": True, "claim_idle": 0.1, "max_deliveries": 1}
    with anyio.fail_after(BOUND):
        async with (
            RedisStreamsTransport(url, max_len=10, **options) as served,
            RedisStreamsTransport(url, max_backlog=100, **options) as used,
            RPCChannel(used, timeout=CALL_BOUND) as channel,
        ):
            async with RPCChannel(served, expose=api):
                proxy = channel.get_api()
                assert [await proxy.add(n, 1) for n in range(30)] == list(range(1, 31))
                assert [item async for item in proxy.count_to(100)] == list(range(1, 101))
                called: list[int] = []
                await proxy.call_back(called.append)
                assert called == [1]
                async with anyio.create_task_group() as group:
                    group.start_soon(proxy.sleep)
                    await api.started.wait()
                    group.cancel_scope.cancel()
                await api.cancelled.wait()
                await with_call_options(proxy, reply=False).add(1, 2)
            await _nobody_reads(own_server)
            # A worker that dies: somebody takes a request and is never seen again.
            with redis.Redis.from_url(url) as dead:
                async with anyio.create_task_group() as group:
                    group.start_soon(_becomes_a_dead_letter, channel)
                    while not await anyio.to_thread.run_sync(
                        lambda: dead.xreadgroup("kkrpc-group", "dead", {"jobs": ">"}, count=1)
                    ):
                        pass
                    async with RPCChannel(served, expose=api):
                        while not await used.dead_letters():
                            await anyio.sleep(0.01)
            (letter,) = await used.dead_letters()
            async with RPCChannel(served, expose=api):
                await used.retry_dead_letter(letter.id)
                assert await proxy.add(1, 2) == 3
            assert await used.purge_dead_letters() == 0
            assert (await used.get_stream_info()).groups == 1
            await used.get_all_entries()
            await used.trim_stream(0)
            await used.delete_stream()
            await served.signal_destroy()
    assert not [r for r in caplog.records if "NOPERM" in r.getMessage()], caplog.text


async def _nobody_reads(server: RedisServer) -> None:
    """Wait until Redis has seen the end of the last read of requests, which takes what comes before."""
    with redis.Redis.from_url(server.url) as client:
        while any("anyio_kkrpc:requests:" in one["name"] for one in client.client_list()):
            await anyio.sleep(0.01)


async def _becomes_a_dead_letter(channel: RPCChannel) -> None:
    with pytest.raises(DeliveryError):
        await channel.get_api().add(1, 1)


async def test_keys_one_by_one(
    own_server: RedisServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Rules that name each key were complete once: without a newer one a worker says so, and works."""
    with redis.Redis.from_url(own_server.url) as client:
        keys = ("jobs", "{jobs}:control", "{jobs}:dead", "{jobs}:inbox:*")
        client.execute_command("ACL SETUSER shop resetkeys", *(f"~{key}" for key in keys))
        client.xgroup_create("jobs", "kkrpc-group", "0", mkstream=True)
    options = {"stream": "jobs", "use_consumer_group": True, "claim_idle": 0.1}
    with anyio.fail_after(BOUND):
        async with (
            RedisStreamsTransport(url, **options) as served,
            RedisStreamsTransport(url, **options) as used,
            RPCChannel(used) as channel,
        ):
            with redis.Redis.from_url(own_server.url) as dead:
                results: list[int] = []

                async def call() -> None:
                    results.append(await channel.get_api().add(1, 2))

                async with anyio.create_task_group() as group:
                    group.start_soon(call)
                    while not await anyio.to_thread.run_sync(
                        lambda: dead.xreadgroup("kkrpc-group", "dead", {"jobs": ">"}, count=1)
                    ):
                        pass
                    async with RPCChannel(served, expose=Api()):
                        while not results:  # a channel that leaves earlier hands it back
                            await anyio.sleep(0.01)
                assert results == [3]
                assert served.statistics().claimed
            async with RPCChannel(served, expose=Api()):
                assert await channel.get_api().add(3, 4) == 7
    (told,) = (r.getMessage() for r in caplog.records if "lost requests" in r.getMessage())
    assert "{jobs}:claimer:kkrpc-group" in told
    assert "NOPERM" in told


async def test_nothing_else(url: str) -> None:
    """Another stream is out of its reach, and the error says what to check."""
    with pytest.raises(
        TransportConnectionError, match="stream 'other'.*the rights that a peer needs"
    ):
        async with RedisStreamsTransport(url, stream="other", use_consumer_group=True):
            pass


@pytest.mark.parametrize("group", [False, True])
async def test_a_key_that_is_no_stream(own_server: RedisServer, group: bool) -> None:
    """So is a name that something else has."""
    with redis.Redis.from_url(own_server.url) as client:
        client.set("jobs", "text")
    with pytest.raises(TransportConnectionError, match="the name of the stream: 'jobs'"):
        async with RedisStreamsTransport(own_server.url, stream="jobs", use_consumer_group=group):
            pass


async def test_shards(own_server: RedisServer, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """What the page about shards adds covers the keys of all of them, and nothing less does."""
    found = re.search(r"```text acl shards\n(.*?)\n```", PAGE.with_name("shards.md").read_text())
    assert found is not None
    api = Api()
    options = {"stream": "jobs", "shards": 4, "use_consumer_group": True}
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command(found[1])
    with anyio.fail_after(BOUND):
        async with (
            RedisStreamsTransport(url, max_len=10, **options) as served,
            RedisStreamsTransport(url, **options) as used,
            RPCChannel(served, expose=api),
            RPCChannel(used, timeout=CALL_BOUND) as channel,
        ):
            for number in range(20):
                proxy = with_call_options(channel.get_api(), shard_key=str(number))
                assert await proxy.add(number, 1) == number + 1
                assert [item async for item in proxy.count_to(3)] == [1, 2, 3]
            assert await with_call_options(channel.get_api(), key="k").add(1, 1) == 2
            info = await used.get_stream_info()
            assert [one.groups for one in info.shards] == [1] * 4
            await used.delete_stream()
            await served.signal_destroy()
    assert not [r for r in caplog.records if "NOPERM" in r.getMessage()], caplog.text
    with redis.Redis.from_url(own_server.url) as client:
        client.execute_command("ACL SETUSER shop resetkeys ~jobs ~{jobs}:*")
    with pytest.raises(TransportConnectionError, match="NOPERM"):
        async with RedisStreamsTransport(url, session_id="p1", **options):
            pass
