"""docket: tasks in a Redis stream; results are announced by Pub/Sub."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from . import Client, Place

NEEDS = ("docket",)
BACKENDS = ("asyncio", "uvloop")
KINDS = ("",)


def _docket(place: Place) -> Any:
    from docket import Docket

    logging.getLogger("docket").setLevel(logging.WARNING)
    return Docket(name=place.name, url=f"redis://127.0.0.1:{place.port}/0")


async def echo(value: str) -> str:
    return value


async def serve(place: Place, ready: Callable[[], None]) -> None:
    from docket import Worker

    async with _docket(place) as docket:
        docket.register(echo)
        # It sleeps for up to this long when it has nothing to do.
        soon = timedelta(milliseconds=1)
        async with Worker(docket, concurrency=1000, minimum_check_interval=soon) as worker:
            ready()
            await worker.run_forever()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    async with _docket(place) as docket:
        docket.register(echo)
        add = docket.add(echo)

        async def call(text: str) -> Any:
            execution = await add(text)
            return await execution.get_result(timeout=timedelta(seconds=10))

        yield Client(call)
