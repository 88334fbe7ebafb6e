"""What is asked of sentinels, and what comes of their answers. No server takes part."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection import _sentinel
from anyio_kkrpc.redis._connection._resolver import Topology
from anyio_kkrpc.redis._connection._role import Role
from anyio_kkrpc.redis._connection._sentinel import Sentinel
from anyio_kkrpc.redis._connection._target import Target
from tests.bounds import BOUND
from tests.fake_server import FakeNode, fake_node

pytestmark = pytest.mark.anyio

MASTER = [b"master", 0, []]
REPLICA = [b"slave", b"127.0.0.1", 1, b"connected", 0]
ERROR = Exception


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no sentinel that doesn't answer."""
    monkeypatch.setattr(_sentinel, "_SOON", BOUND)
    monkeypatch.setattr(_sentinel, "_LATE", BOUND)


class Sentinels:
    """Some that say the same, unless they are told to say something else."""

    def __init__(self, nodes: list[FakeNode]) -> None:
        self.nodes = nodes
        self.say("10.0.0.1", 7000)

    def say(self, host: str, port: int, *nodes: FakeNode) -> None:
        for node in nodes or self.nodes:
            tell(node, [host.encode(), str(port).encode()])

    def finder(self, options: str = "", *, first: int | None = None) -> Sentinel:
        """Return one that knows these, or only one of them."""
        nodes = self.nodes if first is None else [self.nodes[first]]
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        return Sentinel(Target.parse(f"redis+sentinel://u:p@{hosts}/mymaster/2{options}"))


def tell(node: FakeNode, answer: Any, others: Any = None) -> None:
    """Let a sentinel answer so, where the master is and which others there are."""

    def sentinel(command: list[bytes]) -> Any:
        assert command[2] == b"mymaster"
        return answer if command[1] == b"get-master-addr-by-name" else (others or [])

    node.answers["SENTINEL"] = sentinel


@asynccontextmanager
async def sentinels(count: int = 3) -> AsyncIterator[Sentinels]:
    async with AsyncExitStack() as stack:
        yield Sentinels([await stack.enter_async_context(fake_node()) for _ in range(count)])


async def no_probe() -> Role | None:
    raise AssertionError("sentinels are asked, not the server")


async def test_one_answer_is_enough() -> None:
    """The first answer counts, with the URL's user and database; the sentinel stays the first."""
    async with sentinels() as group:
        finder = group.finder()
        for _ in range(3):
            address = await finder.find()
        assert (address.host, address.port, address.db) == ("10.0.0.1", 7000, 2)
        assert (address.username, address.password) == ("u", "p")
        assert sorted(node.connections for node in group.nodes) == [0, 0, 3]
        assert all(not node.asked["AUTH"] for node in group.nodes)


async def test_credentials() -> None:
    """Sentinels get credentials of their own."""
    async with sentinels(1) as group:
        logins = []
        group.nodes[0].answers["AUTH"] = lambda command: logins.append(command[1:]) or b"OK"
        await group.finder("?sentinel_username=s&sentinel_password=t").find()
        await group.finder("?sentinel_password=t").find()
        assert logins == [[b"s", b"t"], [b"t"]]


async def test_tls(certificates: tuple[str, str, str]) -> None:
    """With rediss+sentinel:// sentinels are asked by TLS, with the certificates of the URL."""
    certificate, key, authority = certificates
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with fake_node(context) as node:
        tell(node, [b"localhost", b"7000"])
        url = f"rediss+sentinel://127.0.0.1:{node.port}/mymaster?ssl_ca_certs={authority}"
        address = await Sentinel(Target.parse(url)).find()
    assert str(address) == "rediss://localhost:7000/0"


async def test_those_that_do_not_answer_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is frozen, one has no idea, one is odd; the last one is asked first from then on."""
    async with sentinels(4) as group:
        frozen, ignorant, odd, _ = group.nodes
        frozen.frozen = True
        tell(ignorant, None)
        tell(odd, [b"", b"65536"])
        finder = group.finder()
        with anyio.fail_after(BOUND), monkeypatch.context() as patch:
            patch.setattr(_sentinel, "_SOON", 0.5)
            patch.setattr(_sentinel, "_LATE", 0.5)
            found = None
            while found is None:  # on a busy machine none of them answers in time
                with suppress(TransportConnectionError):
                    found = await finder.find()
        assert found.port == 7000
        before = [node.connections for node in group.nodes]
        await finder.find()
        before[-1] += 1
        assert [node.connections for node in group.nodes] == before


async def test_who_asks_has_no_time() -> None:
    """It isn't the silent one that is asked first next time."""
    async with sentinels(2) as group:
        group.nodes[0].frozen = True
        finder = group.finder()
        finder._known.sort(key=lambda one: one.port != group.nodes[0].port)
        with anyio.move_on_after(0.1):
            await finder.find()
        with anyio.fail_after(BOUND):
            await finder.find()
        assert group.nodes[1].connections == 1


async def test_others_are_learned() -> None:
    """A sentinel tells of others, which are asked when it is gone."""
    async with sentinels(2) as group:
        first, second = group.nodes
        other = [b"name", b"x", b"ip", b"127.0.0.1", b"port", str(second.port).encode()]
        nonsense = [[b"ip"], b"x", None, [b"ip", b"h", b"port", b"many"], [[b"ip"], b"h", [], 1]]
        tell(first, [b"10.0.0.1", b"7000"], [other, *nonsense])
        finder = group.finder(first=0)
        await finder.find()
        assert second.connections == 0
        tell(first, None)
        await finder.find()
        assert second.connections == 1


async def test_not_too_many_are_learned() -> None:
    """What sentinels tell is bounded, and those of the URL stay."""
    async with sentinels(1) as group:
        others = [[b"ip", b"127.0.0.2", b"port", b"%d" % port] for port in range(1, 200)]
        tell(group.nodes[0], None, others)
        finder = group.finder()
        tell(group.nodes[0], [b"10.0.0.1", b"7000"], others)
        await finder.find()
        tell(group.nodes[0], None)
        with pytest.raises(TransportConnectionError) as caught:
            await finder.find()
        assert 20 < str(caught.value).count("127.0.0.2") < 40
        assert str(group.nodes[0].port) in str(caught.value)


@pytest.mark.parametrize(
    ("answers", "advice"),
    [
        ({"SENTINEL": None}, "SENTINEL MASTERS lists"),
        ({"PING": ERROR("NOAUTH Authentication required.")}, "sentinel_username and sentinel_p"),
        ({"SENTINEL": ERROR("NOPERM no permissions")}, "this user may use SENTINEL"),
        ({"SENTINEL": ERROR("ERR unknown command 'SENTINEL'")}, "that sentinels listen at these"),
        ({"gone": True}, "that sentinels are running there"),
    ],
)
async def test_errors(answers: dict[str, Any], advice: str) -> None:
    """The error says what each sentinel said, and what to check; no password is in it."""
    async with sentinels(2) as group:
        hosts = [f"127.0.0.1:{node.port}" for node in group.nodes]
        for node in group.nodes:
            node.answers.update(answers)
        finder = group.finder("?sentinel_password=s3cret" if "gone" in answers else "")
        if "gone" not in answers:
            with pytest.raises(TransportConnectionError, match=advice) as caught:
                await finder.find()
    if "gone" in answers:
        with pytest.raises(TransportConnectionError, match=advice) as caught:
            await finder.find()
        assert "Connection refused" in str(caught.value)
    text = str(caught.value)
    assert "no sentinel tells where redis+sentinel://u:***@" in text
    assert all(f"{host}: " in text for host in hosts)
    assert "s3cret" not in text


class TestWatching:
    @staticmethod
    @asynccontextmanager
    async def watched(finder: Sentinel) -> AsyncIterator[Topology]:
        topology = Topology(finder)
        await topology.resolve()
        async with anyio.create_task_group() as group:
            group.start_soon(topology.watch, 0.05, no_probe)
            yield topology
            group.cancel_scope.cancel()

    async def test_change(self) -> None:
        """A new master is told once it says so itself; one connection is all that it takes."""
        async with sentinels(1) as group, fake_node() as promoted:
            async with self.watched(group.finder()) as topology:
                await group.nodes[0].wait_asked("SENTINEL", 5)
                assert group.nodes[0].connections == 2  # one of them to begin with
                assert topology.generation == 0
                promoted.answers["AUTH"] = promoted.answers["SELECT"] = b"OK"
                promoted.answers["ROLE"] = REPLICA
                group.say("127.0.0.1", promoted.port)
                await promoted.wait_asked("ROLE", 2)
                assert topology.generation == 0
                promoted.answers["ROLE"] = MASTER
                with anyio.fail_after(BOUND):
                    assert await topology.wait_changed(0) == 1
                assert (await topology.resolve()).port == promoted.port

    async def test_another_sentinel(self, caplog: pytest.LogCaptureFixture) -> None:
        """When a sentinel is lost the next one is asked; silence of all is said once."""
        async with sentinels(2) as group:
            async with self.watched(group.finder()) as topology:
                for node in group.nodes:
                    tell(node, None)
                for node in group.nodes:
                    await node.wait_asked("SENTINEL", 10)
                assert len(caplog.messages) == 1
                assert "It isn't watched meanwhile" in caplog.messages[0]
                group.say("10.0.0.1", 7000)
                with anyio.fail_after(BOUND):
                    while len(caplog.messages) < 2:
                        await anyio.sleep(0.01)
                assert "a sentinel answers again" in caplog.messages[1]
                assert topology.generation == 0
