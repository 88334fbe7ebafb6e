"""Who posts waits while much waits to be written, and goes on when there is room, or time is over."""

from __future__ import annotations

import anyio
import pytest

from anyio_kkrpc._protocol._records import Cancel
from anyio_kkrpc.redis._writing import _waiting
from anyio_kkrpc.redis._writing._ledger import Ledger, Post
from anyio_kkrpc.redis._writing._waiting import Waiting

pytestmark = pytest.mark.anyio


def ledger_with(size: int) -> Ledger:
    """Return one that has no connection, and so many bytes that wait."""
    ledger = Ledger()
    ledger.hold(Post(b"x" * size))
    return ledger


async def test_room() -> None:
    """Without a connection, up to a bound; with one, not while something waits for its turn."""
    waiting = Waiting(ledger := ledger_with(_waiting.HIGH_WATER))
    assert not waiting.is_full
    assert await waiting.wait(None)
    ledger.hold(Post(b"x"))
    assert waiting.is_full
    assert not await waiting.wait(anyio.current_time())
    ledger.open()
    assert waiting.is_full
    while (post := ledger.next()) is not None:
        ledger.write(post)
    ledger.flow()
    assert not waiting.is_full


@pytest.mark.parametrize("ends", [False, True])
async def test_woken(ends: bool) -> None:
    """All of them, once there is room; not before, but for those whom nothing is written for."""
    waiting = Waiting(ledger := ledger_with(_waiting.HIGH_WATER + 1))
    done: list[bool] = []

    async def wait() -> None:
        done.append(await waiting.wait(None))

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        waiting.notify()
        await anyio.wait_all_tasks_blocked()
        assert done == []
        ledger.clear()
        if ends:
            waiting.end()
        else:
            waiting.notify()
    assert done == [True, True]


@pytest.mark.parametrize(
    ("name", "bound"), [("MOST", 2), ("HIGH_WATER", 1)], ids=["records", "bytes"]
)
def test_who_cannot_wait(
    name: str, bound: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What finds no room is thrown away, counted and logged; there is room once nothing waits."""
    monkeypatch.setattr(_waiting, name, bound)
    ledger = Ledger()
    waiting = Waiting(ledger)
    for _ in range(2):
        assert waiting.admits(Cancel("1"))
        ledger.hold(Post(b"x"))
    for _ in range(20):
        assert not waiting.admits(Cancel("1"))
    assert waiting.thrown_away == 20
    assert caplog.messages[0] == "a Cancel was thrown away: 2 records wait to be sent"
    assert len(caplog.messages) == 10
    ledger.open()
    while (post := ledger.next()) is not None:
        ledger.write(post)
    ledger.flow()
    assert waiting.admits(Cancel("1"))
