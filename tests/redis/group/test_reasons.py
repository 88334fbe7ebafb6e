"""Why calls time out, as Redis tells it; and calls that nobody serves."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
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
    with_call_options,
)
from anyio_kkrpc.redis._group import _reasons
from anyio_kkrpc.redis._group._reasons import ALIVE
from anyio_kkrpc.redis._stream._keys import DELAYED, HANDED_BACK
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.fake_server import fake_server

pytestmark = [pytest.mark.anyio, pytest.mark.server]

GROUP = "kkrpc-group"
TIMEOUT = 0.5


class Api:
    def __init__(self) -> None:
        self.running = 0

    def ping(self) -> str:
        return "pong"

    async def wait(self) -> None:
        self.running += 1
        try:
            await anyio.sleep_forever()
        finally:
            self.running -= 1


def peer(url: str, stream: str, **options: Any) -> RedisStreamsTransport:
    return RedisStreamsTransport(url, stream=stream, use_consumer_group=True, **options)


@asynccontextmanager
async def client(url: str, stream: str, **options: Any) -> AsyncIterator[Any]:
    options.setdefault("timeout", TIMEOUT)
    async with peer(url, stream) as transport, RPCChannel(transport, **options) as channel:
        yield channel.get_api()


async def times_out(call: Callable[[], Awaitable[object]], reason: str) -> None:
    """Make a call until it times out for this reason.

    On a busy machine the look may come too late, or before what it is to see.
    """
    with anyio.fail_after(BOUND):
        while True:
            with pytest.raises(RPCTimeoutError) as caught:
                await call()
            found = caught.value.reason
            because = "" if found is None else f": {found}"
            assert str(caught.value).endswith(f": no answer within {TIMEOUT} s{because}")
            if found is not None and re.fullmatch(reason, found):
                return


async def test_nobody_serves_it(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """No group, a group without workers, and one whose workers were not heard of for long."""
    async with client(redis_server.url, stream_name) as api:
        await times_out(api.wait, "no worker has ever served the stream")
        witness.xgroup_create(stream_name, GROUP, "0")
        expected = f"no worker has taken it: the group '{GROUP}' has no workers"
        await times_out(api.wait, expected)
        # That consumers are there is no sign of life.
        for nobody in (HANDED_BACK, DELAYED):
            witness.xadd(stream_name, {"a": "b"})
            witness.xreadgroup(GROUP, nobody, {stream_name: ">"}, count=1)
        await times_out(api.wait, expected)
    # Peers that know no group may be served by others than those of the groups that there are.
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as transport,
        RPCChannel(transport, timeout=TIMEOUT) as channel,
    ):
        await times_out(channel.get_api().wait, expected)


async def test_workers_that_are_dead_do_not_count(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that were not heard of for a minute."""
    assert ALIVE == 60.0
    monkeypatch.setattr(_reasons, "ALIVE", 0.001)
    witness.xgroup_create(stream_name, GROUP, "0", mkstream=True)
    witness.xgroup_createconsumer(stream_name, GROUP, "killed")
    async with client(redis_server.url, stream_name, timeout=None, fail_fast=True) as api:
        with pytest.raises(DeliveryError, match="has no workers"):
            await api.wait()


async def test_who_has_it(redis_server: RedisServer, stream_name: str) -> None:
    """The worker that has taken a call is named; one that waits learns who is busy."""
    served = Api()
    async with (
        peer(redis_server.url, stream_name, consumer_name="wörker\n2") as serving,
        RPCChannel(serving, expose=served, max_concurrency=1),
        client(redis_server.url, stream_name) as api,
    ):
        await times_out(api.wait, r"'wörker\\+n2' has taken it, and still had it \d+\.\d s before")
        while served.running:
            await anyio.sleep(0.01)
        async with anyio.create_task_group() as group:
            group.start_soon(with_call_options(api, timeout=CALL_BOUND).wait)
            while not served.running:
                await anyio.sleep(0.01)
            await times_out(
                api.ping,
                "no worker has taken it: .* has 1 worker, of which 1 is busy with 1 request",
            )
            group.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("owner", "deliveries", "expected"),
    [
        (HANDED_BACK, 1, "no worker has taken it: .* has no workers; it was given back by another one"),
        (DELAYED, 3, "it was delivered 3 times without being finished, and is to wait"),
        (b"one", 2, r"'one' has taken it, delivered 2 times, and still had it \d+\.\d s before"),
        (None, 1, "a worker had it, and is done"),
    ],
)  # fmt: skip
async def test_what_became_of_it(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    owner: bytes | None,
    deliveries: int,
    expected: str,
) -> None:
    """It was given back, waits after several deliveries, or was acknowledged without a reply."""
    witness.xgroup_create(stream_name, GROUP, "0", mkstream=True)

    async def call() -> None:
        async with anyio.create_task_group() as group:

            async def take() -> None:
                while not (found := witness.xreadgroup(GROUP, "c", {stream_name: ">"})):
                    await anyio.sleep(0.01)
                ((_, ((entry_id, _),)),) = found
                if owner is None:
                    witness.xack(stream_name, GROUP, entry_id)
                else:
                    witness.xclaim(
                        stream_name, GROUP, owner, 0, [entry_id], retrycount=deliveries, justid=True
                    )
                witness.xgroup_delconsumer(stream_name, GROUP, "c")

            group.start_soon(take)
            try:
                await api.wait()
            except RPCTimeoutError as exc:
                error = exc
        raise error

    async with client(redis_server.url, stream_name) as api:
        await times_out(call, expected)


async def test_no_connection(own_server: RedisServer, stream_name: str) -> None:
    """While the server is away that is the reason, for calls of any kind."""
    async with client(own_server.url, stream_name) as api:
        own_server.kill()
        await times_out(api.wait, f"there is no connection to {own_server.url}/0")


@pytest.mark.one_server
async def test_look_that_is_refused(redis_server: RedisServer, stream_name: str) -> None:
    """Without the right to look the text is the plain one; nothing else suffers."""
    async with (
        fake_server(redis_server.url) as fake,
        peer(fake.url, stream_name) as serving,
        RPCChannel(serving, expose=Api()),
        client(fake.url, stream_name) as api,
    ):
        refused = "NOPERM this user has no permissions to run the 'xinfo|consumers' command"
        fake.refuse(refused, matches=lambda command: command[1:2] == [_reasons._EXPLAIN])
        with anyio.fail_after(BOUND):
            with pytest.raises(RPCTimeoutError) as caught:
                await api.wait()
            assert caught.value.reason is None
            assert await with_call_options(api, timeout=CALL_BOUND, fail_fast=True).ping() == "pong"


async def test_fail_fast(redis_server: RedisServer, stream_name: str, witness: redis.Redis) -> None:
    """A call to a group that nobody serves fails at once, and leaves nothing behind."""
    async with client(redis_server.url, stream_name, timeout=CALL_BOUND, fail_fast=True) as api:

        async def fails(why: str) -> None:
            with pytest.raises(DeliveryError, match=why):
                await api.ping()
            while witness.xlen(stream_name):
                await anyio.sleep(0.01)

        async def until_served() -> None:
            while not (witness.exists(stream_name) and witness.xinfo_groups(stream_name)):
                await anyio.sleep(0.01)
            while not witness.xinfo_consumers(stream_name, GROUP):
                await anyio.sleep(0.01)

        with anyio.fail_after(BOUND):
            await fails("no worker has ever served the stream")
            async with (
                peer(redis_server.url, stream_name) as serving,
                RPCChannel(serving, expose=Api()),
            ):
                # One that is about to come has a moment: it isn't there before it has said so.
                await until_served()
                assert await api.ping() == "pong"
            witness.xtrim(stream_name, maxlen=0)
            await fails(f"no worker has taken it: the group '{GROUP}' has no workers")
