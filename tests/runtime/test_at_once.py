"""Several things at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from anyio_kkrpc._runtime._at_once import at_once
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio


async def test_results_in_the_order_of_the_calls() -> None:
    """All have begun before one ends."""
    begun: list[int] = []

    def call(number: int) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            begun.append(number)
            while len(begun) < 3:
                await anyio.lowlevel.checkpoint()
            return number

        return run

    with anyio.fail_after(BOUND):
        assert await at_once(call(1), call(2), call(3)) == [1, 2, 3]
    assert await at_once() == []


async def test_the_first_error_counts() -> None:
    """Also if another one comes of its being cancelled, or at the same time."""
    ended: list[str] = []

    async def fail() -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("first")

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    async def fail_too() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise KeyError("second")

    with anyio.fail_after(BOUND), pytest.raises(ValueError, match="first"):
        await at_once(fail, wait, fail_too, fail)
    assert ended == ["cancelled"]


async def test_cancelled() -> None:
    """From outside, all are."""
    ended: list[int] = []

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(1)

    async with anyio.create_task_group() as group:
        group.start_soon(at_once, wait, wait)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert ended == [1, 1]
