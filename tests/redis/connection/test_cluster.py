"""Which node of a Cluster has a stream, found out from nodes that say what a test has them say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._cluster import ClusterFinder
from anyio_kkrpc.redis._connection._errors import Meaning, meaning_of, parse_moving_error
from anyio_kkrpc.redis._connection._target import Target
from tests.bounds import BOUND
from tests.fake_server import FakeNode, fake_node

from ..conftest import fake_peer

pytestmark = pytest.mark.anyio


class Node:
    """A node of a Cluster, and what it says of the stream.

    :ivar address: where it is
    """

    def __init__(self, fake: FakeNode) -> None:
        self._fake = fake
        self.address = Address("127.0.0.1", fake.port)
        fake.answers["INFO"] = f"run_id:{fake.port:x}\r\n".encode()
        self.be_copied()

    @property
    def port(self) -> int:
        return self.address.port

    @property
    def asked(self) -> int:
        """How often it was asked for the stream."""
        return self._fake.asked["XLEN"]

    def say(self, answer: object) -> None:
        """Answer so when it is asked for the stream."""
        self._fake.answers["XLEN"] = answer
        self._fake.frozen = False

    def have_it(self) -> None:
        self.say(7)

    def refuse(self, error: str) -> None:
        self.say(hiredis.ReplyError(error))

    def lead_to(self, other: Node, host: str = "127.0.0.1") -> None:
        self.refuse(f"MOVED 3999 {host}:{other.port}")

    def freeze(self) -> None:
        """Answer nothing any more."""
        self._fake.frozen = True

    def be_copied(self, *others: Node) -> None:
        """Name others as those that copy it."""
        copies = [[b"127.0.0.1", b"%d" % other.port, b"0"] for other in others]
        self._fake.answers["ROLE"] = [b"master", 0, copies]


@asynccontextmanager
async def nodes() -> AsyncIterator[tuple[Node, Node, Node]]:
    """Run three of them; the first one has the stream, and the others say so."""
    async with fake_node() as a, fake_node() as b, fake_node() as c:
        owner, other, third = Node(a), Node(b), Node(c)
        owner.have_it()
        other.lead_to(owner)
        third.lead_to(owner)
        yield owner, other, third


def finder(*seeds: Node, ports: tuple[int, ...] = (), timeout: float = 5.0) -> ClusterFinder:
    where = [node.port for node in seeds] + list(ports)
    url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in where)
    return ClusterFinder(Target.parse(url), b"jobs", timeout)


async def found_port(finder: ClusterFinder) -> int:
    with anyio.fail_after(BOUND):
        return (await finder.find()).port


async def nobodys_port() -> int:
    """Return a port that nobody listens at."""
    async with fake_peer(anyio.sleep) as address:  # type: ignore[arg-type]
        return address.port


# Finding


async def test_whoever_is_asked() -> None:
    """The one that has it says so, and any other one leads to it."""
    async with nodes() as (owner, other, replica):
        for seed in (owner, other, replica):
            assert await found_port(finder(seed)) == owner.port


@pytest.mark.parametrize("host", ["", "?", "localhost"])
async def test_hosts_of_moved(host: str) -> None:
    """A node that doesn't know its name means its own; one that has a name gives that."""
    async with nodes() as (owner, other, _):
        other.lead_to(owner, host)
        with anyio.fail_after(BOUND):
            found = await finder(other).find()
        assert (found.host, found.port) == (host.strip("?") or "127.0.0.1", owner.port)


async def test_over_a_node_that_does_not_know_better() -> None:
    """One that leads to one that leads on."""
    async with nodes() as (owner, other, replica):
        replica.lead_to(other)
        assert await found_port(finder(replica)) == owner.port


async def test_nodes_that_lead_to_each_other() -> None:
    """That ends, and somebody else is asked."""
    async with nodes() as (owner, other, third):
        other.lead_to(third)
        third.lead_to(other)
        with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError, match="lead to each"):
            await finder(other).find()
        assert other.asked + third.asked < 20
        assert await found_port(finder(other, third, owner)) == owner.port


@pytest.mark.parametrize(
    "error",
    [
        "CLUSTERDOWN The cluster is down",
        "CLUSTERDOWN Hash slot not served",
        "LOADING Redis is loading the dataset in memory",
        "MASTERDOWN Link with MASTER is down",
    ],
)
async def test_node_that_can_not_tell(error: str) -> None:
    """The next one is asked."""
    async with nodes() as (owner, other, _):
        other.refuse(error)
        for _ in range(4):
            assert await found_port(finder(other, owner)) == owner.port
        with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError) as caught:
            await finder(other).find()
        assert error.split()[0] in str(caught.value)
        assert meaning_of(caught.value) is Meaning.ELSEWHERE


@pytest.mark.parametrize(
    "error",
    [
        "ASK 3999 127.0.0.1:1",
        "NOPERM User shop has no permissions to run the 'xlen' command",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "BUSY Redis is busy running a script.",
    ],
)
async def test_node_that_says_something_else(error: str) -> None:
    """It has the stream: that it hasn't it would have said."""
    async with nodes() as (owner, other, _):
        owner.refuse(error)
        assert await found_port(finder(other)) == owner.port


async def test_seeds_that_are_gone() -> None:
    """One that is left is enough, and one that says nothing keeps nobody for long."""
    async with nodes() as (owner, other, silent):
        silent.freeze()
        gone = tuple([await nobodys_port() for _ in range(5)])
        for _ in range(3):
            assert await found_port(finder(silent, other, ports=gone)) == owner.port


async def test_nobody_is_there() -> None:
    """The error says of whom, and why; it is tried again later."""
    gone = [await nobodys_port() for _ in range(2)]
    found = finder(ports=(gone[0], gone[1]))
    with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError) as caught:
        await found.find()
    text = str(caught.value)
    assert f"no node of redis+cluster://127.0.0.1:{gone[0]},127.0.0.1:{gone[1]} has" in text
    assert "2 can't be asked" in text
    assert "Connection refused" in text
    assert meaning_of(caught.value) is Meaning.ELSEWHERE


async def test_login_that_is_refused() -> None:
    """What is wrong then is not where the stream is."""
    async with nodes() as (owner, other, _):
        owner.refuse("NOAUTH Authentication required.")
        with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError) as caught:
            await finder(other).find()
        assert meaning_of(caught.value) is Meaning.LOGIN


async def test_node_that_nobody_named() -> None:
    """What copies the owner is remembered, and asked when all that the URL names is gone."""
    async with nodes() as (owner, _, replica):
        owner.be_copied(replica)
        found = finder(owner)
        assert await found_port(found) == owner.port
        owner.freeze()
        replica.have_it()
        assert await found_port(found) == replica.port


@given(st.integers(1, 65535), st.sampled_from(["", "h", "2001:db8::1"]))
def test_hint(port: int, host: str) -> None:
    """Who was led elsewhere by a connection needs to ask nobody."""
    asked = ClusterFinder(Target.parse("redis+cluster://seed:7000"), b"jobs", 5.0)
    address = Address("asked", 7001)
    lost = TransportConnectionError("lost")
    lost.__cause__ = parse_moving_error(f"MOVED 3999 {host}:{port}")
    there = asked.hint(address, lost)
    assert there is not None
    assert (there.host, there.port) == (host or "asked", port)
    assert asked.hint(address, TransportConnectionError("lost")) is None
    assert asked.hint(address, OSError()) is None


async def test_many_nodes_in_turn() -> None:
    """However many nodes had it, as many as are remembered is bounded, and seeds are among them."""
    async with nodes() as (owner, _, _):
        asked = finder(owner, timeout=0.2)
        for port in range(1, 400):
            asked.hint(owner.address, parse_moving_error(f"MOVED 3999 127.0.0.1:{port}"))
        assert await found_port(asked) == owner.port


# Watching


class Told:
    """What the finder tells.

    :ivar ports: of where it found the stream
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self._news = anyio.Event()

    def found(self, address: Address) -> None:
        self.ports.append(address.port)
        self._news.set()

    def lose(self) -> None:
        raise AssertionError

    async def wait(self) -> int:
        with anyio.fail_after(BOUND):
            while not self.ports:
                await self._news.wait()
        return self.ports.pop(0)


@asynccontextmanager
async def watched(asked: ClusterFinder) -> AsyncIterator[Told]:
    told = Told()

    async def probe() -> None:
        return None

    async with anyio.create_task_group() as group:
        group.start_soon(partial(asked.watch, 0.01, probe, told))
        yield told
        group.cancel_scope.cancel()


async def asked_more(*some: Node, times: int = 3) -> None:
    """Wait until one of some nodes has been asked so many times more."""
    before = [node.asked for node in some]
    with anyio.fail_after(BOUND):
        while all(node.asked < n + times for node, n in zip(some, before, strict=True)):
            await anyio.sleep(0.005)


async def test_stream_that_moves() -> None:
    """Whoever is asked beside the owner tells that there is another one."""
    async with nodes() as (owner, other, third):
        asked = finder(owner, other)
        await asked.find()
        async with watched(asked) as told:
            await asked_more(other)
            assert told.ports == []
            third.have_it()
            owner.lead_to(third)
            other.lead_to(third)
            assert await told.wait() == third.port
            await asked_more(other)
            assert told.ports == []


async def test_replica_that_is_promoted() -> None:
    """The owner says nothing any more, and one of those that copied it has the stream."""
    async with nodes() as (owner, _, replica):
        owner.be_copied(replica)
        asked = finder(owner)
        await asked.find()
        async with watched(asked) as told:
            await asked_more(replica)
            owner.freeze()
            replica.have_it()
            assert await told.wait() == replica.port


async def test_node_that_is_said_to_have_it_and_does_not() -> None:
    """It is waited for: a node may hear of another one's promotion before that one does."""
    async with nodes() as (owner, other, third):
        asked = finder(owner, other)
        await asked.find()
        async with watched(asked) as told:
            other.lead_to(third)
            await asked_more(third)
            assert told.ports == []
            third.have_it()
            owner.lead_to(third)
            assert await told.wait() == third.port


async def test_two_names_of_one() -> None:
    """A name in the URL and what the others call it are one node: nothing has moved."""
    async with nodes() as (owner, other, _):
        asked = ClusterFinder(
            Target.parse(f"redis+cluster://localhost:{owner.port},127.0.0.1:{other.port}"),
            b"jobs",
            5.0,
        )
        asked.hint(owner.address, parse_moving_error(f"MOVED 1 localhost:{owner.port}"))
        async with watched(asked) as told:
            await asked_more(other)
            once = owner.asked
            await asked_more(other, times=5)
            assert owner.asked == once
            assert told.ports == []


async def test_two_that_have_it() -> None:
    """A node that was cut off, or is behind: who had it is asked before it is left."""
    async with nodes() as (owner, other, _):
        asked = finder(owner, other)
        await asked.find()
        async with watched(asked) as told:
            other.have_it()
            await asked_more(other, times=5)
            assert told.ports == []
            owner.lead_to(other)
            assert await told.wait() == other.port


async def test_user_who_may_not_ask() -> None:
    """Whoever may not can't watch; a connection tells where the stream is when it is used."""
    async with nodes() as (owner, other, third):
        for node in (owner, other, third):
            node.refuse("NOPERM User shop has no permissions to run the 'xlen' command")
        asked = finder(owner, other)
        await asked.find()

        async def probe() -> None:
            return None

        with anyio.fail_after(BOUND):
            await asked.watch(0.01, probe, Told())
        assert owner.asked + other.asked + third.asked < 5


async def test_watcher_that_is_gone() -> None:
    """Another node is asked in its place, also one that comes back."""
    async with nodes() as (owner, other, third):
        asked = finder(owner, other, third)
        await asked.find()
        async with watched(asked):
            for silent, left in ((other, third), (third, other)):
                silent.freeze()
                await asked_more(left)
                silent.lead_to(owner)
            await asked_more(other, third)
