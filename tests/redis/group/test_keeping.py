"""What a worker holds is kept: nothing is begun that may be another worker's by now."""

from __future__ import annotations

import json
import time
from typing import Any, cast

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, current_call
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._group._claims import Groups
from anyio_kkrpc.redis._group._held import HeldEntry
from anyio_kkrpc.redis._group._keeping import Keeper
from anyio_kkrpc.redis._writing._writer import Writer
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

GROUP = "kkrpc-group"
IDLE = 30.0


class Group:
    """What Redis says about the entries of the group, and a clock."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.others: set[bytes] = set()
        self.touched: list[list[bytes]] = []
        self.handed_back: list[tuple[bytes, int]] = []
        self.takes = 0.0
        self.errors: list[Exception] = []
        self.gate: anyio.Event | None = None
        self.told = 0

    async def touch(self, ids: list[bytes]) -> list[bytes]:
        self.touched.append(ids)
        if self.gate is not None:
            await self.gate.wait()
        await anyio.lowlevel.checkpoint()
        self.time += self.takes
        if self.errors:
            raise self.errors.pop(0)
        return [entry_id for entry_id in ids if entry_id in self.others]

    async def hand_back(self, entries: list[tuple[bytes, int]]) -> int:
        await anyio.lowlevel.checkpoint()
        self.handed_back += entries
        return len(entries)

    async def tell(self) -> None:
        self.told += 1

    # In place of a writer

    unanswered: dict[bytes, int] = {}

    def unfinished(self) -> list[bytes]:
        return []


class Fixture:
    """What is held, of whatever the group says."""

    def __init__(self) -> None:
        group = self.group = Group()
        outages = Outages(Target.parse("redis://nowhere"))
        self.keeper = Keeper(
            cast(Groups, group),
            cast(Writer, group),
            outages,
            IDLE,
            lambda: 10,
            group.tell,
            lambda: group.time,
        )
        self.held = self.keeper.held
        # By their ids, as they were taken last.
        self.taken: dict[bytes, HeldEntry] = {}

    def take(self, *ids: bytes) -> None:
        for entry_id in ids:
            entry = HeldEntry(entry_id, 1, self.keeper.sure_until())
            self.held.entries[entry_id] = self.taken[entry_id] = entry


@pytest.fixture
async def at() -> Any:
    fixture = Fixture()
    async with anyio.create_task_group() as group:
        group.start_soon(fixture.keeper.run)
        yield fixture
        group.cancel_scope.cancel()


async def confirm(at: Fixture, entry_id: bytes) -> bool:
    with anyio.fail_after(BOUND):
        return await at.keeper.confirm(at.taken[entry_id])


async def test_what_others_have_is_not_begun(at: Fixture) -> None:
    """After a pause all that is held is asked for at once; what is still here is sure again."""
    at.take(b"1", b"2", b"3", b"4")
    at.taken[b"4"].start()
    at.group.others = {b"2", b"4"}
    at.keeper.room.set_limit(4)
    at.group.time += IDLE
    assert at.keeper.room.now() == 0
    room: list[int] = []
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            room.append(await at.keeper.room.wait())

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert await confirm(at, b"1")
    assert not await confirm(at, b"2")
    assert await confirm(at, b"3")
    assert at.group.touched == [[b"1", b"2", b"3", b"4"]]
    assert at.held.lost == 2
    assert room == [1]
    assert list(at.held.entries) == [b"1", b"3", b"4"]  # what runs is held until it is settled
    at.group.time += IDLE
    assert await confirm(at, b"3")
    assert at.group.touched[1:] == [[b"1", b"3"]]


async def test_sent_before_the_pause(at: Fixture) -> None:
    """What counts is when Redis was asked, not when its answer was seen."""
    at.group.takes = IDLE
    at.take(b"1")
    at.group.gate = anyio.Event()
    at.group.time += IDLE
    async with anyio.create_task_group() as group:
        answers: list[bool] = []

        async def ask() -> None:
            answers.append(await confirm(at, b"1"))

        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        at.group.others = {b"1"}  # between the first answer and the moment in which it is seen
        at.group.gate.set()
    assert answers == [False]


async def test_answers_that_are_always_late(at: Fixture) -> None:
    """A request isn't put off for ever: it is delivered at least once."""
    at.group.takes = IDLE
    at.take(b"1")
    at.group.time += IDLE
    assert await confirm(at, b"1")
    assert len(at.group.touched) == 3


async def test_refused_for_now(at: Fixture) -> None:
    """Nothing is begun before Redis has answered."""
    at.take(b"1", b"2")
    at.group.others = {b"2"}
    at.group.time += IDLE
    at.group.errors = [ResponseError("MISCONF can't write to disk") for _ in range(5)]
    assert await confirm(at, b"1")
    assert not await confirm(at, b"2")
    assert len(at.group.touched) == 6


async def test_refused_for_good(at: Fixture) -> None:
    """Where nothing can be confirmed, all is begun as it comes."""
    at.take(b"1")
    at.group.time += IDLE
    at.group.errors = [ResponseError("ERR unknown command 'EVAL'") for _ in range(5)]
    assert await confirm(at, b"1")


async def test_cancelled_while_it_is_confirmed(at: Fixture) -> None:
    """Whoever received it has lost it: it goes back to the group, as not delivered."""
    at.take(b"1")
    at.group.time += IDLE
    at.group.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(confirm, at, b"1")
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    at.group.gate.set()
    with anyio.fail_after(BOUND):
        while not at.group.told:
            await anyio.sleep(0.001)
    assert at.group.handed_back == [(b"1", 0)]
    assert not at.held.entries


async def test_ends_while_it_is_confirmed(at: Fixture) -> None:
    """Then nothing is begun, and everything goes back."""
    at.take(b"1")
    at.group.time += IDLE
    at.group.gate = anyio.Event()
    async with anyio.create_task_group() as group:

        async def ask() -> None:
            assert not await confirm(at, b"1")

        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        at.keeper.end()
    await at.keeper.hand_back()
    assert at.group.handed_back == [(b"1", 0)]


async def test_lost_and_taken_again(at: Fixture) -> None:
    """It is in the queue twice, and begins once."""
    at.take(b"1")
    at.group.time += IDLE
    at.group.others = {b"1"}
    assert not await confirm(at, b"1")
    at.group.others.clear()
    former = at.taken[b"1"]
    at.take(b"1")
    with anyio.fail_after(BOUND):
        assert not await at.keeper.confirm(former)
    assert await confirm(at, b"1")
    at.taken[b"1"].start()
    assert not await confirm(at, b"1")
    # So does one that nobody knew to be lost before it came here again.
    at.take(b"2")
    at.group.time += IDLE
    at.held.regain(b"2", at.group.time + IDLE)
    assert await confirm(at, b"2")
    assert at.held.lost == 1


class Api:
    """Holds the event loop for so long that others take what waits meanwhile."""

    def __init__(self, witness: redis.Redis, stream: str, idle: float) -> None:
        self._witness, self._stream, self._idle = witness, stream, idle
        self.ran: dict[str, int] = {}

    def block(self) -> None:
        time.sleep(self._idle)
        waiting = self._witness.xpending_range(self._stream, GROUP, "-", "+", 10, "me")[1:]
        assert len(waiting) == 3
        taken: list[Any] = [item["message_id"] for item in waiting]
        self._witness.xclaim(self._stream, GROUP, "other", 0, taken, justid=True)

    def note(self, key: str) -> None:
        assert key not in self.ran
        self.ran[key] = current_call().attempt


@pytest.mark.server
async def test_blocked_event_loop(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """What others took while a handler held the loop isn't run, unless they lose it in turn."""
    for path, args in (("block", []), ("note", ["a"]), ("note", ["b"]), ("note", ["c"])):
        record = json.dumps({"t": "q", "id": f"{path}{args}", "op": "call", "p": [path], "a": args})
        witness.xadd(stream_name, {"from": "nobody", "json": record})
    api = Api(witness, stream_name, 0.4)
    async with RedisStreamsTransport(
        redis_server.url,
        stream=stream_name,
        use_consumer_group=True,
        consumer_name="me",
        claim_idle=0.4,
    ) as served:
        async with RPCChannel(served, expose=api):
            with anyio.fail_after(BOUND):
                while len(api.ran) < 3 or served.statistics().outstanding:
                    await anyio.sleep(0.01)
            assert served.statistics().lost >= 3
    assert set(api.ran) == {"a", "b", "c"}
    assert min(api.ran.values()) > 1
