"""Tasks that are started when there is first something for them to do."""

from __future__ import annotations

from contextvars import ContextVar

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from anyio_kkrpc._runtime._bell import Bell, start_each
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


def test_start() -> None:
    """Once, when it is first set, or at once if it is."""
    bell, started = Bell(), list[str]()
    bell.start(lambda: started.append("later"))
    assert not started
    for _ in range(2):
        bell.set()
        assert bell.is_set()
        bell.clear()
        assert not bell.is_set()
    assert started == ["later"]
    bell.set()
    bell.start(lambda: started.append("at once"))
    assert started == ["later", "at once"]


async def test_wait() -> None:
    """All who wait go on; one who comes while it is set doesn't wait; who was cancelled loses nothing."""
    bell, woken = Bell(), list[str]()

    async def wait(name: str) -> None:
        await bell.wait()
        woken.append(name)

    with anyio.fail_after(BOUND):
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(0):
                await bell.wait()
            for name in ("a", "b"):
                group.start_soon(wait, name)
            await wait_all_tasks_blocked()
            assert woken == []
            bell.set()
        assert sorted(woken) == ["a", "b"]
        await wait("c")
        bell.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(wait, "d")
            await wait_all_tasks_blocked()
            assert woken[2:] == ["c"]
            bell.set()
            bell.clear()
    assert woken[2:] == ["c", "d"]


async def test_waiting_can_be_cancelled() -> None:
    """Also where it needn't wait, as everywhere in AnyIO."""
    bell = Bell()
    bell.set()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await bell.wait()
    assert scope.cancelled_caught


async def test_in_the_context_of_the_beginning() -> None:
    """What belongs to who sets it, such as a span, doesn't reach the task."""
    of: ContextVar[str] = ContextVar("of", default="all")
    bell, found = Bell(), list[str]()

    async def note() -> None:
        found.append(of.get())

    async with anyio.create_task_group() as group:
        start_each(
            [("at once", note, None), ("later", note, bell)],
            lambda name, run: group.start_soon(run, name=name),
        )
        of.set("one call")
        bell.set()
    assert found == ["all", "all"]
