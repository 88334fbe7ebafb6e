"""Claims, acknowledgements, hand-backs and dead letters against a plain model, on a real server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from math import inf
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
from msgspec import Struct

from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._login import open_connection
from anyio_kkrpc.redis._connection._portion import Portion
from anyio_kkrpc.redis._connection._resp import Connection
from anyio_kkrpc.redis._group import _claims as _group
from anyio_kkrpc.redis._group._claims import Claims, Groups
from anyio_kkrpc.redis._stream._keys import DELAYED, HANDED_BACK, Keys
from anyio_kkrpc.testing import RedisServer

pytestmark = [pytest.mark.server, pytest.mark.slow]

T = TypeVar("T")
KEYS = Keys.of("model")
STREAM, DEAD, GROUP = KEYS.stream, KEYS.dead, b"g"
LEASE = KEYS.claimer(GROUP)
LIMIT = 4
IDLE = 60
# Seconds without a sign of life after which an entry is delivered again, by its deliveries.
PAUSES = {1: 60, 2: 120, 3: 240, LIMIT: 60}
# Seconds that pass, far from these: the test itself takes time.
TIMES = st.sampled_from([30, 90, 180, 270])
WORKERS = st.sampled_from([b"one", b"two", b"three"])


class Held(Struct):
    owner: bytes
    deliveries: int
    idle: int = 0

    def is_due(self) -> bool:
        return self.idle > PAUSES[self.deliveries]


class Script:
    """A `Link` that never breaks, for one command at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def request(self, *args: Any) -> Any:
        return await self._connection.execute(*args)

    attempt = request

    async def ask(self, what: str, portion: Portion, command: Callable[[int], Any]) -> Any:
        return await self.request(*command(portion.size))


class Model(RuleBasedStateMachine):
    """Who holds what, how often it was delivered, and who looks for what was lost.

    Time passes for one worker's entries at a time: their idle time in Redis is set. The lease has
    no time of its own, it is taken away.
    """

    url: str
    link: Any
    portal: Any
    seen: Counter[str]
    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.redis = redis.Redis.from_url(self.url)
        self.redis.delete(STREAM, DEAD, LEASE, "aside")
        self.redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        self.new: list[bytes] = []
        self.held: dict[bytes, Held] = {}
        self.back: dict[bytes, int] = {}
        self.dead: list[bytes] = []
        self.leader: bytes | None = None
        self.spoilt = False

    def groups(self, worker: bytes) -> Groups:
        return Groups(self.link, KEYS, GROUP, worker, claim_idle=IDLE, max_deliveries=LIMIT)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        async def wait() -> T:
            return await call

        return self.portal.call(wait)  # type: ignore[no-any-return]

    def of(self, owner: bytes) -> list[bytes]:
        return sorted((e for e, held in self.held.items() if held.owner == owner), key=_position)

    @rule(target=entries, count=st.integers(1, 3))
    def add(self, count: int) -> Any:
        ids = [self.redis.xadd(STREAM, {"n": "1"}) for _ in range(count)]
        self.new += ids
        return multiple(*ids)

    @initialize(
        target=entries, names=st.permutations([b"one", b"two", b"three"]), spoilt=st.booleans()
    )
    def start_with_a_past(self, names: list[bytes], spoilt: bool) -> Any:
        """Some were lost up to four times, and handed back in between."""
        first, second, third = names
        ids = self.add(5)
        self.read(first, 5)
        self.die_and_be_replaced(first, second, 90, 4)
        self.die_and_be_replaced(second, third, 270, 3)
        self.recover(third, known=False, counted=True)
        self.look(first)
        self.fall_silent(DELAYED, 270)
        self.look(first)
        self.take(first, 3)
        if spoilt:
            self.spoil_or_mend_dead_letters()
        self.leave(first, started=True)
        self.take(second, 2)
        self.fall_silent(DELAYED, 90)
        return ids

    @rule(worker=WORKERS, count=st.integers(1, 3))
    def read(self, worker: bytes, count: int) -> None:
        found = self.redis.xreadgroup(GROUP, worker, {STREAM: ">"}, count=count)
        got = [entry_id for _, entries in found for entry_id, _ in entries]
        assert got == self.new[:count]
        del self.new[:count]
        for entry_id in got:
            self.held[entry_id] = Held(worker, 1)

    @rule(entry=consumes(entries))
    def finish(self, entry: bytes) -> None:
        if self.held.pop(entry, None) is not None:
            assert self.redis.xack(STREAM, GROUP, entry) == 1

    @rule(worker=st.one_of(WORKERS, st.just(DELAYED)), seconds=TIMES)
    def fall_silent(self, worker: bytes, seconds: int) -> None:
        """A worker was not heard of for so long."""
        mine = self.of(worker)
        if mine:
            self.redis.xclaim(STREAM, GROUP, worker, 0, mine, idle=seconds * 1000, justid=True)
        for entry in mine:
            self.held[entry].idle = seconds

    @rule(first=WORKERS, second=WORKERS, seconds=TIMES, count=st.integers(1, 3))
    def die_and_be_replaced(self, first: bytes, second: bytes, seconds: int, count: int) -> None:
        """A worker falls silent, and another one finds and takes some of what it had."""
        self.fall_silent(first, seconds)
        self.look(second)
        self.take(second, count)

    @rule(worker=WORKERS)
    def touch(self, worker: bytes) -> None:
        """It keeps what it thinks it holds, and learns what it has lost."""
        ids = sorted(self.held)
        lost = self.run(self.groups(worker).touch(ids)) if ids else []
        mine = self.of(worker)
        assert set(lost) == set(ids) - set(mine)
        for entry in mine:
            self.held[entry].idle = 0

    @rule(worker=WORKERS)
    def lead(self, worker: bytes) -> None:
        """One worker looks at a time, and goes on to until its lease ends."""
        leads = self.run(self.groups(worker).lead())
        assert leads is (self.leader in (None, worker))
        self.seen["leads" if leads else "follows"] += 1
        if leads:
            self.leader = worker
            assert 0 < self.redis.pttl(LEASE) < IDLE * 1000
            self.redis.persist(LEASE)  # a slow machine is no reason

    @rule(worker=WORKERS, killed=st.booleans())
    def lead_no_more(self, worker: bytes, killed: bool) -> None:
        """The lease ends if its owner is killed, or at once if it leaves."""
        if not killed:
            self.run(self.groups(worker).resign())
        elif self.leader == worker:
            self.redis.delete(LEASE)
        if self.leader == worker:
            self.leader = None
        assert self.redis.exists(LEASE) == (self.leader is not None)

    @rule(worker=WORKERS, idle_only=st.booleans())
    def look(self, worker: bytes, idle_only: bool = False) -> None:
        """What was lost for long enough is there for anybody, also what the one who looks had."""
        due = {entry: held for entry, held in self.held.items() if held.is_due()}
        self.back.update({entry: held.deliveries for entry, held in due.items()})
        for entry in due:
            del self.held[entry]
        held = [held for held in self.held.values() if not idle_only or held.idle >= IDLE / 2]
        start, found, pages, soonest = b"-", 0, 0, inf
        end = max([*self.held, *self.back], key=_position, default=b"0-0") if idle_only else None
        while start:
            look = self.run(self.groups(worker).look(start, end))
            start = look.last and b"(" + look.last
            found += look.due
            pages += 1
            soonest = min(soonest, inf if look.soonest is None else look.soonest)
        assert found == len(due)
        assert pages == (len(held) + len(self.back)) // _group.PAGE + 1
        left = [PAUSES[one.deliveries] - one.idle for one in held]
        assert soonest == pytest.approx(min(left, default=inf), abs=29)
        self.seen["found"] += found
        self.seen["waits longer"] += sum(held.idle > IDLE for held in self.held.values())

    @rule(worker=WORKERS, count=st.integers(1, 3))
    def take(self, worker: bytes, count: int) -> None:
        """A worker takes what it has room for, of what is there for anybody."""
        claims = self.run(self.groups(worker).take(count, 1.0))
        first = sorted(self.back, key=_position)[:count]
        taken = [entry for entry in first if self.back[entry] < LIMIT]
        assert [(item.id, item.attempt) for item in claims.taken] == [
            (entry, self.back[entry] + 1) for entry in taken
        ]
        assert claims.more is (len(first) == count)
        self.check_given_up(claims, [entry for entry in first if self.back[entry] >= LIMIT])
        self.seen["taken"] += len(taken)
        for entry in taken:
            self.held[entry] = Held(worker, self.back[entry] + 1)
        for entry in first:
            del self.back[entry]

    def check_given_up(self, claims: Claims, expected: list[bytes]) -> None:
        """What was delivered too often is a dead letter, or will be when Redis takes it."""
        dead, kept = ([], expected) if self.spoilt else (expected, [])
        assert [(item.id, item.attempt) for item in claims.dead] == [(e, LIMIT) for e in dead]
        assert [(item.id, item.attempt) for item in claims.kept] == [(e, LIMIT) for e in kept]
        assert all(b"WRONGTYPE" in item.refusal for item in claims.kept)
        self.dead += dead
        for entry in kept:
            self.held[entry] = Held(DELAYED, LIMIT)
        self.seen["dead"] += len(dead)
        self.seen["kept"] += len(kept)

    @rule()
    def spoil_or_mend_dead_letters(self) -> None:
        """Somebody keeps something else under the key of the dead letters."""
        keys = (DEAD, "aside") if not self.spoilt else ("aside", DEAD)
        self.spoilt = not self.spoilt
        self.redis.delete(keys[1])
        if self.redis.exists(keys[0]):
            self.redis.rename(*keys)
        if self.spoilt:
            self.redis.set(DEAD, "text")

    @rule(worker=WORKERS, started=st.booleans())
    def leave(self, worker: bytes, started: bool) -> None:
        """A worker hands back what it holds, and its consumer goes."""
        mine = self.of(worker)
        back = {e: self.held[e].deliveries - (not started) for e in mine}
        assert self.run(self.groups(worker).hand_back(list(back.items()))) == len(mine)
        self.run(self.groups(worker).leave())
        for entry in mine:
            del self.held[entry]
        self.back.update(back)
        names = [consumer["name"] for consumer in self.redis.xinfo_consumers(STREAM, GROUP)]
        assert worker not in names

    @rule(worker=WORKERS, known=st.booleans(), counted=st.booleans())
    def recover(self, worker: bytes, known: bool, counted: bool) -> None:
        """A worker comes back under its name, with its memory or without.

        What was delivered twice may be what killed it, and waits as if another worker had had it.
        """
        mine = self.of(worker)
        claims = self.recover_all(worker, mine if known else [], counted)
        if known:
            assert claims.taken == claims.dead == claims.kept == []
            return
        expected, given_up = [], []
        for entry in mine:
            held = self.held.pop(entry)
            if counted and held.deliveries >= LIMIT:
                given_up.append(entry)
            elif counted and held.deliveries > 1 and not held.is_due():
                self.held[entry] = Held(DELAYED, held.deliveries, held.idle)
                self.seen["delayed"] += 1
            else:
                self.held[entry] = Held(worker, held.deliveries + counted)
                expected.append((entry, held.deliveries + counted))
        assert [(item.id, item.attempt) for item in claims.taken] == expected
        self.check_given_up(claims, given_up)

    def recover_all(self, worker: bytes, known: list[bytes], counted: bool) -> Claims:
        found = Claims([], [], [])
        start: bytes | None = b"-"
        while start is not None:
            page = self.run(
                self.groups(worker).recover(1.0, known, counted=counted, start=start, count=2)
            )
            found.taken += page.taken
            found.dead += page.dead
            found.kept += page.kept
            start = page.after
        return found

    def teardown(self) -> None:
        pending = {
            item["message_id"]: (item["consumer"], item["times_delivered"])
            for item in self.redis.xpending_range(STREAM, GROUP, "-", "+", 1000)
        }
        held = {entry: (held.owner, held.deliveries) for entry, held in self.held.items()}
        back = {entry: (HANDED_BACK, deliveries) for entry, deliveries in self.back.items()}
        assert pending == {**held, **back}
        if self.spoilt:
            self.spoil_or_mend_dead_letters()
        letters = self.redis.xrange(DEAD)
        assert [fields[b"id"] for _, fields in letters] == self.dead
        assert not {*self.dead} & {*pending}
        owners = {owner for owner, _ in pending.values()}
        names = {consumer["name"] for consumer in self.redis.xinfo_consumers(STREAM, GROUP)}
        assert owners <= names
        self.redis.close()


def _position(entry: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in entry.split(b"-"))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_against_the_model(
    backend: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever workers do in whatever order, Redis holds what the model says, and loses nothing."""
    monkeypatch.setattr(_group, "PAGE", 2)
    seen: Counter[str] = Counter()
    url = redis_server.url + "?db=9"
    with start_blocking_portal(backend) as portal:
        connection = portal.call(open_connection, Address.parse(url))
        link = Script(connection)
        machine = type(
            "GroupMachine", (Model,), {"url": url, "link": link, "portal": portal, "seen": seen}
        )
        wanted = (
            "leads", "follows", "found", "waits longer", "taken", "dead", "kept", "delayed"
        )  # fmt: skip
        for _ in range(10):
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                machine,
                settings=settings(
                    max_examples=10,
                    stateful_step_count=40,
                    derandomize=False,  # the next round does other things
                ),
            )
            if min(seen[name] for name in wanted) > 5:
                break
        portal.call(anyio.aclose_forcefully, connection)
        assert min(seen[name] for name in wanted) > 5, seen
