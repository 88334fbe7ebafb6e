"""arq; jobs and results are looked for each millisecond."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from . import Client, Place

NEEDS = ("arq",)
BACKENDS = ("asyncio", "uvloop")
KINDS = ("",)


def _settings(place: Place) -> Any:
    from arq.connections import RedisSettings

    return RedisSettings(host="127.0.0.1", port=place.port)


async def echo(context: object, value: str) -> str:
    return value


async def serve(place: Place, ready: Callable[[], None]) -> None:
    from arq.worker import Worker

    logging.getLogger("arq").setLevel(logging.WARNING)
    worker = Worker(
        [echo],
        queue_name=place.name,
        redis_settings=_settings(place),
        poll_delay=0.001,
        max_jobs=1000,
        handle_signals=False,
    )
    ready()
    await worker.async_run()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    from arq import create_pool
    from arq.jobs import ResultNotFound

    redis = await create_pool(_settings(place), default_queue_name=place.name)

    async def call(text: str) -> Any:
        job = await redis.enqueue_job("echo", text)
        assert job is not None
        while True:
            try:
                return await job.result(timeout=10, poll_delay=0.001)
            except ResultNotFound:  # it looked for the result just before, for the job just after
                pass

    try:
        yield Client(call)
    finally:
        await redis.aclose()
