"""Broadcasts that are read from replicas: from which, and what becomes of those that are no good."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, with_call_options
from anyio_kkrpc.redis._connection import _replicas
from anyio_kkrpc.redis._connection._role import Copies, read_copies, read_role
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.servers import Servers
from tests.topologies import ClusterSetup

pytestmark = [pytest.mark.anyio, pytest.mark.server]


class Pair:
    """A server, and one that copies it, or is to.

    :ivar master: the server
    :ivar replica: what may copy it
    """

    def __init__(self, master: RedisServer, replica: RedisServer) -> None:
        self.master, self.replica = master, replica
        self.asking = redis.Redis.from_url(master.url)
        self.copying = redis.Redis.from_url(replica.url)

    def follow(self) -> None:
        """Have it copied."""
        self.copying.execute_command("REPLICAOF", "127.0.0.1", self.master.port)

    def cut(self) -> None:
        """Have it copied no more."""
        self.copying.execute_command("REPLICAOF", "NO", "ONE")

    def followed(self) -> bool:
        return bool(self.asking.execute_command("ROLE")[2])


@pytest.fixture
def pair(server_executable: str) -> Iterator[Pair]:
    with RedisServer(server_executable, args=("--repl-diskless-sync-delay", "0")) as master:
        with RedisServer(server_executable) as replica:
            pair = Pair(master, replica)
            yield pair
            pair.asking.close()
            pair.copying.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks come soon, and what was left is tried again soon."""
    monkeypatch.setattr(_replicas, "_INTERVAL", 0.05)
    monkeypatch.setattr(_replicas, "_AVOIDED", 0.2)


def reads_on(client: redis.Redis) -> bool:
    """Whether somebody reads requests there."""
    return any("anyio_kkrpc:requests:" in one["name"] for one in client.client_list())


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


class News:
    """A subscriber and a publisher.

    :ivar heard: what the subscriber got
    """

    def __init__(self, channel: RPCChannel, heard: list[int]) -> None:
        self._api: Any = with_call_options(channel.get_api(), reply=False)
        self.heard = heard
        self.told = 0

    async def tell(self, count: int = 1) -> None:
        for _ in range(count):
            await self._api.tell(self.told)
            self.told += 1

    async def all_heard(self) -> None:
        """Wait until everything was heard; each once, and in order."""
        await until(lambda: len(self.heard) >= self.told)
        assert self.heard == list(range(self.told))


@asynccontextmanager
async def news(url: str, **options: Any) -> AsyncIterator[News]:
    heard: list[int] = []
    common: dict[str, Any] = {"stream": "news"}
    async with (
        RedisStreamsTransport(url, read_from="replica", **common, **options) as subscribed,
        RedisStreamsTransport(url, **common) as used,
        RPCChannel(subscribed, expose={"tell": heard.append}),
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        yield News(channel, heard)


async def test_reads_from_a_replica(pair: Pair) -> None:
    """Requests are read there, all else from the server."""
    pair.follow()
    await until(pair.followed)
    async with news(pair.master.url) as told:
        await until(lambda: reads_on(pair.copying))
        assert not reads_on(pair.asking)
        await told.tell(50)
        await told.all_heard()
        names = [one["name"] for one in pair.copying.client_list()]
        assert len([name for name in names if name.startswith("anyio_kkrpc")]) == 1


@pytest.mark.one_server
async def test_no_replica(pair: Pair, quick: None, caplog: pytest.LogCaptureFixture) -> None:
    """The server is read from as long as nothing copies it, which is said once."""
    async with news(pair.master.url) as told:
        await until(lambda: reads_on(pair.asking))
        await told.tell(10)
        pair.asking.client_kill_filter(_type="normal", skipme=True)
        await told.tell(10)
        await told.all_heard()
        assert len([r for r in caplog.records if "no replica to read from" in r.message]) == 1
        pair.follow()
        await until(lambda: reads_on(pair.copying))
        await told.tell(10)
        await told.all_heard()
        assert not reads_on(pair.asking)


@pytest.mark.one_server
async def test_cut_off(pair: Pair, quick: None) -> None:
    """A replica that gets nothing any more is left, and nothing is missed; it is read again later."""
    pair.follow()
    await until(pair.followed)
    async with news(pair.master.url) as told:
        await until(lambda: reads_on(pair.copying))
        await told.tell(10)
        pair.cut()
        await told.tell(10)
        await until(lambda: reads_on(pair.asking))
        await told.tell(10)
        await told.all_heard()
        pair.follow()
        await until(lambda: reads_on(pair.copying))
        await told.tell(10)
        await told.all_heard()


@pytest.mark.one_server
async def test_lags(pair: Pair, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that is there, and doesn't say that it has what was written a while ago."""
    monkeypatch.setattr(_replicas, "_LAG", 0.5)
    pair.follow()
    await until(pair.followed)
    async with news(pair.master.url, health_check_interval=100) as told:
        await until(lambda: reads_on(pair.copying))
        await told.tell(10)
        await told.all_heard()
        pair.replica.pause()
        try:
            await told.tell(10)
            await told.all_heard()
        finally:
            pair.replica.resume()


@pytest.mark.one_server
async def test_right_that_is_missing(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Who may not ask for replicas reads from the server, and says so once."""
    pair.follow()
    await until(pair.followed)
    pair.asking.execute_command("ACL SETUSER shop on >secret ~* +@all -role")
    async with news(f"redis://shop:secret@127.0.0.1:{pair.master.port}") as told:
        await told.tell(10)
        await told.all_heard()
        assert reads_on(pair.asking)
    (line,) = [r.getMessage() for r in caplog.records if "reading from replicas" in r.getMessage()]
    assert "NOPERM" in line


@pytest.fixture(scope="module")
def cluster(servers: Servers) -> Iterator[ClusterSetup]:
    with ClusterSetup(servers["valkey8"].executable, masters=1, replicas=1) as cluster:
        yield cluster


@pytest.mark.slow
async def test_cluster(cluster: ClusterSetup, quick: None) -> None:
    """A replica of a Cluster is read from (READONLY), also after it has changed places."""
    async with news(cluster.url) as told:
        for _ in range(2):
            master = cluster.owner("news")
            with redis.Redis(port=cluster.replica_of(master).port) as copying:
                await until(lambda: reads_on(copying))
                await told.tell(10)
                await told.all_heard()
            await anyio.to_thread.run_sync(cluster.failover, "news")
            await told.tell(10)
            await told.all_heard()


def test_not_in_a_group() -> None:
    """Who takes entries for a group has to write."""
    with pytest.raises(ValueError, match="read_from"):
        RedisStreamsTransport(read_from="replica", use_consumer_group=True)
    with pytest.raises(ValueError, match="read_from"):
        RedisStreamsTransport(read_from="slave")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reply", "copies"),
    [
        ([b"master", 7, []], Copies(7, {})),
        ([b"master", 7, [[b"h", b"1", b"5"]]], Copies(7, {("h", 1): 5})),
        ([b"master", 7, [[b"h", b"1"]]], None),
        ([b"master", 7, [[b"h", b"one", b"5"]]], None),
        ([b"master", 7, [[b"h", b"1", 5]]], None),
        ([b"master", 7, [[b"h", b"1", b"9" * 5000]]], None),
        ([b"master", 7, [[b"h", b"9" * 5000, b"5"]]], None),
        ([b"master", 7, [[b"h", b"65536", b"5"]]], None),
        ([b"master", 7, [[b"h", b"1", b"5"], 7, None]], None),
        ([b"slave", b"h", 1, b"connected", 5], None),
        ([b"sentinel", []], None),
        (None, None),
    ],
)
def test_role(reply: Any, copies: Copies | None) -> None:
    assert read_copies(reply) == copies
    role = read_role(reply)
    if copies is not None:
        assert role is not None
        assert dict.fromkeys(role.nodes) == dict.fromkeys(copies.nodes)
