"""What waits for room in a queue: in order, each once, whoever waits with it and is cancelled."""

from __future__ import annotations

import anyio
import pytest
from anyio import CancelScope, ClosedResourceError, create_task_group, wait_all_tasks_blocked

from anyio_kkrpc import BoundedQueue
from anyio_kkrpc.redis._reading._intake import Intake

pytestmark = pytest.mark.anyio


class Fixture:
    """An intake at a queue of two, and what was received from that."""

    def __init__(self) -> None:
        self.queue: BoundedQueue[int] = BoundedQueue(2, overflow="block")
        self.intake: Intake[int] = Intake(self.queue)
        self.received: list[int] = []

    def add(self, *items: int) -> None:
        for item in items:
            self.intake.add(item, 1)

    async def receive(self, count: int) -> None:
        for _ in range(count):
            self.received.append(await self.queue.get())
            await wait_all_tasks_blocked()


async def test_several_wait() -> None:
    """Tasks that wait for the same items let each of them in once, in order."""
    at = Fixture()
    at.add(*range(7))
    done: list[str] = []

    async def reader(name: str) -> None:
        await at.intake.wait()
        done.append(name)

    async with create_task_group() as group:
        for name in "abc":
            group.start_soon(reader, name)
        await wait_all_tasks_blocked()
        assert len(at.queue) == 2
        at.add(7, 8)
        await at.receive(4)
        assert not done
        await at.receive(5)
    assert at.received == list(range(9))
    assert sorted(done) == ["a", "b", "c"]


@pytest.mark.parametrize("room", [False, True])
async def test_one_of_them_is_cancelled(room: bool) -> None:
    """Also in the moment in which there is room: the others go on."""
    at = Fixture()
    at.add(*range(6))
    scopes = [CancelScope() for _ in range(3)]

    async def reader(scope: CancelScope) -> None:
        with scope:
            await at.intake.wait()

    async with create_task_group() as group:
        for scope in scopes:
            group.start_soon(reader, scope)
            await wait_all_tasks_blocked()
        if room:
            at.received.append(at.queue.get_nowait())
        scopes[0].cancel()
        await wait_all_tasks_blocked()
        await at.receive(6 - room)
    assert at.received == list(range(6))
    assert [scope.cancelled_caught for scope in scopes] == [True, False, False]


async def test_forgotten_while_somebody_waits() -> None:
    """What was forgotten doesn't come any more; what came after that does."""
    at = Fixture()
    at.add(*range(5))
    async with create_task_group() as group:
        group.start_soon(at.intake.wait)
        await wait_all_tasks_blocked()
        assert at.queue.get_nowait() == 0
        assert at.intake.clear() == 3
        at.add(9)
        await wait_all_tasks_blocked()
        await at.receive(2)
    assert at.received == [1, 9]


async def test_closed_queue() -> None:
    """Who waits learns of the end, and nothing is left in it."""
    at = Fixture()
    at.add(*range(5))
    async with create_task_group() as group:

        async def reader() -> None:
            with pytest.raises(ClosedResourceError):
                await at.intake.wait()

        group.start_soon(reader)
        group.start_soon(reader)
        await wait_all_tasks_blocked()
        at.queue.close()
    with anyio.fail_after(100):
        await at.receive(2)
    assert at.received == [0, 1]
