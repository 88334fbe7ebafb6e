"""Which workers of a group wait at the stream, and which rest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any

import anyio
import pytest
import redis
import trio
from trio.testing import MockClock

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._group import _turns
from anyio_kkrpc.redis._group._turns import MOST, Turns
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND
from tests.redis.parts import make_outages

pytestmark = pytest.mark.anyio

GROUP = "kkrpc-group"


class Group:
    """The workers of a group, of which each has an inbox."""

    def __init__(self, witness: redis.Redis, stream: str) -> None:
        self.witness, self.keys = witness, Keys.of(stream)
        self.key = self.keys.turns(GROUP.encode())
        witness.xgroup_create(stream, GROUP, mkstream=True)

    async def execute(self, *command: Any) -> Any:
        return self.witness.execute_command(*command)

    def worker(self, name: str, *, inbox: bool = True) -> Turns:
        if inbox:
            self.witness.xadd(self.keys.inbox(name), {"hint": "hello"})
        rest = (name, 5.0, make_outages(), lambda: 0.0)
        return Turns(self.execute, self.keys, GROUP.encode(), *rest)

    async def goes(self, worker: Turns) -> bool:
        """Whether it goes to the stream now."""
        with anyio.move_on_after(0) as scope:
            await worker.wait(self.execute)
        return not scope.cancelled_caught

    def told(self, *names: str) -> list[str]:
        """Return those that were told to come."""
        inboxes = {name: self.witness.xrange(self.keys.inbox(name)) for name in names}
        return [
            name for name, words in inboxes.items() if {b"hint": b"turn"} in dict(words).values()
        ]

    def counts(self) -> tuple[int, int]:
        return counts(self.witness, self.key)


def counts(witness: redis.Redis, key: bytes) -> tuple[int, int]:
    """Return how many count as waiting, and as resting."""
    scores = [score for _, score in witness.zrange(key, 0, -1, withscores=True)]
    return sum(score > 0 for score in scores), sum(score < 0 for score in scores)


@pytest.fixture
def group(witness: redis.Redis, stream_name: str) -> Group:
    return Group(witness, stream_name)


@pytest.mark.server
async def test_some_wait(group: Group) -> None:
    """However many there are, and as often as they ask."""
    workers = [group.worker(f"{number}") for number in range(MOST + 4)]
    for _ in range(2):
        assert [await group.goes(one) for one in workers] == [True] * MOST + [False] * 4
        assert group.counts() == (MOST, 4)
    assert workers[-1].resting == 4
    assert group.witness.pttl(group.key) > 0


@pytest.mark.server
async def test_who_leaves(group: Group) -> None:
    """Another one comes in its place, if it is still there."""
    workers = [group.worker(f"{number}") for number in range(MOST)]
    gone, rests = group.worker("gone", inbox=False), group.worker("rests")
    for one in workers:
        assert await group.goes(one)
    assert not await group.goes(rests)
    assert not await group.goes(gone)
    await workers[0].leave()
    assert group.told("rests") == ["rests"]
    assert group.counts() == (MOST, 0)
    await workers[1].leave()
    assert group.counts() == (MOST - 1, 0)
    assert await group.goes(gone)


@pytest.mark.server
async def test_who_has_no_room(group: Group) -> None:
    """It is told once for each time that it counts on it, and only where one rests."""
    workers = [group.worker(f"{number}") for number in range(MOST)]
    for one in workers:
        assert await group.goes(one)
    await workers[0].hand_over(group.execute)
    assert group.counts() == (MOST, 0)  # nobody would come
    rests = [group.worker(name) for name in ("a", "b")]
    assert [await group.goes(one) for one in rests] == [False, False]
    assert await group.goes(workers[0])
    for _ in range(2):
        await workers[0].hand_over(group.execute)
    assert len(group.told("a", "b")) == 1
    assert group.counts() == (MOST, 1)
    assert workers[0].resting == 1


@pytest.mark.server
async def test_requests_that_wait(group: Group) -> None:
    """Those at the stream don't take them, so others come, whatever has become of those."""
    for name in range(MOST):
        assert await group.goes(group.worker(f"stopped {name}"))
    workers = {name: group.worker(name) for name in "abcd"}
    for one in workers.values():
        assert not await group.goes(one)
    entry = {"from": "client", "json": "{}"}
    group.witness.xadd(group.keys.stream, entry)
    assert await group.goes(workers["a"])
    assert len(group.told(*"bcd")) == 2
    assert group.counts() == (MOST + 3, 1)
    group.witness.xreadgroup(GROUP, "a", {group.keys.stream: ">"})
    assert not await group.goes(workers["a"])
    assert group.counts() == (MOST + 2, 2)
    group.witness.delete(group.keys.stream)
    assert not await group.goes(workers["a"])


@pytest.mark.server
async def test_who_was_killed(group: Group) -> None:
    """It counts for a while only."""
    for number in range(MOST):
        assert await group.goes(group.worker(f"{number}"))
    worker = group.worker("next")
    assert not await group.goes(worker)
    for name in range(150):  # more than are forgotten at a time
        group.witness.zadd(group.key, {f"{name}": name + 1.0})
    assert await group.goes(worker)
    assert group.counts()[0] > 1
    assert await group.goes(worker)
    assert group.counts() == (1, 0)


class Api:
    def __init__(self) -> None:
        self.began, self.go_on = anyio.Event(), anyio.Event()

    async def wait(self) -> None:
        self.began.set()
        await self.go_on.wait()

    async def add(self, a: int, b: int) -> int:
        return a + b


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.server
async def test_calls_are_served(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of three waits at the stream. While it is full, when it leaves, and when it stands still,
    others serve what is asked."""
    monkeypatch.setattr(_turns, "MOST", 1)
    monkeypatch.setattr(_turns, "_FIRST", (0.0, 0.0))
    monkeypatch.setattr(_turns, "_AGAIN", 0.2)
    common: Any = {"stream": stream_name, "connect_timeout": BOUND}
    options: Any = {"use_consumer_group": True, "block_timeout": 0.2, **common}
    key = Keys.of(stream_name).turns(GROUP.encode())
    api = Api()

    def rest(number: int) -> bool:
        return counts(witness, key) == (1, number)

    async with (
        RedisStreamsTransport(redis_server.url, **common) as client,
        RPCChannel(client, timeout=BOUND) as channel,
        AsyncExitStack() as workers,
    ):
        remote = channel.get_api()
        for _ in range(3):
            transport = RedisStreamsTransport(redis_server.url, **options)
            await workers.enter_async_context(transport)
            worker = RPCChannel(transport, expose=api, max_concurrency=1)
            await workers.enter_async_context(worker)
        await until(lambda: rest(2))
        assert await remote.add(1, 2) == 3
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(remote.wait)
            await api.began.wait()
            assert await remote.add(3, 4) == 7
            api.go_on.set()
        await until(lambda: rest(2))
        (waits,) = witness.zrangebyscore(key, 0, "+inf")
        witness.zadd(key, {"stopped": float(2**52)})  # waits at the stream, and takes nothing
        witness.zrem(key, waits)
        await until(lambda: rest(3))
        assert await remote.add(5, 6) == 11
        witness.zrem(key, "stopped")
        await until(lambda: rest(2))


@pytest.mark.parametrize("resting", [1, 20, 1000])
def test_how_often_who_rests_asks(resting: int) -> None:
    """The sooner, the fewer do, and at once when it is told to come."""

    async def check() -> None:
        asked: list[float] = []
        answers = iter([[0, resting]] * 11)

        async def execute(*command: Any) -> Any:
            asked.append(anyio.current_time())
            if len(asked) == 11:
                worker.come()
            return next(answers)

        keys = Keys.of("s")
        parts = (execute, keys, b"g", "me", 5.0, make_outages(), anyio.current_time)
        worker = Turns(*parts)
        await worker.wait(execute)
        pauses = [later - earlier for earlier, later in pairwise(asked)]
        longest = min(max(0.1 * resting, 0.25), 5.0)
        assert all(longest * 0.74 < pause < longest * 1.01 for pause in pauses)
        assert anyio.current_time() == asked[-1]
        assert 7.4 < worker.ask_at - anyio.current_time() < 10.1

    trio.run(check, clock=MockClock(autojump_threshold=0))


async def test_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Where the key can't be written, everybody waits, which is said once."""

    async def refuse(*command: Any) -> Any:
        raise ResponseError("NOPERM no")

    outages = make_outages()
    worker = Turns(refuse, Keys.of("s"), b"g", "me", 5.0, outages, anyio.current_time)
    for _ in range(2):
        await worker.wait(refuse)
        await worker.hand_over(refuse)
        await worker.leave()
    assert caplog.text.count("a turn at the stream") == 1
    assert outages.refused == 2


@pytest.mark.server
async def test_who_leaves_while_it_asks(group: Group) -> None:
    """Redis may have taken its turn; it is given back, though its answer never came."""
    leaves, rests = group.worker("leaves"), group.worker("rests")
    for number in range(MOST - 1):
        assert await group.goes(group.worker(f"{number}"))

    with anyio.CancelScope() as scope:

        async def ask(*command: Any) -> Any:
            await group.execute(*command)
            scope.cancel()
            await anyio.sleep(BOUND)

        await leaves.wait(ask)
    assert group.counts() == (MOST, 0)
    assert not await group.goes(rests)
    await leaves.leave()
    assert group.told("rests") == ["rests"]
    assert group.counts() == (MOST, 0)
