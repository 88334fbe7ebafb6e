"""A result that is a stream, where the call has a key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest

from anyio_kkrpc._serving._intercepting import _watchers
from anyio_kkrpc._serving._keyed import keep_stream
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.records import Request

pytestmark = pytest.mark.anyio


class Keeps:
    """Notes what is kept, and refuses what it is told to."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.waits = 0
        self.items = self

    async def keep_item(self, envelope: Envelope, value: Any) -> None:
        if value == "refused":
            raise TypeError("can't be encoded")
        self.kept.append(value)

    async def keep_rest(self, envelope: Envelope) -> None:
        self.kept.append("end")


class Counter:
    """A stream that nobody can close."""

    def __init__(self) -> None:
        self.count = 0

    def __aiter__(self) -> Counter:
        return self

    async def __anext__(self) -> int:
        if self.count == 3:
            raise StopAsyncIteration
        self.count += 1
        return self.count


async def keep(keeps: Keeps | None, value: Any) -> tuple[Any, list[Any]]:
    """Return what stands for a result, and what those were told who watch for its end."""
    told: list[Any] = []
    core: Any = SimpleNamespace(transport=SimpleNamespace(keyed=keeps))
    source: Any = SimpleNamespace(item=Any, name="numbers")
    handling: Any = SimpleNamespace(driver=SimpleNamespace(waits=lambda: None))
    context = copy_context()
    context.run(_watchers.set, [told.append])
    envelope = Envelope(Request("1", "call", ["numbers"]), key="k")
    try:
        return await keep_stream(core, value, envelope, source, handling, context), told
    except Exception as exc:
        return exc, told


async def test_what_is_no_stream() -> None:
    keeps = Keeps()
    assert await keep(keeps, [1, 2]) == ([1, 2], [])
    assert keeps.kept == []


async def test_stream() -> None:
    keeps = Keeps()
    result, told = await keep(keeps, Counter())
    assert result == {"__kkrpc_next_stream__": "async-iterable", "id": "items"}
    assert keeps.kept == [1, 2, 3, "end"]
    assert [(end.outcome, end.items) for end in told] == [("ok", 3)]


@pytest.mark.parametrize("fails", ["source", "keeping"])
async def test_failing_stream(fails: str) -> None:
    """What came before is kept before the error is told; the source is closed."""
    closed: list[bool] = []

    async def numbers() -> AsyncIterator[Any]:
        try:
            yield 1
            if fails == "source":
                raise LookupError("no tea")
            yield "refused"
        finally:
            closed.append(True)

    keeps = Keeps()
    error, told = await keep(keeps, numbers())
    assert isinstance(error, LookupError if fails == "source" else TypeError)
    assert keeps.kept == [1, "end"]
    assert closed == [True]
    assert [(end.outcome, end.error) for end in told] == [("failed", error)]
