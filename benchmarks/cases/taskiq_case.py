"""taskiq on Redis Streams; the result is looked for each millisecond."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from . import Client, Place

NEEDS = ("taskiq", "taskiq_redis")
BACKENDS = ("asyncio", "uvloop")
KINDS = ("",)


def _broker(place: Place) -> tuple[Any, Any]:
    from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

    url = f"redis://127.0.0.1:{place.port}"
    broker = RedisStreamBroker(url, queue_name=place.name).with_result_backend(
        RedisAsyncResultBackend(url)
    )

    @broker.task(task_name="echo")
    async def echo(value: str) -> str:
        return value

    return broker, echo


async def serve(place: Place, ready: Callable[[], None]) -> None:
    from taskiq.api import run_receiver_task

    broker, _ = _broker(place)
    broker.is_worker_process = True
    await broker.startup()
    ready()
    await run_receiver_task(broker)


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    broker, echo = _broker(place)
    await broker.startup()

    async def call(text: str) -> Any:
        task = await echo.kiq(text)
        return await task.wait_result(check_interval=0.001, timeout=10)

    try:
        yield Client(call)
    finally:
        await broker.shutdown()
