"""Claims, acknowledgements, hand-backs and dead letters against a plain model, on a real server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio
import pytest
import redis
from anyio.from_thread import start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from anyio_kkrpc.redis._address import Address
from anyio_kkrpc.redis._connection import open_connection
from anyio_kkrpc.redis._group import Groups
from anyio_kkrpc.redis._link import Link
from anyio_kkrpc.testing import RedisServer

pytestmark = [pytest.mark.server, pytest.mark.slow]

T = TypeVar("T")
STREAM, DEAD, GROUP = b"model", b"{model}:dead", b"g"
LIMIT = 2
WORKERS = st.sampled_from([b"one", b"two", b"three"])


class Script:
    """A `Link` with a connection for one command at a time."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def request(self, *args: Any) -> Any:
        connection = await open_connection(Address.parse(self._url))
        try:
            return await connection.execute(*args)
        finally:
            await anyio.aclose_forcefully(connection)


class Model(RuleBasedStateMachine):
    """Who holds what, and how often it was delivered.

    Time passes for one entry at a time: its idle time in Redis is set.
    """

    url: str
    portal: Any
    seen: Counter[str]
    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.redis = redis.Redis.from_url(self.url)
        self.redis.delete(STREAM, DEAD)
        self.redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        self.new: list[bytes] = []
        self.held: dict[bytes, tuple[bytes, int]] = {}
        self.stale: set[bytes] = set()
        self.back: dict[bytes, int] = {}
        self.dead: list[bytes] = []
        self.done: set[bytes] = set()

    def groups(self, worker: bytes) -> Groups:
        link: Any = Script(self.url)
        assert isinstance(link, (Script, Link))
        return Groups(link, STREAM, DEAD, GROUP, worker, claim_idle=60.0, max_deliveries=LIMIT)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        async def wait() -> T:
            return await call

        return self.portal.call(wait)  # type: ignore[no-any-return]

    @rule(target=entries, count=st.integers(1, 3))
    def add(self, count: int) -> Any:
        ids = [self.redis.xadd(STREAM, {"n": "1"}) for _ in range(count)]
        self.new += ids
        return multiple(*ids)

    @initialize(target=entries, names=st.permutations([b"one", b"two", b"three"]))
    def start_with_a_past(self, names: list[bytes]) -> Any:
        """One entry is dead, one was handed back and taken again, one is with a dead worker."""
        first, second, third = names
        ids = self.add(4)
        self.take(first, 3)
        self.die_and_be_replaced(first, second, 2)
        self.leave(second, started=False)
        self.claim(third, 1)
        self.die_and_be_replaced(third, first, 1)
        return ids

    @rule(worker=WORKERS, count=st.integers(1, 3))
    def take(self, worker: bytes, count: int) -> None:
        found = self.redis.xreadgroup(GROUP, worker, {STREAM: ">"}, count=count)
        got = [entry_id for _, entries in found for entry_id, _ in entries]
        assert got == self.new[:count]
        del self.new[:count]
        for entry_id in got:
            self.held[entry_id] = (worker, 1)

    @rule(entry=consumes(entries))
    def finish(self, entry: bytes) -> None:
        if entry in self.held:
            assert self.redis.xack(STREAM, GROUP, entry) == 1
            del self.held[entry]
            self.stale.discard(entry)
            self.done.add(entry)

    @rule(worker=WORKERS)
    def fall_silent(self, worker: bytes) -> None:
        """A worker was not heard of for two minutes."""
        mine = [entry for entry, (owner, _) in self.held.items() if owner == worker]
        if mine:
            self.redis.xclaim(STREAM, GROUP, worker, 0, mine, idle=120_000, justid=True)
            self.stale.update(mine)

    @rule(first=WORKERS, second=WORKERS, count=st.integers(1, 3))
    def die_and_be_replaced(self, first: bytes, second: bytes, count: int) -> None:
        """A worker falls silent, and another one claims some of what it had."""
        self.fall_silent(first)
        self.claim(second, count)

    @rule(worker=WORKERS)
    def touch(self, worker: bytes) -> None:
        """It keeps what it thinks it holds, and learns what it has lost."""
        ids = sorted(self.held)
        lost = self.run(self.groups(worker).touch(ids)) if ids else []
        mine = {entry for entry, (owner, _) in self.held.items() if owner == worker}
        assert set(lost) == set(ids) - mine
        self.stale -= mine

    @rule(worker=WORKERS, count=st.integers(1, 3))
    def claim(self, worker: bytes, count: int) -> None:
        claims = self.run(self.groups(worker).claim(count, 1.0))
        due = sorted(
            [e for e in self.stale if self.held[e][0] != worker] + list(self.back),
            key=_position,
        )
        taken: list[tuple[bytes, int]] = []
        dead: list[bytes] = []
        left: list[bytes] = []
        for entry in due:
            deliveries = self.back[entry] if entry in self.back else self.held[entry][1]
            if len(taken) >= count:
                left.append(entry)
            elif deliveries >= LIMIT:
                dead.append(entry)
            else:
                taken.append((entry, deliveries + 1))
        assert [(item.id, item.attempt) for item in claims.taken] == taken
        assert [item.id for item in claims.dead] == dead
        assert (claims.oldest is not None) == bool(left)
        self.seen["taken"] += len(taken)
        self.seen["taken from handed back"] += sum(entry in self.back for entry, _ in taken)
        self.seen["dead"] += len(dead)
        self.seen["left"] += len(left)
        for entry, deliveries in taken:
            self.back.pop(entry, None)
            self.stale.discard(entry)
            self.held[entry] = (worker, deliveries)
        for entry in dead:
            self.back.pop(entry, None)
            self.stale.discard(entry)
            self.held.pop(entry, None)
            self.dead.append(entry)

    @rule(worker=WORKERS, started=st.booleans())
    def leave(self, worker: bytes, started: bool) -> None:
        """A worker hands back what it holds, and its consumer goes."""
        mine = {e: n for e, (owner, n) in self.held.items() if owner == worker}
        back = {entry: n if started else n - 1 for entry, n in mine.items()}
        assert self.run(self.groups(worker).hand_back(list(back.items()))) == len(mine)
        self.run(self.groups(worker).remove_consumer())
        for entry in mine:
            del self.held[entry]
            self.stale.discard(entry)
        self.back.update(back)
        names = [consumer["name"] for consumer in self.redis.xinfo_consumers(STREAM, GROUP)]
        assert worker not in names

    @rule(worker=WORKERS, known=st.booleans(), counted=st.booleans())
    def recover(self, worker: bytes, known: bool, counted: bool) -> None:
        """A worker comes back under its name, with its memory or without."""
        mine = sorted((e for e, (o, _) in self.held.items() if o == worker), key=_position)
        claims = self.run(self.groups(worker).recover(1.0, mine if known else [], counted=counted))
        if known:
            assert claims.taken == claims.dead == []
            return
        expected = []
        for entry in mine:
            deliveries = self.held[entry][1]
            if counted and deliveries >= LIMIT:
                self.dead.append(entry)
                del self.held[entry]
            else:
                self.held[entry] = (worker, deliveries + counted)
                expected.append((entry, deliveries + counted))
            self.stale.discard(entry)
        assert [(item.id, item.attempt) for item in claims.taken] == expected

    def teardown(self) -> None:
        pending = {
            item["message_id"]: item["times_delivered"]
            for item in self.redis.xpending_range(STREAM, GROUP, "-", "+", 1000)
        }
        held = {entry: deliveries for entry, (_, deliveries) in self.held.items()}
        assert pending == {**held, **self.back}
        letters = self.redis.xrange(DEAD)
        assert [fields[b"id"] for _, fields in letters] == self.dead
        assert not {*self.dead} & {*pending}
        self.redis.close()


def _position(entry: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in entry.split(b"-"))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_against_the_model(backend: str, redis_server: RedisServer) -> None:
    """Whatever workers do in whatever order, Redis holds what the model says, and loses nothing."""
    seen: Counter[str] = Counter()
    with start_blocking_portal(backend) as portal:
        machine = type(
            "GroupMachine",
            (Model,),
            {"url": redis_server.url + "?db=9", "portal": portal, "seen": seen},
        )
        wanted = ("taken", "taken from handed back", "dead", "left")
        for _ in range(3):
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                machine,
                settings=settings(
                    max_examples=40,
                    stateful_step_count=40,
                    derandomize=False,  # the next round does other things
                ),
            )
            if min(seen[name] for name in wanted) > 5:
                break
        assert min(seen[name] for name in wanted) > 5
