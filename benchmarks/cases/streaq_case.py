"""streaQ: tasks in a Redis stream, on AnyIO and coredis."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from . import Client, Place

NEEDS = ("streaq",)
BACKENDS = ("asyncio", "uvloop", "trio")
KINDS = ("",)


def _queue(place: Place) -> tuple[Any, Any]:
    from streaq import Worker

    logging.getLogger("streaq").setLevel(logging.WARNING)
    worker: Any = Worker(
        redis_url=f"redis://127.0.0.1:{place.port}",
        queue_name=place.name,
        concurrency=1000,
        # Who waits for a result has a connection for it, and needs another one to ask.
        redis_kwargs={"max_connections": 1000},
        handle_signals=False,
    )

    @worker.task(name="echo")
    async def echo(value: str) -> str:
        return value

    return worker, echo


async def serve(place: Place, ready: Callable[[], None]) -> None:
    worker, _ = _queue(place)
    ready()
    await worker.run_async()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    worker, echo = _queue(place)

    async def call(text: str) -> Any:
        task = await echo.enqueue(text)
        found = await task.result(timeout=10)
        return found.result

    async with worker:
        yield Client(call)
