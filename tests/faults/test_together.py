"""What leaves together for one peer, 64 records in one entry, and the server, the link or the inbox
fails just then."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
)
from anyio_kkrpc.redis.dialects.native import MARK_OF_SEVERAL
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

from .proxy import Proxy, proxy

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

IN_FLIGHT = 64
FORMS: dict[str, dict[str, Any]] = {
    "json": {},
    "cbor, signed": {"codec": "cbor", "signing_key": b"a secret of sixteen bytes"},
}
SEVERAL = b"$%d\r\n%s\r\n" % (len(MARK_OF_SEVERAL[1]), MARK_OF_SEVERAL[1])


class Api:
    """All calls call back at the same time, and return at the same time."""

    def __init__(self) -> None:
        self.ran: Counter[int] = Counter()
        self.told: Counter[int] = Counter()
        self.tell, self.answer = anyio.Event(), anyio.Event()

    async def work(self, number: int, function: Callable[[int], Any]) -> int:
        self.ran[number] += 1
        await self.tell.wait()
        await function(number)
        self.told[number] += 1
        await self.answer.wait()
        return number

    def quick(self, value: Any) -> Any:
        return value


class Peers:
    """A worker behind a proxy, and a client.

    :ivar api: what is served
    :ivar results: what has come of calls, or the exception
    :ivar heard: what the client's function was called with
    """

    def __init__(
        self,
        middle: Proxy,
        admin: redis.Redis,
        stream: str,
        serving: RedisStreamsTransport,
        using: RedisStreamsTransport,
    ) -> None:
        self.middle, self.admin, self.stream = middle, admin, stream
        self.serving, self.using = serving, using
        self.api = Api()
        self.results: dict[int, Any] = {}
        self.heard: Counter[int] = Counter()

    async def call(self, remote: Any, number: int) -> None:
        def hear(value: int) -> None:
            self.heard[value] += 1

        try:
            self.results[number] = await remote.work(number, hear)
        except DeliveryError as exc:
            self.results[number] = exc

    def failed(self) -> list[Any]:
        return [result for result in self.results.values() if isinstance(result, Exception)]

    def flows(self) -> bool:
        """Whether nothing keeps what the worker writes from leaving at once."""
        outgoing = self.serving._writer._outgoing
        return outgoing.ledger.flowing and not self.serving._writer.kept()

    async def settled(self) -> None:
        """Wait until nothing is pending, nor waits to be written."""
        pending = self.admin.xpending
        await until(lambda: pending(self.stream, "kkrpc-group")["pending"] == 0)
        await until(lambda: not self.serving._writer.kept())


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@asynccontextmanager
async def link(
    server: RedisServer, stream: str, form: str
) -> AsyncIterator[tuple[Peers, RPCChannel]]:
    options: dict[str, Any] = {
        "stream": stream,
        "use_consumer_group": True,
        "block_timeout": 0.2,
        "health_check_interval": 0.3,
        **FORMS[form],
    }
    admin = redis.Redis.from_url(server.url)
    async with (
        proxy(server.url) as middle,
        RedisStreamsTransport(middle.url, **options) as serving,
        RedisStreamsTransport(server.url, **options) as using,
    ):
        peers = Peers(middle, admin, stream, serving, using)
        async with (
            RPCChannel(serving, expose=peers.api, max_concurrency=2 * IN_FLIGHT),
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            yield peers, channel
    admin.close()


@asynccontextmanager
async def out_of_memory(peers: Peers) -> AsyncIterator[None]:
    """Redis refuses what is written in the body for some time."""
    refused = peers.serving._outages.refused
    peers.admin.config_set("maxmemory", "1mb")
    yield
    await until(lambda: peers.serving._outages.refused > refused)
    peers.admin.config_set("maxmemory", 0)


@asynccontextmanager
async def connection_lost(peers: Peers) -> AsyncIterator[None]:
    """The server gets what is written in the body, and the link is lost before it answers."""
    reconnects = peers.serving.statistics().reconnects
    peers.middle.swallow_reply_to(lambda data: b"XADD" in data and SEVERAL in data)
    yield
    await until(lambda: peers.serving.statistics().reconnects > reconnects)


@asynccontextmanager
async def inbox_deleted(peers: Peers) -> AsyncIterator[None]:
    """Somebody deletes the inbox before what is written in the body comes there."""
    peers.admin.delete(f"{{{peers.stream}}}:inbox:{peers.using.session_id}")
    yield


FAULTS = {
    "out of memory": out_of_memory,
    "connection lost": connection_lost,
    "inbox deleted": inbox_deleted,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_64_in_flight(
    own_server: RedisServer, stream_name: str, fault: str, form: str
) -> None:
    """Each call runs once and ends; what isn't gone with the inbox comes once."""
    async with link(own_server, stream_name, form) as (peers, channel):
        api, fails = peers.api, FAULTS[fault]
        remote = channel.get_api()
        async with anyio.create_task_group() as group:
            for number in range(IN_FLIGHT):
                group.start_soon(peers.call, remote, number)
            await until(lambda: len(api.ran) == IN_FLIGHT)
            async with fails(peers):
                api.tell.set()
            await until(lambda: len(api.told) + len(peers.results) == IN_FLIGHT)
            await until(peers.flows)
            async with fails(peers):
                api.answer.set()
        once = Counter(range(IN_FLIGHT))
        assert api.ran == once
        assert sorted(peers.results) == list(range(IN_FLIGHT))
        if fault == "inbox deleted":
            assert peers.heard | once == once
        else:
            assert peers.failed() == []
            assert peers.heard == api.told == once
        await peers.settled()
        assert await remote.quick(1) == 1
        assert (peers.using.statistics().repeated > 0) is (fault == "connection lost")
        # What is written again with its signature is refused by that, before it is a repetition.
        most = IN_FLIGHT if fault == "connection lost" and "signed" in form else 0
        assert peers.using.statistics().invalid <= most
