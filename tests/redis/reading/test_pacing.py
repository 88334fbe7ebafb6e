"""The task that lets streams go on: there as long as one needs it, and one at a time."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after

from anyio_kkrpc.redis._reading._pacing import Pacing
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


class Streams:
    """Busy for so many ticks."""

    def __init__(self, ticks: int) -> None:
        self.left, self.ticked = ticks, 0
        self.ended_reason: Exception | None = None

    @property
    def busy(self) -> bool:
        return self.left > 0

    def tick(self) -> None:
        self.left -= 1
        self.ticked += 1


async def test_as_long_as_there_is_something() -> None:
    streams: Any = Streams(3)
    pacing = Pacing(streams, streams)
    pacing.go_on()  # nobody has begun yet
    with fail_after(BOUND):
        for ticks in (3, 2):
            streams.left, streams.ticked = ticks, 0
            async with create_task_group() as tasks:
                pacing.begin(tasks)
                for _ in range(3):  # two tasks would go on twice as fast
                    pacing.go_on()
                await anyio.wait_all_tasks_blocked()
                assert streams.ticked == 1
            assert (streams.ticked, streams.left) == (ticks, 0)
        async with create_task_group() as tasks:
            pacing.begin(tasks)
            pacing.go_on()  # nothing needs it


async def test_ends_with_what_receives() -> None:
    streams: Any = Streams(10_000)
    pacing = Pacing(streams, streams)
    with fail_after(BOUND):
        async with create_task_group() as tasks:
            pacing.begin(tasks)
            pacing.go_on()
            await anyio.wait_all_tasks_blocked()
            streams.ended_reason = ZeroDivisionError()
    assert streams.ticked < 10_000
