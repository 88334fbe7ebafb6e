"""Commands on a Redis Cluster: streams are on several servers, and each is found where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import count

import anyio
import anyio.to_thread
import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, TransportConnectionError
from anyio_kkrpc._cli._asking import asking
from anyio_kkrpc._cli._check import by_redis
from anyio_kkrpc._cli._dead import purge_older
from anyio_kkrpc._cli._top import Watch
from anyio_kkrpc.redis._stream._keys import Keys, hash_slot
from tests.topologies import ClusterSetup

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.one_server]


@pytest.fixture(scope="module")
def cluster(server_executable: str) -> Iterator[ClusterSetup]:
    with ClusterSetup(server_executable, replicas=1) as setup:
        yield setup


def one_for_each(masters: int = 3) -> list[str]:
    """Return the names of a stream for each master."""
    found: dict[int, str] = {}
    for number in count():
        name = f"jobs-{number}"
        found.setdefault(hash_slot(name.encode()) * masters // 16384, name)
        if len(found) == masters:
            return [found[master] for master in range(masters)]
    raise AssertionError


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b


def look(cluster: ClusterSetup, streams: list[str]) -> None:
    """Ask everything of each stream; workers serve them meanwhile."""
    watch = Watch(cluster.url, None)
    try:
        frame = watch.first(None)
        assert [stream.name for stream in frame.streams] == sorted(streams)
        assert [len(stream.groups[0].workers) for stream in frame.streams] == [1, 1, 1]
        assert [stream.dead for stream in watch.next().streams] == [1, 1, 1]
    finally:
        watch.close()
    for seed in cluster.nodes:
        only = Watch(cluster.url_of(seed), streams[0])
        assert [stream.name for stream in only.first(None).streams] == streams[:1]
        only.close()
        by_redis(cluster.url_of(seed), streams[1], "w", workers=1, timeout=10)
    # What begins elsewhere is found all the same, and what speaks by the transport, too.
    words = ("call", "-s", streams[0], "add", "1", "2")
    done = subprocess.run(
        [sys.executable, "-m", "anyio_kkrpc", *words],
        env={**os.environ, "ANYIO_KKRPC_URL": cluster.url_of(cluster.stranger(streams[0]))},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == 3


async def serve(cluster: ClusterSetup, streams: list[str]) -> None:
    async with AsyncExitStack() as stack:
        for stream in streams:
            options = {"stream": stream, "use_consumer_group": True, "consumer_group": "w"}
            transport = RedisStreamsTransport(cluster.url, **options)
            await stack.enter_async_context(transport)
            await stack.enter_async_context(RPCChannel(transport, expose=Api()))
        await anyio.to_thread.run_sync(look, cluster, streams)


def test_all_commands(cluster: ClusterSetup) -> None:
    streams = one_for_each()
    for stream in streams:
        cluster.owner(stream).run("XADD", Keys.of(stream).dead, "*", "id", "1-1")
    anyio.run(serve, cluster, streams)
    for stream in streams:
        purge_older(cluster.url, stream, 1, 0.0)
        assert cluster.owner(stream).run("XLEN", Keys.of(stream).dead) == 0


def test_nodes_that_are_gone(cluster: ClusterSetup) -> None:
    """Any other one is asked; if there is none, the error says what to check."""
    gone, *others = cluster.nodes
    stream = one_for_each()[0]
    url = cluster.url_of(gone, others[0])
    gone.kill()
    try:
        cluster.wait_owner(stream, gone)
        cluster.wait_known(stream)
        with asking(url, 5.0, stream) as client:
            assert client.xlen(stream) >= 0
        with pytest.raises(TransportConnectionError, match="Check that a Redis server is running"):
            with asking(cluster.url_of(gone), 5.0, stream):
                pass
    finally:
        cluster.heal()


def test_slot_that_moves(cluster: ClusterSetup) -> None:
    """A view shows each stream once, wherever it is."""
    stream = one_for_each()[0]
    cluster.owner(stream).run("XADD", stream, "*", "from", "a", "json", "{}")
    watch = Watch(cluster.url, None)
    assert stream in [found.name for found in watch.first(None).streams]
    cluster.move(stream, cluster.stranger(stream))
    frame = watch.first(None)
    assert [found.name for found in frame.streams].count(stream) <= 1
    watch.close()
    again = Watch(cluster.url, None)
    assert [found.name for found in again.first(None).streams].count(stream) == 1
    again.close()
