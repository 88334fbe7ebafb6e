"""Users of Redis with no more rights than docs/security.md gives to each role."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis
from redis.exceptions import NoPermissionError

from anyio_kkrpc import (
    CallCancelledError,
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    RPCTimeoutError,
    expose,
    with_call_options,
)
from anyio_kkrpc._cli._asking import Servers
from anyio_kkrpc._cli._check import by_redis
from anyio_kkrpc._cli._dead import purge_older
from anyio_kkrpc._cli._report import NotReadyError
from anyio_kkrpc._cli._top_keys import look_for_keys
from anyio_kkrpc._cli._top_look import Search, look
from anyio_kkrpc.testing import RedisServer
from anyio_kkrpc.testing._server import server_version
from tests.bounds import BOUND, CALL_BOUND
from tests.servers import Servers as SharedServers
from tests.topologies import ClusterSetup, Node, SentinelSetup
from tests.wire import peer

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "docs" / "security.md"
SERVERS_PAGE = PAGE.with_name("servers.md")
STREAM = {"stream": "jobs"}


@pytest.fixture
def anyio_backend() -> str:
    """Any one: what may be written doesn't depend on it."""
    return "asyncio"


def rules_of(page: Path, version: str) -> dict[str, list[str]]:
    """Return the commands of a page that make the roles' users, in words.

    :param version: of the server. Before 7.0 a key can be had for both reading and writing only.
    """
    found = re.findall(r"```text acl (\w+)\n(.*?)\n```", page.read_text(), re.DOTALL)
    old = version.startswith("Redis 6.")
    return {role: (re.sub("%.~", "~", rule) if old else rule).split() for role, rule in found}


class Users:
    """The roles' users on a server."""

    def __init__(self, server: RedisServer) -> None:
        self._port = server.port
        self.admin = redis.Redis.from_url(server.url)
        self._names: dict[str, str] = {}
        self.version = server.version
        for role, words in rules_of(PAGE, server.version).items():
            self.admin.execute_command(*words)
            self._names[role] = words[2]

    def url(self, role: str) -> str:
        return f"redis://{self._names[role]}:secret@127.0.0.1:{self._port}"

    def client(self, role: str) -> redis.Redis:
        return redis.Redis.from_url(self.url(role))

    def denied(self) -> list[Any]:
        """Return what was refused to anybody, but for what redis-py tells of itself."""
        return [
            {key: entry[key] for key in ("username", "reason", "object", "context")}
            for entry in self.admin.acl_log(100)
            if entry["object"] not in ("client|setinfo", "client")  # the latter before 7.0
        ]


@pytest.fixture
def users(own_server: RedisServer, caplog: pytest.LogCaptureFixture) -> Iterator[Users]:
    """All of them; nothing must have been refused in the end but what the test asked for."""
    users = Users(own_server)
    yield users
    users.admin.close()
    assert not [r for r in caplog.records if "NOPERM" in r.getMessage()], caplog.text


class Hanging:
    """Never answers.

    :ivar runs: how often it was called
    """

    def __init__(self) -> None:
        self.runs = 0
        self.began = anyio.Event()

    async def hang(self) -> None:
        self.runs += 1
        self.began.set()
        await anyio.sleep_forever()


async def test_keys(users: Users) -> None:
    """Calls with keys: made, joined, kept, told of, cancelled, begun later, and dead."""
    common: dict[str, Any] = {**STREAM, "use_consumer_group": True}
    async with (
        RedisStreamsTransport(users.url("worker"), session_id="work-1", **common) as serving,
        RedisStreamsTransport(users.url("client"), session_id="web-1", **common) as using,
        RPCChannel(serving, expose=peer.Api()),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        for _ in range(2):
            assert await with_call_options(api, key="a").who() == "served"
        call = await channel.start(api.hang(), key="b", delay=0.1)
        with anyio.fail_after(BOUND):
            while (await call.state()).kind != "running":
                await anyio.sleep(0.01)
        with pytest.raises(RPCTimeoutError):
            await with_call_options(api, key="b", timeout=0.1).hang()
        assert [told async for told in channel.attach("a").progress()] == []
        assert await call.cancel()
        with pytest.raises(CallCancelledError):
            await call.result()
        assert await channel.attach("a").forget()
    assert users.denied() == []


@pytest.mark.parametrize("lacking", ["", "-xack -xgroup|delconsumer"], ids=["now", "before"])
async def test_cancel_of_what_was_handed_back(users: Users, lacking: str) -> None:
    """Nothing is left of it to be run, also if the rule is one of before that was possible."""
    if lacking:
        users.admin.execute_command("ACL", "SETUSER", "web", *lacking.split())
    common: dict[str, Any] = {**STREAM, "use_consumer_group": True}
    served = Hanging()
    async with (
        RedisStreamsTransport(users.url("client"), session_id="web-1", **common) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
        anyio.create_task_group() as group,
    ):
        async with (
            RedisStreamsTransport(users.url("worker"), session_id="work-1", **common) as serving,
            RPCChannel(serving, expose=served),
        ):
            group.start_soon(channel.get_api().hang)
            await served.began.wait()
        assert users.admin.xpending("jobs", "kkrpc-group")["pending"] == 1
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True), anyio.fail_after(BOUND):
            while users.admin.xlen("jobs"):
                await anyio.sleep(0.01)
    assert users.admin.xpending("jobs", "kkrpc-group")["pending"] == bool(lacking)
    async with (
        RedisStreamsTransport(
            users.url("worker"), session_id="work-2", claim_idle=0.3, **common
        ) as serving,
        RPCChannel(serving, expose=served),
    ):
        with anyio.fail_after(BOUND):
            while users.admin.xpending("jobs", "kkrpc-group")["pending"]:
                await anyio.sleep(0.01)
    assert served.runs == 1
    assert [one["username"] for one in users.denied()] == ["web"] * bool(lacking)


@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_client_and_worker(users: Users, grouped: bool) -> None:
    """All that a client asks of a worker; lost connections, trimming, upkeep, time-outs, the end."""
    common: dict[str, Any] = {**STREAM, "use_consumer_group": grouped, "inbox_ttl": 30}
    common |= {"health_check_interval": 0.3, "max_len": 100}
    own = {"consumer_name": "work-1", "claim_idle": 1} if grouped else {}
    url = users.url("client")
    async with (
        RedisStreamsTransport(users.url("worker"), session_id="work-1", **common, **own) as serving,
        RPCChannel(serving, expose=expose(peer.Api(), writable=["theme"])) as channel,
    ):
        options = {**common, "session_id": "web-1"} | ({"max_backlog": 1000} if grouped else {})
        del options["use_consumer_group"]
        found = await peer.exercise(url, "json", worker="work-1", grouped=grouped, **options)
        expected = {**peer.EXPECTED, "invalid": 0}
        if not grouped:
            del expected["not found"]
        assert found == expected
        async with (
            RedisStreamsTransport(url, session_id="web-2", **common) as using,
            RPCChannel(using, timeout=CALL_BOUND) as asking,
        ):
            with pytest.raises(RPCTimeoutError):
                await with_call_options(asking.get_api(), timeout=0.5).hang()
            for user in ("web", "work"):
                users.admin.client_kill_filter(user=user)
            assert await asking.get_api().who() == "served"
            with anyio.fail_after(BOUND):
                while not (using.statistics().reconnects and serving.statistics().reconnects):
                    await anyio.sleep(0.01)
            await _kept(users.admin, "web-2", "work-1")
        async with RedisStreamsTransport(users.url("operator"), **STREAM) as operator:
            await operator.signal_destroy()
        with anyio.fail_after(BOUND):
            await channel.serve_forever()
    assert users.denied() == []


async def _kept(admin: redis.Redis, *sessions: str, stream: str = "jobs") -> None:
    """Wait until each has made its inbox live longer."""
    for session in sessions:
        key = f"{{{stream}}}:inbox:{session}"
        before = left = admin.pttl(key)
        with anyio.fail_after(BOUND):
            while left <= before:
                await anyio.sleep(0.05)
                before, left = left, admin.pttl(key)


async def test_lost_requests_and_dead_letters(users: Users) -> None:
    """What a killed worker held is given up; it is looked at, put back, purged, and all is deleted."""
    async with (
        RedisStreamsTransport(
            users.url("client"), session_id="web-1", use_consumer_group=True, **STREAM
        ) as using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        users.admin.xgroup_create("jobs", "kkrpc-group", "0", mkstream=True)
        async with anyio.create_task_group() as group:
            group.start_soon(_is_given_up, channel)
            with anyio.fail_after(BOUND):
                while not users.admin.xreadgroup("kkrpc-group", "gone", {"jobs": ">"}):
                    await anyio.sleep(0.01)
            await peer.give_up_dead(users.url("worker"), session_id="work-1", **STREAM)
    with users.client("viewer") as client:
        search = Search(client)
        search.go_on(None)
        (found,) = look(client, search.names)
        assert (found.name, found.dead, found.error) == ("jobs", 1, None)
        look_for_keys(client, [found])
        if not users.version.startswith("Redis 6."):
            for ask in (("ZCARD", "{jobs}:due"), ("EVAL_RO", "return 1", 1, "jobs")):
                client.execute_command(*ask)  # or nothing would be shown
    async with RedisStreamsTransport(users.url("operator"), **STREAM) as operator:
        (letter,) = await operator.dead_letters()
        await operator.retry_dead_letter(letter.id)
        assert await operator.purge_dead_letters() == 0
        assert (await operator.get_stream_info()).groups == 1
        assert len(await operator.get_all_entries()) >= 1
        await operator.trim_stream(0)
        await operator.delete_stream()
    purge_older(users.url("operator"), "jobs", 1, 1.0)
    assert users.denied() == []


async def _is_given_up(channel: RPCChannel) -> None:
    with pytest.raises(DeliveryError):
        await channel.get_api().note()


async def test_check(users: Users) -> None:
    """Probes find out whether workers are there as who looks."""
    options: dict[str, Any] = {**STREAM, "use_consumer_group": True}
    async with (
        RedisStreamsTransport(users.url("worker"), session_id="work-1", **options) as one,
        RedisStreamsTransport(
            users.url("worker"), session_id="work-2", consumer_name="named", **options
        ) as two,
        RPCChannel(one, expose=peer.Api()),
        RPCChannel(two, expose=peer.Api()),
    ):
        with anyio.fail_after(BOUND):
            while True:
                try:
                    by_redis(users.url("viewer"), "jobs", "kkrpc-group", workers=2, timeout=BOUND)
                    break
                except NotReadyError:  # they haven't begun to read
                    await anyio.sleep(0.01)
    assert users.denied() == []


FORBIDDEN = {
    "client": (
        "XRANGE {jobs}:inbox:work-1 - +",
        "XREAD STREAMS {jobs}:inbox:other 0",
        "XRANGE {jobs}:dead - +",
        "XRANGE {jobs}:claimer:kkrpc-group - +",
        "XADD {jobs}:alive:work-1 * a b",
        "XREADGROUP GROUP kkrpc-group me STREAMS jobs >",
        "XGROUP DESTROY jobs kkrpc-group",
        "XADD other * a b",
        "KEYS *",
    ),
    "worker": (
        "XRANGE {jobs}:inbox:web-1 - +",
        "XADD {jobs}:alive:web-1 * a b",
        "XGROUP DESTROY jobs kkrpc-group",
        "XADD other * a b",
        "KEYS *",
    ),
    "viewer": (
        "XADD jobs * a b",
        "XADD {jobs}:inbox:web-1 * a b",
        "DEL jobs",
        "XRANGE other - +",
        "CONFIG GET *",
    ),
    "operator": (
        "XREADGROUP GROUP kkrpc-group me STREAMS jobs >",
        "XACK jobs kkrpc-group 1-0",
        "XRANGE other - +",
        "CONFIG GET *",
    ),
}


async def test_nothing_else(users: Users) -> None:
    """What isn't a role's is refused."""
    if users.version.startswith("Redis 6."):
        pytest.skip("needs Redis 7.0")
    for role, commands in FORBIDDEN.items():
        with users.client(role) as client:
            for command in commands:
                with pytest.raises(NoPermissionError):
                    client.execute_command(*command.split())


# What a peer can do without: rights that a rule of an older version lacks are of this kind.
DISPENSABLE = (
    *("ping", "client", "info", "role", "wait", "exists", "del", "xlen", "xdel", "xtrim"),
    *("xrevrange", "xsetid", "xgroup|setid", "xgroup|delconsumer", "xinfo|consumers"),
)


@pytest.mark.one_server
@pytest.mark.parametrize("right", DISPENSABLE)
async def test_without_a_right(
    redis_server: RedisServer, right: str, stream_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls, streams, cancels and upkeep go on; each peer says once what it lacks."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": True, "inbox_ttl": 30}
    options |= {"claim_idle": 2, "health_check_interval": 0.5, "max_len": 100}
    with redis.Redis.from_url(redis_server.url) as admin:
        admin.execute_command(
            *("ACL", "SETUSER", stream_name, "on", ">secret", f"~*{stream_name}*", "-@all"),
            *("+@stream", "+@connection", "+eval", "+info", "+time", "+exists", "+del"),
            *("+pexpire", "+role", "+wait", "+zadd", "+zrem", "+zcount", "+zrangebyscore"),
            f"-{right}",
        )
        url = redis_server.url.replace("redis://", f"redis://{stream_name}:secret@")
        api = peer.Api()
        async with (
            RedisStreamsTransport(url, session_id="work-1", **options) as serving,
            RedisStreamsTransport(url, session_id="web-1", **options) as using,
            RPCChannel(serving, expose=api) as worker,
            RPCChannel(using, timeout=CALL_BOUND) as channel,
        ):
            remote: Any = channel.get_api()
            assert await remote.who() == "served"
            assert [item async for item in remote.count(100)] == list(range(100))
            async with anyio.create_task_group() as group:
                group.start_soon(remote.hang)
                await peer.until_equal(remote.running, 1)
                group.cancel_scope.cancel()
            assert await peer.until_equal(remote.cancelled, 1) == 1
            await _kept(admin, "web-1", "work-1", stream=stream_name)
            assert await remote.who() == "served"
            assert not worker.closed
        admin.execute_command("ACL", "DELUSER", stream_name)
    told = {r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING}
    told = {text for text in told if re.search("NOPERM|permission|can't run this", text)}
    assert len(told) <= 2, told


# Several servers


OLD_RULE = "~jobs ~{jobs}:* -@all +@stream +@connection +eval +info +time +exists +del +pexpire"
# Servers don't tell what they are, nor which they are.
BLIND_RULE = OLD_RULE.replace("+info ", "")


class Several:
    """The roles' users on all servers of a set-up, and that of the sentinels.

    :param version: of all servers
    :param nodes: master and replicas
    :param askers: sentinels
    """

    def __init__(
        self, url: str, version: str, nodes: Sequence[Node], askers: Sequence[Node] = ()
    ) -> None:
        self._scheme, self._rest = url.split("://")
        self._nodes = [*nodes, *askers]
        for node in nodes:
            for words in rules_of(PAGE, version).values():
                node.run(*words)
        for asker in askers:
            asker.run(*rules_of(SERVERS_PAGE, version)["sentinel"])
        for node in nodes:
            for user, rule in (("old", OLD_RULE), ("blind", BLIND_RULE)):
                node.run("ACL", "SETUSER", user, "on", ">secret", *rule.split())
        if askers:
            self._rest += "?sentinel_username=ask&sentinel_password=secret"

    def url(self, user: str) -> str:
        return f"{self._scheme}://{user}:secret@{self._rest}"

    def denied(self) -> list[Any]:
        """Return what was refused to anybody."""
        return [entry for node in self._nodes for entry in node.run("ACL", "LOG")]


@pytest.fixture(scope="module")
def sentinels(servers: SharedServers) -> Iterator[SentinelSetup]:
    executable = servers["valkey8"].executable
    with SentinelSetup(executable, replicas=1, sentinels=1, down_after=60_000) as setup:
        yield setup


@pytest.fixture(scope="module")
def cluster(servers: SharedServers) -> Iterator[ClusterSetup]:
    with ClusterSetup(servers["valkey8"].executable, masters=1, replicas=1) as setup:
        yield setup


@pytest.fixture(params=["sentinel", "cluster"])
def several(request: pytest.FixtureRequest) -> tuple[Several, Callable[[], object]]:
    """Users on several servers, and what makes another one the master."""
    if request.param == "sentinel":
        setup: SentinelSetup = request.getfixturevalue("sentinels")
        version = server_version(setup.executable)
        return Several(setup.url, version, setup.nodes, setup.sentinels), setup.failover
    cluster: ClusterSetup = request.getfixturevalue("cluster")
    version = server_version(cluster.executable)
    return Several(cluster.url, version, cluster.nodes), partial(cluster.failover, "jobs")


def _streams(url: str) -> list[str]:
    """Return what `top` finds."""
    servers, found = Servers(url, BOUND), []
    for client in servers.every():
        search = Search(client)
        search.go_on(None)
        found += [stream.name for stream in look(client, search.names)]
    servers.close()
    return found


@pytest.mark.parametrize(
    ("caller", "server"),
    [("web", "work"), ("old", "old"), ("blind", "blind")],
    ids=["roles", "rule of before", "without INFO and ROLE"],
)
async def test_several_servers(
    several: tuple[Several, Callable[[], object]],
    caller: str,
    server: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Peers find the master and follow it; with an older rule each says what it lacks, once."""
    users, failover = several
    options: dict[str, Any] = {**STREAM, "use_consumer_group": True, "watch_interval": 0.05}
    async with (
        RedisStreamsTransport(users.url(server), session_id="work-1", **options) as serving,
        RedisStreamsTransport(users.url(caller), session_id="web-1", **options) as using,
        RPCChannel(serving, expose=peer.Api()),
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        api: Any = channel.get_api()
        assert await api.who() == "served"
        before = using.server_address
        await anyio.to_thread.run_sync(failover)
        assert await api.who() == "served"
        with anyio.fail_after(BOUND):
            while using.server_address == before:
                await anyio.sleep(0.01)
        assert await api.who() == "served"
    if caller == "web":
        assert users.denied() == []
        assert await anyio.to_thread.run_sync(_streams, users.url("look")) == ["jobs"]
    else:
        told = [r.getMessage() for r in caplog.records if "NOPERM" in r.getMessage()]
        assert len(told) <= 2, told
