"""The keys of a stream are in its Cluster slot, whatever its name: Redis itself is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.redis._stream._keys import Keys, hash_slot, stream_of
from anyio_kkrpc.testing import RedisServer

UNTAGGABLE = ("a}b", "a{}b", "{}x", "}{", "{}}x", "}", "{}")
names = st.text(st.sampled_from("{}ab:é") | st.characters(codec="utf-8"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def cluster(server_executable: str) -> Iterator[redis.Redis]:
    """A node in cluster mode that owns all slots."""
    with RedisServer(server_executable, args=("--cluster-enabled", "yes")) as server:
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            end = time.monotonic() + 60
            while "cluster_state:ok" not in str(client.execute_command("CLUSTER", "INFO")):
                assert time.monotonic() < end
                time.sleep(0.05)
            yield client


@pytest.mark.parametrize(
    ("stream", "base"),
    [
        ("s", b"{s}"),
        ("a:{tag}:b", b"a:{tag}:b"),
        ("{tag}", b"{tag}"),
        ("a{b", b"{a{b}"),
        ("a}b", b"{20658}a}b"),
        ("{}x", b"{19354}{}x"),
    ],
)
def test_names(stream: str, base: bytes) -> None:
    """A name is its own hash tag, or has one; else a number is, the same in each process."""
    keys = Keys.of(stream)
    assert keys.stream == stream.encode()
    assert keys.control == base + b":control"
    assert keys.dead == base + b":dead"
    assert keys.inbox("me") == base + b":inbox:me"
    assert Keys.of(stream_of(base.decode())).control == keys.control


def test_every_slot_has_a_tag_that_is_found_soon() -> None:
    """Counting up from 0 ends: that is what bounds the search for a number."""
    assert len({hash_slot(b"%d" % number) for number in range(109_758)}) == 16384


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams=st.lists(names, min_size=1, max_size=20), peer=names)
def test_one_slot(cluster: redis.Redis, streams: list[str], peer: str) -> None:
    """CLUSTER KEYSLOT gives all keys of a stream the stream's slot, and we know it, too."""
    with cluster.pipeline(transaction=False) as pipe:
        for stream in (*streams, *UNTAGGABLE):
            keys = Keys.of(stream)
            for key in (keys.stream, keys.control, keys.dead, keys.inbox(peer)):
                pipe.execute_command("CLUSTER KEYSLOT", key)
        found = iter(pipe.execute())
    for stream in (*streams, *UNTAGGABLE):
        slots = {next(found) for _ in range(4)}
        assert slots == {hash_slot(stream.encode())}, stream


@given(stream=names)
def test_names_that_worked_keep_their_keys(stream: str) -> None:
    """A name with a tag is the base of its keys, one without `}` becomes a tag."""
    start = stream.find("{")
    if start >= 0 and stream.find("}", start) > start + 1:
        assert Keys.of(stream).control == f"{stream}:control".encode()
    elif "}" not in stream:
        assert Keys.of(stream).control == f"{{{stream}}}:control".encode()


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b


@pytest.mark.anyio
async def test_on_a_node_of_a_cluster(cluster: redis.Redis) -> None:
    """A group serves and trims, which takes commands with several keys."""
    port = cluster.connection_pool.connection_kwargs["port"]
    for stream in UNTAGGABLE:
        url, options = f"redis://127.0.0.1:{port}", {"stream": stream, "use_consumer_group": True}
        async with (
            RedisStreamsTransport(url, max_len=1, **options) as served,
            RPCChannel(served, expose=Api()),
            RedisStreamsTransport(url, **options) as used,
            RPCChannel(used, timeout=60) as channel,
        ):
            assert [await channel.get_api().add(n, 1) for n in range(3)] == [1, 2, 3]
    cluster.flushall()
