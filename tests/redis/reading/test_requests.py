"""Reading of requests: one task at a time, whatever is wanted when."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio import create_task_group, wait_all_tasks_blocked
from anyio.abc import TaskGroup

from anyio_kkrpc.redis._reading._requests import Reading, Requests
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.001)


class Reads:
    """Reads until it is cancelled, or told that nothing more can be read."""

    def __init__(self) -> None:
        self.begun = self.reading = self.beside = self.most = 0
        self.over = anyio.Event()
        self.requests = Requests(self.begin)

    def begin(self, tasks: TaskGroup) -> Callable[[], Awaitable[None]]:
        self.begun += 1
        tasks.start_soon(self.run_beside)
        return self.run

    async def run_beside(self) -> None:
        self.beside += 1
        try:
            await anyio.sleep_forever()
        finally:
            self.beside -= 1

    async def run(self) -> None:
        self.reading += 1
        self.most = max(self.most, self.reading)
        try:
            await self.over.wait()
        finally:
            self.reading -= 1


async def test_started_and_stopped() -> None:
    reads = Reads()
    requests = reads.requests
    await requests.wait_stopped()
    async with create_task_group() as tasks:
        for begun in (1, 2):
            requests.start(tasks)
            requests.start(tasks)
            assert requests.reading is Reading.ON
            await wait_all_tasks_blocked()
            assert (reads.begun, reads.reading, reads.beside) == (begun, 1, 1)
            requests.stop()
            requests.stop()
            assert requests.reading is Reading.STOPPING
            await requests.wait_stopped()
            assert requests.reading is Reading.NOT
            assert (reads.reading, reads.beside) == (0, 0)
    assert reads.most == 1


@pytest.mark.parametrize("early", [False, True])
async def test_wanted_again_at_once(early: bool) -> None:
    """The task that was told to stop goes on, also if it hasn't begun."""
    reads = Reads()
    expected = 1 if early else 2
    async with create_task_group() as tasks:
        reads.requests.start(tasks)
        if not early:
            await wait_all_tasks_blocked()
        reads.requests.stop()
        reads.requests.start(tasks)
        await until(lambda: (reads.begun, reads.reading, reads.beside) == (expected, 1, 1))
        assert (reads.most, reads.requests.reading) == (1, Reading.ON)
        reads.requests.stop()


async def test_stopped_before_it_began() -> None:
    reads = Reads()
    async with create_task_group() as tasks:
        reads.requests.start(tasks)
        reads.requests.stop()
        await reads.requests.wait_stopped()
    assert reads.begun == 0


async def test_ends_by_itself() -> None:
    """Nothing more can be read: it doesn't begin again, and what runs beside it ends."""
    reads = Reads()
    async with create_task_group() as tasks:
        reads.requests.start(tasks)
        await wait_all_tasks_blocked()
        reads.over.set()
        await reads.requests.wait_stopped()
        assert (reads.begun, reads.beside) == (1, 0)
    assert reads.requests.reading is Reading.NOT


async def test_cancelled() -> None:
    """Whoever waits for its end doesn't wait on."""
    reads = Reads()
    async with create_task_group() as outer:
        async with create_task_group() as tasks:
            reads.requests.start(tasks)
            await wait_all_tasks_blocked()
            outer.start_soon(reads.requests.wait_stopped)
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    assert reads.requests.reading is Reading.NOT
    assert reads.beside == 0
