"""Peers of a Redis Cluster: real nodes fail, or hand the stream on, while calls are on their way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import anyio
import anyio.to_thread
import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, TransportConnectionError
from benchmarks.failover import STREAM, Load, fail_over, freeze, kill, move, take_over
from tests.bounds import CALL_BOUND
from tests.faults.keyed_load import KeyedLoad
from tests.topologies import ClusterSetup, Node

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def nodes(server_executable: str) -> Iterator[ClusterSetup]:
    """Three masters with a replica each."""
    with ClusterSetup(server_executable) as setup:
        yield setup


@pytest.fixture
def cluster(nodes: ClusterSetup) -> ClusterSetup:
    """The same, whole again."""
    nodes.heal()
    return nodes


class Calls(Load):
    """A few calls at a time, that are to be answered all."""

    def __init__(self) -> None:
        super().__init__(8, 20)

    async def see(self, url: str, *events: partial[object]) -> None:
        with anyio.fail_after(CALL_BOUND):
            run = await self.run(url, *events)
        assert self.failed == []
        assert run.calls == self.answered >= 20 * (1 + len(events))


def begin_move(cluster: ClusterSetup) -> None:
    cluster.begin_move(STREAM, cluster.stranger(STREAM))


async def test_stream_that_moves(cluster: ClusterSetup) -> None:
    """Its slot moves key by key, and a replica takes the place of its master, who agrees: nothing is
    lost, and nothing runs twice. Until its keys have moved, calls go on.
    """
    calls = Calls()
    events = partial(begin_move, cluster), partial(move, cluster), partial(fail_over, cluster)
    await calls.see(cluster.url, *events)
    assert set(calls.runs.values()) == {1}


async def test_node_that_fails(cluster: ClusterSetup) -> None:
    """One that a replica has taken the place of without asking it, one that does nothing any more,
    and one that is gone: what the replica didn't have yet is sent again.
    """
    healed = partial(cluster.heal)
    events = partial(take_over, cluster), healed, partial(freeze, cluster), healed
    await Calls().see(cluster.url, *events, partial(kill, cluster))


async def test_calls_with_keys(cluster: ClusterSetup) -> None:
    """Their slot moves key by key, a replica takes the place of its master who agrees, and that one
    is killed. Until a slot has moved they wait, since they need several keys at once; then: one result for a key, and each item of a stream that is kept comes once, in order.
    """
    load, healed = KeyedLoad(), partial(cluster.heal)
    events = partial(move, cluster), partial(fail_over, cluster)
    await load.see(cluster.url, *events, healed, partial(kill, cluster))
    assert load.lost == []


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b


async def test_any_node_will_do(cluster: ClusterSetup) -> None:
    """A URL may name one that hasn't the stream, or its replica; others may be gone."""

    def find() -> tuple[Node, Node, Node]:
        owner = cluster.owner(STREAM)
        return cluster.stranger(STREAM), cluster.replica_of(owner), owner

    stranger, replica, owner = await anyio.to_thread.run_sync(find)
    gone = next(node for node in cluster.nodes if node not in (stranger, replica, owner))
    await anyio.to_thread.run_sync(gone.kill)
    async with (
        RedisStreamsTransport(cluster.url_of(stranger), stream=STREAM) as serving,
        RPCChannel(serving, expose=Api()),
    ):
        for known in ((gone, replica), (gone, owner, gone)):
            async with (
                RedisStreamsTransport(cluster.url_of(*known), stream=STREAM) as using,
                RPCChannel(using, timeout=CALL_BOUND) as channel,
            ):
                assert await channel.get_api().add(1, 2) == 3


async def test_url_of_one_node(cluster: ClusterSetup) -> None:
    """Where the stream isn't, the error says which URL is meant."""
    stranger = await anyio.to_thread.run_sync(cluster.stranger, STREAM)
    with pytest.raises(TransportConnectionError, match=r"MOVED .* redis\+cluster://"):
        async with RedisStreamsTransport(stranger.url, stream=STREAM):
            pass
