"""Several things at once, which fail as one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from anyio import create_task_group


async def at_once(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Call them all at once; return their results in the order of the calls.

    The first error is raised as itself, and cancels the others.
    """
    results: list[Any] = [None] * len(calls)
    errors: list[Exception] = []

    async def run(number: int, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            results[number] = await call()
        except Exception as exc:
            errors.append(exc)
            group.cancel_scope.cancel()

    async with create_task_group() as group:
        for number, call in enumerate(calls):
            group.start_soon(partial(run, number, call))
    if errors:
        raise errors[0]
    return results
