"""A stream in four shards on three masters without replicas, of which one is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import anyio
import pytest
from anyio.to_thread import run_sync

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, RPCTimeoutError, with_call_options
from anyio_kkrpc.redis._stream._places import home_of, name_of_shard, shard_of_key
from tests.bounds import BOUND, CALL_BOUND
from tests.topologies import ClusterSetup, Node

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]

SHARDS = 4
KEYS = [
    next(f"k{n}" for n in count() if shard_of_key(f"k{n}", SHARDS) == one) for one in range(SHARDS)
]


@pytest.fixture(scope="module")
def nodes(server_executable: str) -> Iterator[ClusterSetup]:
    with ClusterSetup(server_executable, replicas=0) as setup:
        yield setup


@pytest.fixture
def cluster(nodes: ClusterSetup) -> ClusterSetup:
    nodes.heal()
    return nodes


class Service:
    async def echo(self, value: int) -> int:
        return value


def peer(cluster: ClusterSetup, stream: str, **options: str) -> RedisStreamsTransport:
    return RedisStreamsTransport(
        cluster.url,
        stream=stream,
        shards=SHARDS,
        use_consumer_group=True,
        connect_timeout=BOUND,
        **options,  # type: ignore[arg-type]
    )


def owners(cluster: ClusterSetup, stream: str) -> list[Node]:
    return [cluster.owner(name_of_shard(stream, shard)) for shard in range(SHARDS)]


async def test_a_master_is_killed(cluster: ClusterSetup, stream_name: str) -> None:
    """Calls of other shards go on. Those of its shards wait: until their time is over, or it is
    back. Who is at home there calls in another one meanwhile, and so does who comes then.
    """
    nodes = await run_sync(owners, cluster, stream_name)
    assert len(set(nodes)) == 3
    dead = next(shard for shard in range(SHARDS) if nodes.count(nodes[shard]) == 1)
    alive = [shard for shard in range(SHARDS) if shard != dead]
    at_home = (f"p{n}" for n in count() if home_of(f"p{n}", SHARDS) == dead)
    serving, using = (
        peer(cluster, stream_name),
        peer(cluster, stream_name, session_id=next(at_home)),
    )
    async with (
        serving,
        RPCChannel(serving, expose=Service()),
        using,
        RPCChannel(using, timeout=CALL_BOUND) as channel,
    ):
        api = channel.get_api()
        to = [with_call_options(api, shard_key=key) for key in KEYS]
        assert [await one.echo(1) for one in to] == [1] * SHARDS
        assert await api.echo(2) == 2
        await run_sync(nodes[dead].kill)
        answers: list[int] = []

        async def wait_for_it() -> None:
            answers.append(await to[dead].echo(3))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for_it)
            with pytest.raises(RPCTimeoutError):
                await with_call_options(to[dead], timeout=0.3).echo(4)
            for number in range(20):
                assert [await to[shard].echo(number) for shard in alive] == [number] * 3
            with anyio.fail_after(BOUND):
                while not answers:
                    with suppress(RPCTimeoutError):
                        answers.append(await with_call_options(api, timeout=0.5).echo(5))
            assert answers == [5]
            assert await api.echo(6) == 6
            late = peer(cluster, stream_name, session_id=next(at_home))
            async with late, RPCChannel(late, timeout=CALL_BOUND) as other:
                assert await other.get_api().echo(7) == 7
            await run_sync(cluster.heal)
        assert answers == [5, 3]
        assert await to[dead].echo(8) == 8
