"""How many entries a worker may take, and who waits for room."""

from __future__ import annotations

import anyio
import pytest

from anyio_kkrpc.redis._group._room import Room, SharedRoom
from tests.bounds import BOUND


@pytest.mark.parametrize(
    ("limit", "held", "queue", "room"),
    [(0, 5, 10, 10), (4, 1, 10, 3), (4, 1, 2, 2), (4, 4, 10, 0), (4, 6, 10, -2), (0, 0, 0, 0)],
)
def test_room(limit: int, held: int, queue: int, room: int) -> None:
    """The least of what the queue takes and what may be held."""
    one = Room(range(held), lambda: queue)
    one.set_limit(limit)
    assert one.now() == room


@pytest.mark.anyio
async def test_several_wait() -> None:
    """All that wait look again when there may be room; without any they wait on."""
    held = [1, 2]
    room = Room(held, lambda: 10)
    room.set_limit(2)
    found: list[int] = []

    async def wait() -> None:
        found.append(await room.wait())

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            room.set_limit(0)  # nothing is wanted: nobody is woken
            room.limit = 2
            room.notify()
            await anyio.wait_all_tasks_blocked()
            assert found == []
            room.lend(1)
            await anyio.wait_all_tasks_blocked()
            assert found == [1, 1]
    assert room.wanted is None


def test_shared() -> None:
    """Each stream has its share of what is left of the whole, and one at least."""
    first: list[int] = []
    room = SharedRoom(lambda: 100, 4)
    assert room.holding(first) is room
    second = [1, 2, 3]
    room.holding(second)
    room.set_limit(10)
    assert room.now() == 2  # of 7
    first.extend(range(6))
    assert room.now() == 1
    first.append(7)
    assert room.now() == 0
    second.append(4)
    assert room.now() == -1
    room.set_limit(0)
    assert room.now() == 25
