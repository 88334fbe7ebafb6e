"""Where the server is: asked once by all peers of a process together, whoever is cancelled."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from anyio_kkrpc import TransportConnectionError
from anyio_kkrpc.redis._connection import _resolver
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._errors import ResponseError
from anyio_kkrpc.redis._connection._resolver import (
    Fixed,
    Probe,
    Told,
    Topology,
    shared_topology,
)
from anyio_kkrpc.redis._connection._role import Role, WrongRoleError, read_role, wrong_role
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

HERE, THERE = Address.parse("redis://u:p@here"), Address.parse("redis://u:p@there")
REFUSED = TransportConnectionError("refused")


class Asked:
    """A finder that answers when it is let, with what it is told to."""

    moves, follows = True, False

    def __init__(self, *answers: Address | Exception) -> None:
        self.answers = [*answers]
        self.asked_at: list[float] = []
        self.asking = anyio.Event()
        self.may_answer = anyio.Event()
        self.watchers = self.most_watchers = 0

    async def find(self) -> Address:
        self.asked_at.append(anyio.current_time())
        self.asking.set()
        await self.may_answer.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def hint(self, address: Address, exc: Exception) -> Address | None:
        return THERE if "MOVED" in str(exc) else None

    async def watch(self, interval: float, probe: Probe, told: Told) -> None:
        self.watchers += 1
        self.most_watchers = max(self.watchers, self.most_watchers)
        try:
            await anyio.sleep_forever()
        finally:
            self.watchers -= 1


async def together(count: int, ask: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Return what so many tasks get that ask at the same time; errors are among it."""
    results: list[Any] = []

    async def one() -> None:
        try:
            results.append(await ask())
        except TransportConnectionError as exc:
            results.append(exc)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(one)
    return results


def lost(cause: Exception | None) -> TransportConnectionError:
    error = TransportConnectionError("lost")
    error.__cause__ = cause
    return error


class TestOneQuestion:
    async def test_answer(self) -> None:
        """However many ask, it is one question; then it is known."""
        finder = Asked(HERE)
        finder.may_answer.set()
        topology = Topology(finder)
        assert await together(20, topology.resolve) == [HERE] * 20
        assert await topology.resolve() is topology.address
        assert len(finder.asked_at) == 1

    async def test_error(self) -> None:
        """All that wait for the same question get its error, each one of their own."""
        finder = Asked(REFUSED)
        finder.may_answer.set()
        errors = await together(5, Topology(finder).resolve)
        assert len(finder.asked_at) == 1
        assert [str(error) for error in errors] == ["refused"] * 5
        assert len({id(error) for error in errors}) == 5

    async def test_cancelled_while_asking(self) -> None:
        """If who asks is cancelled, the next one asks, and the others wait for that."""
        finder = Asked(HERE)
        topology = Topology(finder)
        results: list[Any] = []

        async def others() -> None:
            results.extend(await together(5, topology.resolve))

        scope = anyio.CancelScope()

        async def first() -> None:
            with scope:
                await topology.resolve()

        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await finder.asking.wait()
            group.start_soon(others)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            finder.may_answer.set()
        assert results == [HERE] * 5
        assert len(finder.asked_at) == 2

    async def test_cancelled_while_pausing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same where it hasn't asked yet, since somebody has just done so."""
        finder = Asked(HERE)
        finder.may_answer.set()
        topology = Topology(finder)
        await topology.resolve()
        topology.note(HERE, REFUSED)
        with monkeypatch.context() as patch:
            patch.setattr(_resolver, "_APART", 1000.0)
            with anyio.move_on_after(0):
                await topology.resolve()
        assert len(finder.asked_at) == 1
        with anyio.fail_after(BOUND):
            assert await together(5, topology.resolve) == [HERE] * 5
        assert len(finder.asked_at) == 2

    async def test_cancelled_while_waiting(self) -> None:
        """One that waits for another's question leaves it alone."""
        finder = Asked(HERE)
        topology = Topology(finder)
        results: list[Address] = []

        async def ask() -> None:
            results.append(await topology.resolve())

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await finder.asking.wait()
            with anyio.move_on_after(0):
                await topology.resolve()
            finder.may_answer.set()
        assert results == [HERE]
        assert len(finder.asked_at) == 1

    async def test_pause(self) -> None:
        """Two questions are at least a tenth of a second apart."""
        finder = Asked(HERE)
        finder.may_answer.set()
        topology = Topology(finder)
        for _ in range(3):
            await topology.resolve()
            topology.note(HERE, REFUSED)
        first, second, third = finder.asked_at
        assert second - first >= 0.099
        assert third - second >= 0.099


class TestKnowledge:
    @staticmethod
    async def known(*answers: Address) -> tuple[Topology, Asked]:
        finder = Asked(*answers)
        finder.may_answer.set()
        topology = Topology(finder)
        await topology.resolve()
        return topology, finder

    @pytest.mark.parametrize("exc", [REFUSED, lost(OSError("reset")), lost(None)])
    async def test_lost_connection(self, exc: Exception) -> None:
        """It is asked for again; whether other connections are of use, isn't known."""
        topology, finder = await self.known(HERE)
        topology.note(HERE, exc)
        assert topology.generation == 0
        assert await topology.resolve() == HERE
        assert (len(finder.asked_at), topology.generation) == (2, 0)

    @pytest.mark.parametrize(
        "exc",
        [
            ResponseError("READONLY You can't write against a read only replica."),
            lost(ResponseError("READONLY You can't write against a read only replica.")),
            lost(WrongRoleError("it is a replica")),
        ],
    )
    async def test_a_server_that_is_the_wrong_one(self, exc: Exception) -> None:
        """All connections to it are of no use."""
        topology, _ = await self.known(HERE, THERE)
        topology.note(HERE, exc)
        assert (topology.generation, topology.address) == (1, None)
        assert await topology.resolve() == THERE
        assert topology.generation == 1

    async def test_told_where(self) -> None:
        """What an error tells isn't asked for."""
        topology, finder = await self.known(HERE)
        topology.note(HERE, ResponseError("MOVED 1 there:6379"))
        assert (topology.generation, topology.address) == (1, THERE)
        assert await topology.resolve() == THERE
        assert len(finder.asked_at) == 1

    async def test_old_news(self) -> None:
        """What is wrong with where it was doesn't matter any more."""
        topology, finder = await self.known(HERE)
        topology.found(THERE)
        assert topology.generation == 1
        topology.note(HERE, ResponseError("READONLY no"))
        topology.found(THERE)
        assert (topology.generation, await topology.resolve()) == (1, THERE)
        assert len(finder.asked_at) == 1

    async def test_changes_are_told(self) -> None:
        """Whoever waits for a change gets it, also if it has been already."""
        topology, _ = await self.known(HERE)
        async with anyio.create_task_group() as group:
            group.start_soon(topology.wait_changed, 0)
            await anyio.wait_all_tasks_blocked()
            topology.lose()
        assert await topology.wait_changed(0) == 1

    async def test_one_watches(self) -> None:
        """Of all that want to, one watches; the next one when that is cancelled."""
        topology, finder = await self.known(HERE)
        scopes: list[anyio.CancelScope] = []

        async def watch() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await topology.watch(0.1, unasked)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(watch)
            for number in (0, 2, 1):
                await anyio.wait_all_tasks_blocked()
                assert finder.watchers == 1
                scopes[number].cancel()
        assert (finder.watchers, finder.most_watchers) == (0, 1)


async def unasked() -> Role | None:
    raise AssertionError


class TestFixed:
    async def test_what_others_say_of_it(self) -> None:
        """A replica in the URL is what was asked for: no other connection suffers."""
        topology = Topology(Fixed(HERE))
        await topology.resolve()
        for exc in (ResponseError("READONLY no"), ResponseError("MOVED 1 there:6379"), REFUSED):
            topology.note(HERE, exc)
            assert await topology.resolve() == HERE
        assert topology.generation == 0

    @pytest.mark.parametrize(
        ("roles", "changes"), [("mmr", 1), ("mrr", 2), ("mrmm", 2), ("rr", 0), ("rmr", 1)]
    )
    async def test_becomes_a_replica(
        self, roles: str, changes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then its name may lead to another server, now or later, so all connect again, and once more
        when it is a master; not to one that was a replica from the beginning.
        """
        monkeypatch.setattr(_resolver, "_ALONE", 0.01)
        monkeypatch.setattr(_resolver, "_DEMOTED", 0.01)
        replies = [
            Role("master", 1) if role == "m" else Role("slave", 0, ("there", 6379))
            for role in roles
        ]
        topology = Topology(Fixed(HERE))

        async def probe() -> Role | None:
            await topology.resolve()
            return replies.pop(0) if replies else None

        with anyio.fail_after(BOUND):
            await topology.watch(0.01, probe)
        assert topology.generation == changes
        assert await topology.resolve() == HERE

    async def test_a_server_that_does_not_tell(self) -> None:
        """It isn't asked again."""
        answers: list[Role | None] = [None]

        async def probe() -> Role | None:
            return answers.pop()

        topology = Topology(Fixed(HERE))
        with anyio.fail_after(BOUND):
            for _ in range(2):
                await topology.watch(0.01, probe)
        assert answers == []


async def test_shared() -> None:
    """Those that look for the same have the same, as long as anybody does."""
    made: list[str] = []

    def get(key: str) -> Topology:
        def make() -> Fixed:
            made.append(key)
            return Fixed(HERE)

        return shared_topology(key, make)

    one = get("a")
    assert get("a") is one
    other = get("b")
    assert other is not one
    del one
    gc.collect()
    get("a")
    assert made == ["a", "b", "a"]


def test_not_shared_between_event_loops() -> None:
    """What is known belongs to one event loop."""
    found: list[Topology] = []

    async def get() -> None:
        found.append(shared_topology("c", lambda: Fixed(HERE)))

    anyio.run(get)
    anyio.run(get)
    assert found[0] is not found[1]


@pytest.mark.parametrize(
    ("reply", "role"),
    [
        (
            [b"master", 10, [[b"127.0.0.1", b"1", b"10"], [b"", b"2", b"10"]]],
            Role("master", 2, None, (("127.0.0.1", 1),)),
        ),
        ([b"slave", b"h", 1, b"connected", 0], Role("slave", 0, ("h", 1))),
        ([b"sentinel", [b"mymaster"]], Role("sentinel")),
        ([b"something"], None),
        ([], None),
        (b"OK", None),
    ],
)
def test_role(reply: Any, role: Role | None) -> None:
    """What ROLE says is read; what makes no sense says nothing."""
    assert read_role(reply) == role


def test_wrong_roles() -> None:
    """A sentinel is never right, a replica only where nothing else may be."""
    assert wrong_role(None, moves=True) is None
    assert wrong_role(Role("master"), moves=True) is None
    assert "sentinel" in str(wrong_role(Role("sentinel"), moves=False))
    replica = Role("slave", 0, ("h", 1))
    assert wrong_role(replica, moves=False) is None
    assert "replica of h, port 1" in str(wrong_role(replica, moves=True))
