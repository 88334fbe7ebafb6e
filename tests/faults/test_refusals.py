"""Servers that refuse commands: for a while, until somebody mends it, or for good."""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from redis.credentials import CredentialProvider

from anyio_kkrpc import (
    RedisStreamsTransport,
    RPCChannel,
    RPCError,
    TransportConnectionError,
)
from anyio_kkrpc.redis._connection import _patience
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND
from tests.fake_server import FakeServer, fake_server

pytestmark = [pytest.mark.anyio, pytest.mark.server]

# With these all parts of a peer come to speak to the server often.
QUICK: dict[str, Any] = {
    "block_timeout": 0.05,
    "health_check_interval": 0.1,
    "claim_idle": 0.3,
    "connect_timeout": 60.0,
    "use_consumer_group": True,
}
# What each part asks for, so that it can be refused alone.
PARTS = {
    "clock": ("TIME",),
    "inbox": ("XREAD",),
    "keys": ("PEXPIRE", "XINFO"),
    "requests": ("XREADGROUP",),
    "claims": ("EVAL",),
    "all": (),
}
PASSING = (
    "OOM command not allowed when used memory > 'maxmemory'.",
    "NOREPLICAS Not enough good replicas to write.",
    "MISCONF Redis is configured to save RDB snapshots, but it's unable to",
    "BUSY Redis is busy running a script.",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "ASK 3999 127.0.0.1:6381",
)
ELSEWHERE = (
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN The cluster is down",
    "ERR max number of clients reached",
)


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class Peers:
    """A worker and a client.

    :ivar worker: the worker's channel
    :ivar serving: the worker's transport
    :ivar remote: the worker's functions, for the client
    """

    def __init__(
        self, worker: RPCChannel, client: RPCChannel, serving: RedisStreamsTransport
    ) -> None:
        self.worker, self.client, self.serving = worker, client, serving
        self.remote: Any = client.get_api()


@asynccontextmanager
async def peers(
    worker_url: str, client_url: str, stream: str, **options: Any
) -> AsyncIterator[Peers]:
    """Run both; the worker takes further options."""
    common = {**QUICK, "stream": stream}
    async with (
        RedisStreamsTransport(worker_url, **common, **options) as serving,
        RedisStreamsTransport(client_url, **common) as using,
        RPCChannel(serving, expose=Api()) as worker,
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        yield Peers(worker, client, serving)


@asynccontextmanager
async def behind_fake(server: RedisServer, stream: str) -> AsyncIterator[tuple[FakeServer, Peers]]:
    """Run both, the worker behind a fake server."""
    async with (
        fake_server(server.url) as fake,
        peers(fake.url, server.url, stream) as p,
    ):
        yield fake, p


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


def lines(caplog: pytest.LogCaptureFixture, level: int, text: str = "") -> list[str]:
    """Return the log's lines of a level that contain a text."""
    found = [record.getMessage() for record in caplog.records if record.levelno == level]
    return [line for line in found if text in line]


def left(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log says of connections that were given up, but for silence: on a machine
    that is busy the server may say nothing for as long as these tests wait.
    """
    gone = lines(caplog, logging.WARNING, " lost (")
    return [line for line in gone if "(nothing moved for " not in line]


async def healed(caplog: pytest.LogCaptureFixture) -> None:
    """Wait until the log says that all is over."""
    await until(lambda: lines(caplog, logging.WARNING, "takes all commands again"))


async def said_once(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until all is over; a refusal with that text has been said once for each outage.

    An answer that comes when another part has been served again already is an outage of its own.
    """

    def said() -> int:
        return len([line for line in lines(caplog, logging.WARNING, "for now") if text in line])

    await until(lambda: 1 <= said() <= len(lines(caplog, logging.WARNING, "takes all commands")))


@pytest.mark.parametrize("part", PARTS)
async def test_each_reply_that_passes(
    redis_server: RedisServer, stream_name: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is refused for now is tried again on the same connection, and that is said once."""
    async with behind_fake(redis_server, stream_name) as (fake, p):
        assert await p.remote.add(1, 2) == 3
        for reply in PASSING:
            caplog.clear()
            refused = p.serving.statistics().refused
            fake.refuse(reply, *PARTS[part])
            with anyio.fail_after(BOUND):
                await fake.wait_refused(3)
            fake.accept()
            # That writes are taken again shows only when there is one.
            assert await p.remote.add(1, 2) == 3
            await healed(caplog)
            await said_once(caplog, reply)
            assert p.serving.statistics().refused > refused
            assert left(caplog) == []
        assert not p.worker.closed


@pytest.mark.one_server
@pytest.mark.parametrize("part", PARTS)
async def test_each_reply_that_leads_elsewhere(
    redis_server: RedisServer, stream_name: str, part: str
) -> None:
    """A server that can't help is left, and looked for again until it can."""
    async with behind_fake(redis_server, stream_name) as (fake, p):
        for reply in ELSEWHERE:
            fake.refuse(reply, *PARTS[part])
            with anyio.fail_after(BOUND):
                await fake.wait_refused(2)
            fake.accept()
            assert await p.remote.add(1, 2) == 3
        assert not p.worker.closed
        assert p.serving.statistics().reconnects > 0


@contextmanager
def out_of_memory(admin: redis.Redis) -> Iterator[None]:
    admin.config_set("maxmemory", 1)
    yield
    admin.config_set("maxmemory", 0)


@contextmanager
def no_replicas(admin: redis.Redis) -> Iterator[None]:
    admin.config_set("min-replicas-to-write", 1)
    yield
    admin.config_set("min-replicas-to-write", 0)


@contextmanager
def no_disk(admin: redis.Redis) -> Iterator[None]:
    folder = Path(admin.config_get("dir")["dir"])
    admin.config_set("save", "3600 1")
    admin.set("changed", 1)
    shutil.rmtree(folder)
    while True:
        try:
            admin.bgsave()
        except redis.ResponseError:
            pass  # it tries already
        try:
            admin.set("changed", 1)
        except redis.ResponseError as exc:
            assert "MISCONF" in str(exc)
            break
    folder.mkdir()
    yield
    admin.config_set("stop-writes-on-bgsave-error", "no")
    admin.config_set("save", "")


@contextmanager
def long_script(admin: redis.Redis) -> Iterator[None]:
    admin.config_set("busy-reply-threshold", 20)

    def run() -> None:
        with redis.Redis(port=admin.get_connection_kwargs()["port"]) as other:
            with pytest.raises(redis.ResponseError, match="killed"):
                other.eval("while true do end", 0)

    thread = threading.Thread(target=run)
    thread.start()
    while True:
        try:
            admin.ping()
        except redis.ResponseError as exc:
            assert "BUSY" in str(exc)
            break
    yield
    admin.script_kill()
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("state", [out_of_memory, no_replicas, no_disk, long_script])
async def test_server_that_refuses_for_a_while(
    own_server: RedisServer,
    stream_name: str,
    state: Callable[[redis.Redis], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Real servers that take no writes, or nothing: peers live on, and calls are answered again."""
    async with peers(own_server.url, own_server.url, stream_name) as p:
        assert await p.remote.add(1, 2) == 3
        refused, failed = p.serving.statistics().refused, []

        async def call() -> None:
            try:
                await p.remote.add(3, 4)
            except RPCError as exc:
                failed.append(exc)

        with redis.Redis.from_url(own_server.url) as admin, state(admin):
            async with anyio.create_task_group() as group:
                group.start_soon(call)
                # Without memory an idle worker is refused nothing, but its client is.
                await until(lambda: failed or p.serving.statistics().refused >= refused + 3)
                group.cancel_scope.cancel()
        with anyio.fail_after(BOUND):
            while True:
                try:
                    assert await p.remote.add(1, 2) == 3
                except RPCError:
                    await anyio.sleep(0.01)
                else:
                    break
        assert not p.worker.closed
        assert not p.client.closed
    assert left(caplog) == []
    assert not lines(caplog, logging.ERROR)


@pytest.mark.one_server
async def test_start_while_writes_are_refused(own_server: RedisServer, stream_name: str) -> None:
    """Entering waits, as long as it may take, and then succeeds."""
    with redis.Redis.from_url(own_server.url) as admin:
        async with anyio.create_task_group() as group:
            with no_replicas(admin):

                async def serve() -> None:
                    async with peers(own_server.url, own_server.url, stream_name) as p:
                        assert await p.remote.add(1, 2) == 3

                group.start_soon(serve)
                # Before Redis 7.0 the error of a script is counted as one without a code.
                counts = {"errorstat_NOREPLICAS", "errorstat_ERR"}
                await until(lambda: counts & {*admin.info("errorstats")})
                assert not admin.exists(stream_name)


# What ends a peer


@asynccontextmanager
async def ends(peers: Peers, caplog: pytest.LogCaptureFixture, pattern: str) -> AsyncIterator[None]:
    """Expect that the worker ends, with one line that tells why, which `serve_forever` raises."""
    caplog.clear()

    async def serve() -> None:
        with pytest.raises(TransportConnectionError, match=pattern):
            await peers.worker.serve_forever()

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as group:
            group.start_soon(serve)
            yield
    (line,) = lines(caplog, logging.ERROR)
    assert re.search(pattern, line)
    assert peers.worker.closed
    with pytest.raises(TransportConnectionError, match=pattern):
        await peers.serving.get_stream_info()


@pytest.mark.parametrize("part", PARTS)
async def test_moved(
    redis_server: RedisServer, stream_name: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that is on another node of a Cluster ends a peer with an error that tells that."""
    pattern = r"MOVED 3999 127.0.0.1:6381: the server is a node of a Redis Cluster"
    async with fake_server(redis_server.url) as fake:
        async with peers(fake.url, redis_server.url, stream_name) as p:
            async with ends(p, caplog, pattern):
                fake.refuse("MOVED 3999 127.0.0.1:6381", *PARTS[part])
            fake.accept()
        fake.refuse("MOVED 3999 127.0.0.1:6381", "EVAL")
        with pytest.raises(TransportConnectionError, match=pattern):
            async with RedisStreamsTransport(fake.url, stream=stream_name):
                pass


@pytest.mark.one_server
@pytest.mark.parametrize("command", ["XREAD", "XREADGROUP"])
async def test_command_that_is_unknown(
    redis_server: RedisServer, stream_name: str, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server on which nothing can be read ends a peer."""
    async with behind_fake(redis_server, stream_name) as (fake, p):
        async with ends(p, caplog, f"unknown command.*{command}, key"):
            fake.refuse(f"ERR unknown command '{command}'", command)
        fake.accept()


@pytest.mark.parametrize("command", ["TIME", "EVAL", "PEXPIRE", "XINFO"])
async def test_what_can_be_left_out(
    redis_server: RedisServer, stream_name: str, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Scripts and upkeep that fail are counted and logged; the worker goes on."""
    async with behind_fake(redis_server, stream_name) as (fake, p):
        assert await p.remote.add(1, 2) == 3
        fake.refuse("ERR something is wrong", command)
        with anyio.fail_after(BOUND):
            await fake.wait_refused(5)
        assert await p.remote.add(1, 2) == 3
        await until(lambda: p.serving.statistics().refused >= 4)
        fake.accept()
        await said_once(caplog, f"something is wrong ({command}")
        assert not p.worker.closed


@pytest.mark.one_server
async def test_refusals_at_the_end(redis_server: RedisServer, stream_name: str) -> None:
    """A peer that may write nothing any more leaves all the same."""
    async with fake_server(redis_server.url) as fake:
        async with peers(fake.url, redis_server.url, stream_name) as p:
            assert await p.remote.add(1, 2) == 3
            fake.refuse("NOREPLICAS Not enough good replicas to write.")
    assert fake.refused.total() > 0


@pytest.mark.one_server
async def test_admin_calls(redis_server: RedisServer, stream_name: str) -> None:
    """What is refused to those who look at a stream is told by an error of this library."""
    async with (
        fake_server(redis_server.url) as fake,
        RedisStreamsTransport(fake.url, stream=stream_name) as transport,
    ):
        for reply, pattern in {
            "NOREPLICAS Not enough": "NOREPLICAS Not enough",
            "NOPERM User shop has no": rf"NOPERM User shop has no .*, key '{stream_name}'",
            "MOVED 3999 127.0.0.1:6381": "is a node of a Redis Cluster",
        }.items():
            fake.refuse(
                reply, matches=lambda command: stream_name.encode() in command[1:3] + command[3:4]
            )
            for ask in (
                transport.get_stream_info,
                transport.get_all_entries,
                transport.delete_stream,
                lambda: transport.trim_stream(1),
            ):
                with pytest.raises(RPCError, match=pattern):
                    await ask()
            fake.accept()
        assert (await transport.get_stream_info()).length == 0


# Keys that hold something else


async def test_control_that_is_no_stream(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Peers live on without it, also those that come, and read it when it is a stream again."""
    control = f"{{{stream_name}}}:control"
    url = redis_server.url
    async with peers(url, url, stream_name) as p:
        assert await p.remote.add(1, 2) == 3
        witness.delete(control)
        witness.set(control, "text")
        await until(lambda: len(lines(caplog, logging.WARNING, "something else")) == 2)
        assert await p.remote.add(1, 2) == 3
        async with peers(url, url, stream_name) as newer:
            assert await newer.remote.add(1, 2) == 3
        assert p.serving.statistics().invalid == 1
        witness.delete(control)
        await until(lambda: len(lines(caplog, logging.WARNING, "is read again")) == 2)
        with anyio.move_on_after(0.1):
            await p.remote.sleep(100)
        await p.serving.signal_destroy()
        await until(lambda: p.client.closed)
        assert not p.worker.closed


async def test_inbox_that_is_no_stream(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An inbox is its owner's, who makes it again."""
    async with peers(redis_server.url, redis_server.url, stream_name) as p:
        inbox = f"{{{stream_name}}}:inbox:{p.serving.session_id}"
        witness.delete(inbox)
        witness.set(inbox, "text")
        await until(lambda: witness.type(inbox) == b"stream")
        assert await p.remote.add(1, 2) == 3
        assert not p.worker.closed


async def test_stream_that_is_none(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a stream nothing can be served."""
    async with peers(redis_server.url, redis_server.url, stream_name) as p:
        async with ends(p, caplog, f"Check the name of the stream: '{stream_name}'"):
            witness.delete(stream_name)
            witness.set(stream_name, "text")
        witness.delete(stream_name)


# Rights and logins


class Provider(CredentialProvider):
    def __init__(self, password: str) -> None:
        self.password = password

    def get_credentials(self) -> tuple[str, str]:
        return "shop", self.password


@contextmanager
def user(server: RedisServer, *rules: str) -> Iterator[redis.Redis]:
    """Make the user, with all rights but as the rules say; an administrator is given."""
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(
            "ACL", "SETUSER", "shop", "reset", "on", ">one", "~*", "&*", "+@all", *rules
        )
        yield admin
        admin.execute_command("ACL", "DELUSER", "shop")


def as_user(server: RedisServer) -> str:
    return server.url.replace("redis://", "redis://shop:one@")


@pytest.mark.parametrize(
    ("right", "named"),
    [
        ("xgroup", "XGROUP CREATE, key '{stream}'"),
        ("xreadgroup", "XREADGROUP, key '{stream}'"),
        ("eval", "EVAL, key '{{{stream}}}:inbox:"),
        ("xpending", "XPENDING, key '{stream}'"),
        ("xclaim", "XCLAIM, key '{stream}'"),
        ("xack", "XACK, key '{stream}'"),
        ("xread", "XREAD, key '{{{stream}}}:"),
        ("xinfo", "XINFO [A-Z]+, key '"),
    ],
)
async def test_worker_without_a_right(
    redis_server: RedisServer,
    stream_name: str,
    right: str,
    named: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker that can't work enters not, or ends at once; what it lacks, and for what, is told."""
    pattern = f"NOPERM .*{named.format(stream=stream_name)}"
    with user(redis_server, f"-{right}"):
        with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError, match=pattern):
            async with (
                RedisStreamsTransport(
                    as_user(redis_server), stream=stream_name, **QUICK
                ) as transport,
                RPCChannel(transport, expose=Api()) as channel,
            ):
                await channel.serve_forever()
    assert "the rights that a peer needs" in caplog.text or not lines(caplog, logging.ERROR)


@pytest.mark.parametrize("right", ["xadd", "pexpire"])
async def test_peer_without_a_right(
    redis_server: RedisServer, stream_name: str, right: str
) -> None:
    """Who can't have an inbox doesn't enter."""
    with user(redis_server, f"-{right}"):
        pattern = f"(?i){right}.*EVAL, key '{{{stream_name}}}:inbox:"
        with pytest.raises(TransportConnectionError, match=pattern):
            async with RedisStreamsTransport(as_user(redis_server), stream=stream_name):
                pass
    with redis.Redis.from_url(redis_server.url) as witness:
        assert witness.keys(f"*{stream_name}*") == []


@pytest.mark.parametrize("part", PARTS)
async def test_right_that_is_given_back(
    redis_server: RedisServer, stream_name: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a peer was once allowed, and isn't any more, may be allowed again soon."""
    async with behind_fake(redis_server, stream_name) as (fake, p):
        assert await p.remote.add(1, 2) == 3
        fake.refuse("NOPERM User shop has no permissions to run this command", *PARTS[part])
        with anyio.fail_after(BOUND):
            await fake.wait_refused(3)
        fake.accept()
        await healed(caplog)
        assert await p.remote.add(1, 2) == 3
        assert not p.worker.closed


@pytest.mark.parametrize("part", PARTS)
async def test_right_that_is_not_given_back(
    redis_server: RedisServer,
    stream_name: str,
    part: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It isn't waited for longer than that."""
    monkeypatch.setattr(_patience, "HEALING", 0.2)
    async with behind_fake(redis_server, stream_name) as (fake, p):
        assert await p.remote.add(1, 2) == 3
        async with ends(p, caplog, r"NOPERM no \(.*the rights that a peer needs"):
            fake.refuse("NOPERM no", *PARTS[part])
        fake.accept()


async def test_rights_of_a_real_user(redis_server: RedisServer, stream_name: str) -> None:
    """The same with an access control list."""
    with user(redis_server) as admin:
        async with peers(as_user(redis_server), redis_server.url, stream_name) as p:
            assert await p.remote.add(1, 2) == 3
            admin.execute_command("ACL", "SETUSER", "shop", "-@stream", "-eval")
            await until(lambda: p.serving.statistics().refused >= 3)
            admin.execute_command("ACL", "SETUSER", "shop", "+@all")
            assert await p.remote.add(1, 2) == 3
            assert not p.worker.closed


async def test_rotated_password(redis_server: RedisServer, stream_name: str) -> None:
    """The server has a new password before the provider knows it: logins are tried again."""
    provider = Provider("one")
    with user(redis_server) as admin:
        async with peers(
            redis_server.url, redis_server.url, stream_name, credential_provider=provider
        ) as p:
            assert await p.remote.add(1, 2) == 3
            admin.execute_command("ACL", "SETUSER", "shop", "resetpass", ">two")
            admin.execute_command("CLIENT", "KILL", "USER", "shop")
            await until(lambda: p.serving.statistics().refused >= 3)
            provider.password = "two"
            assert await p.remote.add(1, 2) == 3
            assert not p.worker.closed


@pytest.mark.parametrize("provided", [False, True])
async def test_password_that_stays_wrong(
    redis_server: RedisServer,
    stream_name: str,
    provided: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends a peer: at once without a provider, else after a bounded time."""
    monkeypatch.setattr(_patience, "HEALING", 0.2)
    options = {"credential_provider": Provider("one")} if provided else {}
    url = redis_server.url if provided else as_user(redis_server)
    advice = "that the credential_provider gives" if provided else "in the url"
    with user(redis_server) as admin:
        async with peers(url, redis_server.url, stream_name, **options) as p:
            async with ends(p, caplog, f"Check user and password {advice}"):
                admin.execute_command("ACL", "SETUSER", "shop", "resetpass", ">two")
                admin.execute_command("CLIENT", "KILL", "USER", "shop")
        if provided:
            assert p.serving.statistics().refused >= 1
        else:
            assert p.serving.statistics().refused == 0


@pytest.mark.parametrize("provided", [False, True])
async def test_wrong_password_at_the_start(
    redis_server: RedisServer,
    stream_name: str,
    provided: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One in the URL is told at once; a provider may give the right one soon."""
    monkeypatch.setattr(_patience, "HEALING", 0.2)
    with user(redis_server) as admin:
        admin.execute_command("ACL", "SETUSER", "shop", "resetpass", ">two")
        options = {"credential_provider": Provider("one")} if provided else {}
        url = redis_server.url if provided else as_user(redis_server)
        with pytest.raises(TransportConnectionError, match="Check user and password"):
            async with RedisStreamsTransport(url, stream=stream_name, **options):
                pass
        assert len(lines(caplog, logging.WARNING, "refuses the login for now")) == int(provided)
        assert not lines(caplog, logging.ERROR)
