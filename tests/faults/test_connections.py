"""Connections that are killed, cut or frozen, and servers that restart, lose data or say no."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import (
    RedisStreamsTransport,
    RPCChannel,
    RPCTimeoutError,
    TransportConnectionError,
    with_call_options,
)
from anyio_kkrpc.redis._stream._entries import order
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.servers import Servers

from .proxy import proxy

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

MODES = pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
QUICK: dict[str, Any] = {
    "block_timeout": 0.2,
    "health_check_interval": 0.3,
    "connect_timeout": 20.0,
}


class Api:
    def __init__(self) -> None:
        self.ran: list[Any] = []

    async def work(self, key: Any, seconds: float = 0.0) -> Any:
        self.ran.append(key)
        if seconds:
            await anyio.sleep(seconds)
        return key

    async def items(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            await anyio.sleep(0.005)
            yield number

    def text(self, length: int) -> str:
        return "x" * length

    def length(self, text: str) -> int:
        return len(text)

    async def call_back(self, count: int, function: Any) -> int:
        for number in range(count):
            await function(number)
            await anyio.sleep(0.005)
        return count


@asynccontextmanager
async def link(
    served_url: str, used_url: str, stream: str, grouped: bool, **options: Any
) -> AsyncIterator[tuple[Api, Any, RedisStreamsTransport, RedisStreamsTransport]]:
    api = Api()
    options = {"stream": stream, "use_consumer_group": grouped, **QUICK, **options}
    async with (
        RedisStreamsTransport(served_url, **options) as serving,
        RedisStreamsTransport(used_url, **options) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        yield api, channel.get_api(), serving, using


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


async def busy(api: Any, disturb: Callable[[], Any], count: int = 60) -> list[Any]:
    """Make calls, one every few milliseconds, and disturb in the middle; return the results."""
    results: list[Any] = []

    async def call(n: int) -> None:
        results.append(await api.work(n, 0.02))

    async with anyio.create_task_group() as group:
        for n in range(count):
            group.start_soon(call, n)
            await anyio.sleep(0.005)
            if n == count // 2:
                await disturb()
    return results


@MODES
async def test_killed_connections(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """CLIENT KILL of each connection, again and again: every call is answered and runs once."""
    url = redis_server.url
    async with link(url, url, stream_name, grouped) as (api, remote, serving, using):
        sessions = (serving.session_id, using.session_id)

        async def kill() -> None:
            for client in witness.client_list():
                if client["name"].endswith(sessions):
                    witness.client_kill_filter(_id=client["id"])

        for _ in range(3):
            api.ran.clear()
            results = await busy(remote, kill)
            assert sorted(results) == list(range(60))
            assert sorted(api.ran) == list(range(60))
        assert serving.statistics().reconnects >= 3
        assert using.statistics().reconnects >= 3
        if grouped:
            await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)


@MODES
@pytest.mark.parametrize("frozen", ["both", "up", "down"])
async def test_frozen_network(
    redis_server: RedisServer, stream_name: str, grouped: bool, frozen: str
) -> None:
    """No packet arrives and nobody is told (in one direction or both): it is noticed in time."""
    async with proxy(redis_server.url) as middle:
        async with link(redis_server.url, middle.url, stream_name, grouped, block_timeout=0.1) as (
            api,
            remote,
            _,
            using,
        ):

            async def freeze() -> None:
                middle.freeze(up=frozen != "down", down=frozen != "up")
                await anyio.sleep(1.0)  # longer than two health checks
                await middle.cut()
                middle.thaw()

            results = await busy(remote, freeze)
            assert sorted(results) == list(range(60))
            assert sorted(api.ran) == list(range(60))
            assert using.statistics().reconnects > 0


async def test_frozen_connections_are_replaced(redis_server: RedisServer, stream_name: str) -> None:
    """Connections that fell silent are given up for new ones, though nobody closes them."""
    async with proxy(redis_server.url) as middle:
        async with link(redis_server.url, middle.url, stream_name, True) as (_, remote, _, using):
            assert await remote.work(1) == 1
            middle.freeze()
            await until(lambda: using._lane.link.connection is None)
            middle.thaw()
            assert await remote.work(2) == 2
            assert using.statistics().reconnects > 0


@pytest.mark.parametrize(
    ("grouped", "serving", "command"),
    [(False, False, b"TIME"), (True, True, b"XGROUP"), (False, True, b"$5\r\nXINFO")],
    ids=["writer", "reader of a group", "reader of a broadcast"],
)
async def test_silent_while_prepared(
    servers: Servers, stream_name: str, grouped: bool, serving: bool, command: bytes
) -> None:
    """A new connection that falls silent right after its login is given up for another one."""
    url = servers["valkey8"].url
    async with proxy(url) as middle:
        served_url, used_url = url, middle.url
        if serving:
            served_url, used_url = used_url, served_url
        async with link(served_url, used_url, stream_name, grouped) as (_, remote, *both):
            assert await remote.work(1) == 1
            middle.silence(lambda data: command in data)
            session = both[0 if serving else 1].session_id
            with redis.Redis.from_url(url) as witness:
                for client in witness.client_list():
                    if client["name"].endswith(session):
                        witness.client_kill_filter(_id=client["id"])
            with anyio.fail_after(BOUND):
                await middle.silenced.wait()
                assert await remote.work(2) == 2


async def test_slow_network(servers: Servers, stream_name: str) -> None:
    """What takes longer than a server may be silent is no reason to connect again."""
    options = {"health_check_interval": 1.5, "block_timeout": 0.1}
    size, url = 3_000_000, servers["valkey8"].url
    async with proxy(url) as middle:
        async with link(url, middle.url, stream_name, True, **options) as (_, remote, _, using):
            middle.slow_down(1_000_000)

            async def download() -> None:
                assert await remote.text(size) == "x" * size

            async with anyio.create_task_group() as group:
                group.start_soon(download)
                assert await remote.length("x" * size) == size
            assert using.statistics().reconnects == 0


# More of this is too much for one reply: the server closes the connection instead.
OUTPUT_LIMIT = 1_000_000


@pytest.fixture
def tight_server(servers: Servers) -> Iterator[RedisServer]:
    """A server that gives ordinary clients no more than `OUTPUT_LIMIT` bytes at once."""
    with RedisServer(servers["valkey8"].executable) as server:
        with redis.Redis.from_url(server.url) as witness:
            witness.config_set("client-output-buffer-limit", f"normal {OUTPUT_LIMIT} 0 0")
        yield server


@pytest.mark.parametrize("key", ["inbox", "stream"])
@pytest.mark.parametrize("size", [100_000, 900_000], ids=["several fit", "one fits"])
async def test_replies_larger_than_the_output_buffer(
    tight_server: RedisServer, stream_name: str, key: str, size: int
) -> None:
    """Entries that come in a crowd are read in portions that the server can send."""
    url, count = tight_server.url, 6_000_000 // size
    async with link(url, url, stream_name, False) as (_, remote, serving, _):
        name = stream_name
        if key == "inbox":
            name = f"{{{stream_name}}}:inbox:{serving.session_id}"
        with redis.Redis.from_url(url) as witness, witness.pipeline(transaction=True) as together:
            for _ in range(count):
                together.xadd(name, {"from": "somebody", "json": "x" * size})
            together.execute()
        await until(lambda: serving.statistics().invalid == count)
        assert serving.statistics().reconnects > 0
        assert await remote.work(1) == 1


@pytest.mark.parametrize("size", [100_000, 900_000], ids=["several fit", "one fits"])
async def test_backlog_larger_than_the_output_buffer(
    tight_server: RedisServer, stream_name: str, size: int
) -> None:
    """What a read took whose reply was cut off is pending with its worker, and is run as well."""
    url, count = tight_server.url, 6_000_000 // size
    api = Api()
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, **QUICK}
    async with (
        RedisStreamsTransport(url, **options) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as group,
    ):
        results: list[str] = []

        async def call(n: int) -> None:
            results.append(await channel.get_api().work(str(n).ljust(size)))

        for n in range(count):
            group.start_soon(call, n)
        with redis.Redis.from_url(url) as witness:
            await until(lambda: witness.xlen(stream_name) == count)
        async with RedisStreamsTransport(url, **options) as serving:
            async with RPCChannel(serving, expose=api):
                await until(lambda: len(results) == count)
    assert sorted(map(int, results)) == list(range(count))
    assert sorted(map(int, api.ran)) == list(range(count))


async def test_looks_larger_than_the_output_buffer(
    tight_server: RedisServer, stream_name: str
) -> None:
    """Who looks at the stream gets all of it, or an error if one entry is too large by itself."""
    async with RedisStreamsTransport(tight_server.url, stream=stream_name, **QUICK) as transport:
        with redis.Redis.from_url(tight_server.url) as witness:
            for _ in range(15):
                witness.xadd(stream_name, {"from": "somebody", "json": "x" * 200_000})
            assert len(await transport.get_all_entries()) == 15
            witness.xadd(stream_name, {"from": "somebody", "json": "x" * OUTPUT_LIMIT})
            with pytest.raises(TransportConnectionError, match="lost"):
                await transport.get_all_entries()
            witness.xtrim(stream_name, 0, approximate=False)
        assert await transport.get_all_entries() == []


@pytest.mark.parametrize("state", ["replica", "paused"])
async def test_entering_has_an_end(servers: Servers, stream_name: str, state: str) -> None:
    """A server that answers, but takes no writes, is given up in time, with what was waited for."""
    with (
        RedisServer(servers["valkey8"].executable) as server,
        redis.Redis.from_url(server.url) as witness,
    ):
        if state == "replica":
            witness.replicaof("127.0.0.1", 1)
        else:
            witness.client_pause(600_000, all=False)
        with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError) as caught:
            async with RedisStreamsTransport(server.url, stream=stream_name, connect_timeout=2):
                pytest.fail("it can't be entered")
        # They are sent together; none that was sent behind one that must wait is answered.
        named = "EVAL" if state == "replica" else "(EVAL|XINFO STREAM|INFO)"
        assert re.search(f"no answer to {named}[ ,]", str(caught.value))
        assert ("read only replica" if state == "replica" else "CLIENT PAUSE") in str(caught.value)
        if state == "replica":
            witness.replicaof("NO", "ONE")
        else:
            witness.client_unpause()
        assert witness.keys("*") == []


@MODES
async def test_requests_of_unknown_outcome_run_once(
    redis_server: RedisServer, stream_name: str, grouped: bool
) -> None:
    """The connection is lost after the server got a request and before it answered: it is looked
    up, and not written again."""
    async with proxy(redis_server.url) as middle:
        async with link(redis_server.url, middle.url, stream_name, grouped) as (
            api,
            remote,
            _,
            using,
        ):
            for n in range(5):
                middle.swallow_reply_to(lambda data: b"XADD" in data and b'"work"' in data)
                assert await remote.work(n) == n
                with anyio.fail_after(BOUND):
                    await middle.swallowed.wait()
            assert api.ran == list(range(5))
            await until(lambda: using.statistics().reconnects >= 5)


async def test_replies_of_unknown_outcome_come_once(
    redis_server: RedisServer, stream_name: str
) -> None:
    """The same at the worker's side: callbacks and stream items are neither lost nor doubled."""
    async with proxy(redis_server.url) as middle:
        async with link(middle.url, redis_server.url, stream_name, True) as (
            _,
            remote,
            serving,
            using,
        ):
            seen: list[int] = []
            for _ in range(3):
                middle.swallow_reply_to(lambda data: b"XADD" in data and b'"cb"' in data)
                assert await remote.call_back(20, seen.append) == 20
                assert seen == list(range(20))
                seen.clear()
                middle.swallow_reply_to(lambda data: b"XADD" in data and b'"sr"' in data)
                assert [n async for n in remote.items(50)] == list(range(50))
            await until(lambda: serving.statistics().reconnects >= 3)
            assert using.statistics().repeated > 0


@MODES
@pytest.mark.parametrize("durable", [True, False], ids=["aof", "empty"])
async def test_restarted_server(
    server_executable: str, stream_name: str, tmp_path: Path, grouped: bool, durable: bool
) -> None:
    """The server dies and comes back, with its data or without: calls go on."""
    args = ["--dir", str(tmp_path)]
    if durable:
        args += ["--appendonly", "yes", "--appendfsync", "always"]
    with RedisServer(server_executable, args=args) as server:
        async with link(server.url, server.url, stream_name, grouped) as (
            api,
            remote,
            serving,
            using,
        ):

            async def restart() -> None:
                server.kill()
                await anyio.to_thread.run_sync(server.start)

            results = await busy(remote, restart)
            assert sorted(results) == list(range(60))
            if durable:
                assert sorted(api.ran) == list(range(60))
            assert set(api.ran) == set(range(60))
            assert await remote.work("after") == "after"
            assert api.ran.count("after") == 1
            assert serving.statistics().reconnects > 0
            assert using.statistics().reconnects > 0


@MODES
async def test_replaced_by_a_server_whose_clock_is_behind(
    own_server: RedisServer, stream_name: str, grouped: bool
) -> None:
    """What was read has ids of the future then; what comes is read all the same, at once."""
    async with link(own_server.url, own_server.url, stream_name, grouped) as (
        api,
        remote,
        serving,
        using,
    ):
        with redis.Redis.from_url(own_server.url) as witness:
            future = f"{(witness.time()[0] + 3600) * 1000}-0"
            keys = [stream_name, f"{{{stream_name}}}:control"]
            keys += [f"{{{stream_name}}}:inbox:{peer.session_id}" for peer in (serving, using)]
            for key in keys:
                witness.xadd(key, {"hint": "later"}, id=future)
            # Its answer, and the request itself, come behind those.
            assert await remote.work(1) == 1
            await until(lambda: all(_reads_behind(peer, future) for peer in (serving, using)))
            witness.flushall()
            witness.client_kill_filter(_type="normal", skipme=True)
            for n in range(2, 20):
                assert await remote.work(n) == n
            assert api.ran == list(range(1, 20))


def _reads_behind(peer: RedisStreamsTransport, entry_id: str) -> bool:
    reader = peer._lane.addressed.reader
    return bool(reader.positions) and all(
        order(position) >= order(entry_id.encode()) for position in reader.positions.values()
    )


@MODES
async def test_flushed(
    own_server: RedisServer,
    stream_name: str,
    grouped: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """FLUSHALL: stream, group and inboxes are made again, with a warning."""
    async with link(own_server.url, own_server.url, stream_name, grouped) as (_, remote, _, _):
        assert await remote.work(1) == 1
        with redis.Redis.from_url(own_server.url) as witness:
            witness.flushall()
            await until(lambda: len(witness.keys("*inbox*")) == 2)
            if grouped:
                await until(lambda: witness.exists(stream_name))
        assert await remote.work(2) == 2
    assert "was made again" in caplog.text


@MODES
async def test_replica(own_server: RedisServer, stream_name: str, grouped: bool) -> None:
    """The server becomes a replica and refuses writes for a while: calls wait, nobody gives up."""
    url, options = own_server.url, {"claim_idle": 0.2}
    async with link(url, url, stream_name, grouped, **options) as (api, remote, serving, using):
        assert await remote.work(1) == 1
        with redis.Redis.from_url(url) as witness:
            witness.replicaof("127.0.0.1", 1)
            results: list[Any] = []

            async def call() -> None:
                results.append(await remote.work(2))

            async with anyio.create_task_group() as group:
                group.start_soon(call)
                # By then claims, leases and housekeeping have been refused, too.
                for transport in (using, serving):
                    await until(lambda: transport._lane.link.reconnects > 4)
                assert results == []
                witness.replicaof("NO", "ONE")
        assert results == [2]
        assert api.ran == [1, 2]


async def test_new_password(own_server: RedisServer, stream_name: str) -> None:
    """A server that won't let this peer in again ends it, with an error that says so."""
    with pytest.raises(TransportConnectionError, match="user and password"):
        async with RedisStreamsTransport(own_server.url, stream=stream_name, **QUICK) as transport:
            async with RPCChannel(transport, timeout=CALL_BOUND) as channel:
                with redis.Redis.from_url(own_server.url) as witness:
                    witness.config_set("requirepass", "new")
                    witness.client_kill_filter(_type="normal", skipme=True)
                    with anyio.fail_after(BOUND):
                        await channel.serve_forever()


async def test_deadline_while_the_server_is_away(own_server: RedisServer, stream_name: str) -> None:
    """A call ends in time though nothing can be sent, and isn't sent afterwards."""
    async with link(own_server.url, own_server.url, stream_name, True) as (api, remote, _, using):
        own_server.kill()
        await until(lambda: using._lane.link.connection is None)
        with anyio.fail_after(BOUND), pytest.raises(RPCTimeoutError):
            await with_call_options(remote, timeout=0.3).work("late")
        with anyio.fail_after(BOUND), pytest.raises(RPCTimeoutError):
            await with_call_options(remote, timeout=0.3, reply=False).work("late too")
        await anyio.to_thread.run_sync(own_server.start)
        assert await remote.work("fine") == "fine"
        assert api.ran == ["fine"]


async def test_much_waits_for_the_server(
    own_server: RedisServer, stream_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server is away senders wait when much is queued, no longer than their deadlines."""
    monkeypatch.setattr("anyio_kkrpc.redis._writing._waiting.HIGH_WATER", 10_000)
    async with link(own_server.url, own_server.url, stream_name, True) as (api, remote, _, using):
        own_server.kill()
        await until(lambda: using._lane.link.connection is None)
        outcomes: list[Any] = []

        async def call(n: int, timeout: float) -> None:
            try:
                outcomes.append(await with_call_options(remote, timeout=timeout).work("x" * n))
            except RPCTimeoutError:
                outcomes.append("timeout")

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(call, 5000, 0.2)
            await until(lambda: len(outcomes) == 5)
            for _ in range(5):
                group.start_soon(call, 6000, CALL_BOUND)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(own_server.start)
        assert outcomes == ["timeout"] * 5 + ["x" * 6000] * 5
        assert api.ran == ["x" * 6000] * 5


async def test_loading(
    server_executable: str, stream_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is still loading its data is asked again until it is ready."""
    args = ["--dir", str(tmp_path), "--key-load-delay", "3000"]
    args += ["--loading-process-events-interval-bytes", "1024"]
    caplog.set_level("DEBUG", "anyio_kkrpc")
    with RedisServer(server_executable, args=args) as server:
        async with link(server.url, server.url, stream_name, True) as (_, remote, _, _):
            assert await remote.work(1) == 1
            with redis.Redis.from_url(server.url) as witness:
                witness.mset({f"key-{n}": "x" * 200 for n in range(1000)})
                witness.save()
            results: list[int] = []

            async def call() -> None:
                results.append(await remote.work(2))

            # On a busy machine the client may come back when all is loaded.
            while "loading" not in caplog.text.lower() and len(results) < 5:
                server.kill()
                async with anyio.create_task_group() as group:
                    group.start_soon(call)
                    await anyio.to_thread.run_sync(server.start)
            assert set(results) == {2}
    assert "loading" in caplog.text.lower()
