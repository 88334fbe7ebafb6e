"""`max_len`: who keeps the stream short, what is never trimmed, and how much at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, with_call_options
from anyio_kkrpc.redis._group import _trim
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.server]

BIG = 2**53
LAST = 2**64 - 1


class Api:
    def __init__(self) -> None:
        self.ran: list[int] = []

    def note(self, number: int) -> int:
        self.ran.append(number)
        return number


def peer(server: RedisServer, stream: str, **options: Any) -> RedisStreamsTransport:
    return RedisStreamsTransport(server.url, stream=stream, **options)


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.anyio
@pytest.mark.parametrize("group", [False, True], ids=["broadcast", "group"])
async def test_workers_keep_it_short(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, group: bool
) -> None:
    """It is enough that those who serve know `max_len`."""
    async with (
        peer(redis_server, stream_name, use_consumer_group=group, max_len=10) as served,
        RPCChannel(served, expose=Api()),
        peer(redis_server, stream_name, use_consumer_group=group) as used,
        RPCChannel(used, timeout=CALL_BOUND) as channel,
    ):
        for number in range(30):
            await channel.get_api().note(number)
        await until(lambda: witness.xlen(stream_name) <= 11)
        assert witness.xlen(stream_name) >= 10


@pytest.mark.anyio
async def test_clients_that_live_for_a_moment(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Clients that add fewer requests than make a trim worth while keep it short together."""
    for _ in range(8):
        async with (
            peer(redis_server, stream_name, max_len=5) as used,
            RPCChannel(used) as channel,
        ):
            await with_call_options(channel.get_api(), reply=False).note(1)
    assert witness.xlen(stream_name) == 5


@pytest.mark.anyio
async def test_what_was_counted_is_enough_after_a_while(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that goes on for long and adds little trims, too."""
    monkeypatch.setattr(_trim, "_TRIM_AFTER", 0.05)
    for _ in range(1000):
        witness.xadd(stream_name, {"n": "1"})
    async with peer(redis_server, stream_name, max_len=500) as used, RPCChannel(used) as channel:
        await with_call_options(channel.get_api(), reply=False).note(1)
        await until(lambda: witness.xlen(stream_name) == 500)


ids = st.tuples(
    st.sampled_from([1, BIG, BIG + 1, LAST - 1, LAST]),
    st.sampled_from([0, 9, 10, BIG, BIG + 1, BIG + 2, LAST - 1, LAST]),
)


@contextmanager
def groups_of(
    client: redis.Redis,
    stream: str,
    read: list[int],
    acknowledged: list[set[int]],
    added: list[str],
) -> Iterator[None]:
    for number, (count, done) in enumerate(zip(read, acknowledged, strict=True)):
        name = f"g{number}"
        client.xgroup_create(stream, name, "0")
        if count:
            client.xreadgroup(name, "c", {stream: ">"}, count=count)
        for index in done:
            if index < min(count, len(added)):
                client.xack(stream, name, added[index])
    yield
    client.delete(stream)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    entries=st.sets(ids, min_size=1, max_size=30).map(sorted),
    max_len=st.integers(1, 10),
    reads=st.lists(st.integers(0, 31), max_size=3),
    data=st.data(),
)
def test_never_what_a_group_has_not_done(
    witness: redis.Redis,
    stream_name: str,
    entries: list[tuple[int, int]],
    max_len: int,
    reads: list[int],
    data: st.DataObject,
) -> None:
    """As much goes as may, whatever the ids are: their numbers have 64 bits."""
    witness.delete(stream_name)
    added = [f"{ms}-{seq}" for ms, seq in entries]
    with witness.pipeline() as pipe:
        for entry_id in added:
            pipe.xadd(stream_name, {"n": "1"}, id=entry_id)
        pipe.execute()
    done = [data.draw(st.sets(st.integers(0, max(read - 1, 0)))) for read in reads]
    free = len(added)
    for read, acknowledged in zip(reads, done, strict=True):
        finished = 0
        while finished < min(read, len(added)) and finished in acknowledged:
            finished += 1
        free = min(free, finished)
    expected = min(free, max(len(added) - max_len, 0))
    with groups_of(witness, stream_name, reads, done, added):
        answer = witness.eval(
            _trim._TRIM, 1, stream_name, max_len, "broadcast", _trim._PAGE, _trim._PAGE_BYTES
        )
        assert answer == [expected, 0]
        left = [entry_id.decode() for entry_id, _ in witness.xrange(stream_name)]
        assert left == added[expected:]


def test_one_step_is_bounded(witness: redis.Redis, stream_name: str) -> None:
    """A step looks at no more than so many entries or bytes, and says that there is more."""
    for _ in range(45):
        witness.xadd(stream_name, {"n": "x" * 1000})
    witness.xgroup_create(stream_name, "g", "$")

    def step(count: int, size: int, mode: str = "group") -> Any:
        return witness.eval(_trim._TRIM, 1, stream_name, 5, mode, count, size)

    assert step(12, 10**9) == [12, 1]
    assert step(100, 5000) == [10, 1]
    assert step(100, 10**9) == [18, 0]
    assert step(100, 10**9) == [0, 0]
    witness.xgroup_destroy(stream_name, "g")
    for _ in range(20):
        witness.xadd(stream_name, {"n": "x"})
    assert step(15, 10**9) == [0, 0]  # all of it is for the first worker
    assert step(15, 10**9, "broadcast") == [15, 1]
    assert step(15, 10**9, "broadcast") == [5, 0]
    assert witness.xlen(stream_name) == 5
    witness.delete(stream_name)


@pytest.mark.anyio
async def test_cancels_tell_large_ids_apart(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A request that waits is deleted by a cancel though the one before it was taken."""
    witness.xadd(stream_name, {"n": "1"}, id=f"{BIG}-{BIG}")
    witness.xgroup_create(stream_name, "kkrpc-group", "0")
    witness.xreadgroup("kkrpc-group", "other", {stream_name: ">"})
    async with (
        peer(redis_server, stream_name, use_consumer_group=True, max_backlog=2) as used,
        RPCChannel(used) as channel,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(channel.get_api().note, 1)
            await until(lambda: witness.xlen(stream_name) == 2)
            ((entry_id, _),) = witness.xrange(stream_name, f"({BIG}-{BIG}")
            assert entry_id == b"%d-%d" % (BIG, BIG + 1)
            # What Redis answers has to be here before the call is given up.
            await used.get_stream_info()
            group.cancel_scope.cancel()
        await until(lambda: witness.xlen(stream_name) == 1)
