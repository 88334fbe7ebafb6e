"""Rounds of steps, some of which Redis refuses."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after
from anyio.lowlevel import checkpoint

from anyio_kkrpc.redis._connection._errors import RedisError, ResponseError
from anyio_kkrpc.redis._upkeep import Upkeep
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

FULL = ResponseError("OOM command not allowed")
WRONG = ResponseError("ERR syntax error")


class Patience:
    """Notes what it is told; what doesn't pass is of no use to try again."""

    calm = True

    def __init__(self) -> None:
        self.told: list[str] = []

    def pause(self, exc: Exception) -> float:
        self.told.append(str(exc))
        self.calm = False
        if exc is WRONG:
            raise exc
        return 0.0

    def worked(self) -> None:
        self.calm = True
        self.told.append("worked")


class Steps:
    def __init__(self, *rounds: tuple[Any, Any]) -> None:
        self.rounds = [*rounds]
        self.done: list[str] = []
        self.count = 0

    async def first(self) -> None:
        self.count += 1
        self.done.append("first")
        await self.take(0)

    async def second(self) -> None:
        self.done.append("second")
        await self.take(1)

    async def take(self, which: int) -> None:
        await checkpoint()
        if len(self.rounds) >= self.count and (error := self.rounds[self.count - 1][which]):
            raise error


async def run_rounds(steps: Steps, patience: Any, count: int) -> None:
    upkeep = Upkeep([steps.first, steps.second], checkpoint, patience)
    async with create_task_group() as group:
        group.start_soon(upkeep.run)
        with fail_after(BOUND):
            while steps.count < count:
                await anyio.sleep(0.001)
        group.cancel_scope.cancel()


async def test_one_that_is_refused_holds_up_no_other() -> None:
    """It is said once that it works again."""
    steps, patience = Steps((FULL, None), (None, FULL), (None, None)), Patience()
    await run_rounds(steps, patience, 6)
    assert steps.done[:6] == ["first", "second"] * 3
    assert patience.told == [str(FULL), str(FULL), "worked"]


@pytest.mark.parametrize("errors", [(FULL, WRONG), (WRONG, FULL)])
async def test_the_gravest_counts(errors: tuple[RedisError, RedisError]) -> None:
    """What won't pass ends it, once all steps of the round have been tried."""
    steps, patience = Steps(errors), Patience()
    told: Any = patience
    with pytest.raises(ResponseError), fail_after(BOUND):
        await Upkeep([steps.first, steps.second], checkpoint, told).run()
    assert steps.done == ["first", "second"]
    assert patience.told == [str(WRONG)]


async def test_what_is_refused_is_tried_again_sooner() -> None:
    """Also where the next round isn't due for long."""
    steps, patience = Steps((FULL, None)), Patience()
    rests: list[int] = []

    async def rest() -> None:
        rests.append(steps.count)
        if len(rests) > 1:
            await anyio.sleep_forever()

    told: Any = patience
    async with create_task_group() as group:
        group.start_soon(Upkeep([steps.first, steps.second], rest, told).run)
        with fail_after(BOUND):
            while len(rests) < 3:
                await anyio.sleep(0.001)
        group.cancel_scope.cancel()
    assert rests == [0, 1, 2]
