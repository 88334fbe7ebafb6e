"""Who is taken for gone, when, and what it costs to know: in no time, by a clock of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
from trio.testing import MockClock

from anyio_kkrpc import DeliveryError
from anyio_kkrpc._protocol._dependencies import Role
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._patience import Outages
from anyio_kkrpc.redis._reading._presence import Presence
from anyio_kkrpc.redis._stream._clock import ServerClock
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis._stream._scripts import ADD_BRIEFLY
from tests.redis.conftest import NOWHERE

KEYS = Keys.of("s")
CLAIM_IDLE, INBOX_TTL = 30.0, 60.0


class Store:
    """A server as `Link` shows it: it keeps keys for some time.

    :ivar keys: when each is gone, and its last id
    :ivar commands: what it was asked for
    :ivar refused: keys that may not be touched
    """

    def __init__(self) -> None:
        self.keys: dict[bytes, tuple[float, bytes]] = {}
        self.commands: list[tuple[bytes, ...]] = []
        self.refused: set[bytes] = set()
        self.away = False
        self.looked = 0  # how often somebody asked for the connection
        self.error: Exception | None = None
        self.ended = False
        self._taken: list[tuple[tuple[bytes, ...], Callable[[Any], object]]] = []
        self._ttls: dict[bytes, bytes] = {}

    # What the link does

    @property
    def connection(self) -> Any:
        self.looked += 1
        return None if self.away else self

    def post(self, packed: bytes, replies: int, take: Callable[[Any], object]) -> None:
        commands = list(unpacked(packed))
        assert len(commands) == replies
        self._taken += [(command, take) for command in commands]

    async def flush(self) -> None:
        taken, self._taken = self._taken, []
        await anyio.sleep(0.001)
        for command, take in taken:
            take(self.execute(command))

    async def attempt(self, *command: bytes) -> Any:
        await self.flush()  # what was posted leaves with it
        await anyio.sleep(0.001)
        reply = self.execute(command)
        if isinstance(reply, Exception):
            raise reply
        return reply

    request = attempt

    async def ask(self, what: str, portion: Any, command: Callable[[int], Any]) -> Any:
        return await self.attempt(*command(portion.size))

    # What the server does

    def execute(self, command: tuple[bytes, ...]) -> Any:
        self.commands.append(command)
        name = command[0]
        key = command[3] if name == b"EVAL" else command[2] if name == b"XINFO" else command[1]
        if key in self.refused:
            return ResponseError("NOPERM No permissions to access a key")
        if name == b"EVAL":
            assert command[1:3] == (ADD_BRIEFLY, b"1")
            self._ttls[key] = command[-1]
            return self.live(key, int(command[4]) / 1000)
        if name == b"EXISTS":
            return sum(map(self.has, command[1:]))
        if name == b"DEL":
            return int(self.keys.pop(key, None) is not None)
        if name == b"XINFO":
            return [b"last-generated-id", self.keys[key][1]]
        assert name == b"XREVRANGE"
        return [[self.keys[key][1], [b"alive", self._ttls[key]]]] if self.has(key) else []

    def has(self, key: bytes) -> bool:
        return self.keys.get(key, (-math.inf, b""))[0] > anyio.current_time()

    def live(self, key: bytes, ttl: float) -> bytes:
        """Let a key live from now on."""
        now = anyio.current_time()
        made = b"%d-1" % (now * 1000)
        self.keys[key] = (now + ttl, made)
        return made

    def meet(self, peer: str, *, ttl: float | None = CLAIM_IDLE) -> None:
        """Let a peer be there, without a sign of life if it is an older one."""
        self.live(KEYS.inbox(peer), INBOX_TTL)
        if ttl is not None:
            self._ttls[KEYS.alive(peer)] = b"%d" % (ttl * 1000)
            self.live(KEYS.alive(peer), ttl)

    def count(self, name: bytes) -> int:
        return sum(command[0] == name for command in self.commands)


def unpacked(packed: bytes) -> Any:
    """Take packed commands to pieces."""
    while packed:
        head, _, packed = packed.partition(b"\r\n")
        command = []
        for _ in range(int(head[1:])):
            size, _, packed = packed.partition(b"\r\n")
            command.append(packed[: int(size[1:])])
            packed = packed[int(size[1:]) + 2 :]
        yield tuple(command)


class Looking:
    """A peer that looks after others.

    :ivar gone: who was told to be gone, as what, and when
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.gone: list[tuple[str, Role, float]] = []
        self.errors: list[Exception] = []
        self.positions = {KEYS.inbox("me"): b"0-0"}
        link: Any = store
        times = CLAIM_IDLE, INBOX_TTL
        self.presence = Presence(
            KEYS, "me", times, link, ServerClock(anyio.current_time), Outages(NOWHERE), self._lose
        )

    def _lose(self, peer: str, role: Role, error: Exception) -> None:
        assert isinstance(error, DeliveryError)
        assert repr(peer) in str(error)
        self.gone.append((peer, role, anyio.current_time()))
        self.errors.append(error)

    async def keep_inbox(self) -> None:
        while True:
            made = self.store.live(KEYS.inbox("me"), INBOX_TTL)
            self.positions[KEYS.inbox("me")] = made
            await anyio.sleep(5)


def looking(function: Callable[[Store, Looking], Awaitable[None]]) -> None:
    """Run a function beside a peer that looks."""

    async def check() -> None:
        store = Store()
        one = Looking(store)
        async with anyio.create_task_group() as group:
            group.start_soon(one.keep_inbox)
            group.start_soon(one.presence.run, one.positions)
            await anyio.sleep(1)
            await function(store, one)
            group.cancel_scope.cancel()

    trio.run(check, clock=MockClock(autojump_threshold=0))


async def keep(store: Store, peer: str, seconds: float, **options: Any) -> None:
    """Let a peer live for some time, and return when it was there for the last time."""
    until = anyio.current_time() + seconds
    while anyio.current_time() < until:
        store.meet(peer, **options)
        await anyio.sleep(5)


def test_source_that_is_killed() -> None:
    """Its reader learns within a second after its sign of life is gone."""

    async def check(store: Store, one: Looking) -> None:
        store.meet("other", ttl=3.0)
        one.presence.watch("other", "source", True)
        await anyio.sleep(2)
        store.meet("other", ttl=3.0)
        killed = anyio.current_time()
        await anyio.sleep(20)
        ((peer, role, when),) = one.gone
        assert (peer, role) == ("other", "source")
        assert 3 < when - killed < 4
        assert "not been heard of for 3 s" in str(one.errors[0])

    looking(check)


def test_reader_that_is_killed() -> None:
    """It has no sign of life; what it reads is lost once its inbox is gone, and not before."""

    async def check(store: Store, one: Looking) -> None:
        one.presence.watch("other", "reader", True)
        await keep(store, "other", 300, ttl=None)
        last = anyio.current_time() - 5
        assert not one.gone
        await anyio.sleep(100)
        ((peer, role, when),) = one.gone
        assert (peer, role) == ("other", "reader")
        assert INBOX_TTL < when - last < INBOX_TTL + 2

    looking(check)


def test_older_source() -> None:
    """It never had a sign of life: its inbox tells."""

    async def check(store: Store, one: Looking) -> None:
        one.presence.watch("other", "source", True)
        await keep(store, "other", 300, ttl=None)
        assert not one.gone
        await anyio.sleep(2 * INBOX_TTL)
        assert [role for _, role, _ in one.gone] == ["source"]
        assert "its inbox is" in str(one.errors[0])

    looking(check)


@pytest.mark.parametrize("key", ["alive", "inbox"])
def test_missing_once(key: str) -> None:
    """What is missing at one look and there at the next isn't gone."""

    async def check(store: Store, one: Looking) -> None:
        name = getattr(KEYS, key)("other")
        one.presence.watch("other", "source", True)
        one.presence.watch("other", "reader", True)
        store.meet("other")
        await anyio.sleep(2)
        for _ in range(10):
            kept, looks = store.keys.pop(name), len(store.commands)
            # Until the one that misses it; the next is much sooner than usual.
            while not any(name in command for command in store.commands[looks:]):
                await anyio.sleep(0.01)
            await anyio.sleep(0.05)
            store.keys[name] = kept
            await anyio.sleep(1.5)
        assert not one.gone

    looking(check)


def test_server_that_has_lost_everything() -> None:
    """Nobody is gone who comes back within the time that is left to it; others are, later."""

    async def check(store: Store, one: Looking) -> None:
        for peer in ("back", "away"):
            one.presence.watch(peer, "source", True)
            one.presence.watch(peer, "reader", True)
            store.meet(peer)
        await anyio.sleep(2)
        store.keys.clear()
        lost = anyio.current_time()
        await anyio.sleep(CLAIM_IDLE - 3)
        assert not one.gone
        assert store.has(KEYS.alive("me"))  # that was written anew
        await keep(store, "back", 2 * INBOX_TTL)
        assert [(peer, role) for peer, role, _ in one.gone] == [
            ("away", "source"),
            ("away", "reader"),
        ]
        assert one.gone[0][2] - lost > CLAIM_IDLE

    looking(check)


def test_server_that_was_away() -> None:
    """All were disconnected, and come back one by one."""

    async def check(store: Store, one: Looking) -> None:
        one.presence.watch("other", "source", True)
        one.presence.watch("other", "reader", True)
        store.meet("other", ttl=1.0)
        await anyio.sleep(0.5)
        store.away, store.looked = True, 0
        await anyio.sleep(300)
        assert store.looked < 5 * 300
        store.away = False
        store.live(KEYS.inbox("me"), INBOX_TTL)
        one.presence.lose()
        await anyio.sleep(1.5)
        await keep(store, "other", 100, ttl=10.0)
        assert not one.gone

    looking(check)


def test_end_that_was_not_read() -> None:
    """Who has sent the end of a stream may be gone; that is read first."""

    async def check(store: Store, one: Looking) -> None:
        one.presence.watch("other", "source", True)
        store.meet("other", ttl=3.0)
        await anyio.sleep(2)
        one.positions[KEYS.inbox("me")] = b"0-0"
        await anyio.sleep(1.9)  # its sign of life is gone, and the inbox is about to be read
        assert not one.gone
        one.presence.watch("other", "source", False)
        await anyio.sleep(100)
        assert not one.gone

    looking(check)


def test_what_it_costs() -> None:
    """Nothing while no stream is open; else some commands each second, however many readers."""

    async def check(store: Store, one: Looking) -> None:
        presence = one.presence
        await anyio.sleep(3600)
        assert store.commands == []
        for number in range(1000):
            store.live(KEYS.inbox(f"reader-{number}"), math.inf)
            presence.watch(f"reader-{number}", "reader", True)
        before = anyio.current_time()
        await anyio.sleep(120)
        looks = anyio.current_time() - before
        assert not one.gone
        assert store.count(b"EXISTS") <= 5 * looks
        assert store.count(b"EVAL") <= 1 + 120 / (CLAIM_IDLE / 3)
        assert store.count(b"EXISTS") + store.count(b"EVAL") == len(store.commands)
        for number in range(1000):
            presence.watch(f"reader-{number}", "reader", False)
        store.commands.clear()
        # One stream after the other, each of a moment.
        for _ in range(100):
            presence.watch("reader-0", "reader", True)
            presence.watch("reader-0", "reader", False)
            await anyio.sleep(0.01)
        assert len(store.commands) <= 1
        await anyio.sleep(3600)
        assert len(store.commands) <= 1
        assert not store.has(KEYS.alive("me"))

    looking(check)


def test_what_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A user without rights for the keys does without them, and is told once."""

    async def check(store: Store, one: Looking) -> None:
        store.refused |= {KEYS.alive("me"), KEYS.alive("other")}
        store.meet("other", ttl=None)
        one.presence.watch("other", "source", True)
        one.presence.watch("other", "reader", True)
        await keep(store, "other", 300, ttl=None)
        assert not one.gone
        warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == len(set(warnings)) == 2
        assert all("No permissions" in text for text in warnings)

    looking(check)


def test_leaving() -> None:
    """The sign of life is removed, and nothing writes it again."""

    async def check(store: Store, one: Looking) -> None:
        one.presence.watch(None, "reader", True)
        await store.flush()  # as the request that the stream is an argument of does
        assert store.has(KEYS.alive("me"))
        await one.presence.sign.remove()
        assert not store.has(KEYS.alive("me"))
        one.presence.lose()
        one.presence.watch("late", "reader", True)
        await anyio.sleep(100)
        assert not store.has(KEYS.alive("me"))

    looking(check)
