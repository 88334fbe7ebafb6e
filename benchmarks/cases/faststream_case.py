"""FastStream: a request on a stream, the answer by pub/sub."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from . import IN_FLIGHT, Client, Place

NEEDS = ("faststream", "redis")
BACKENDS = ("asyncio", "uvloop")
KINDS = ("",)


async def serve(place: Place, ready: Callable[[], None]) -> None:
    from faststream.redis import RedisBroker, StreamSub

    broker = RedisBroker(f"redis://127.0.0.1:{place.port}", logger=None)

    @broker.subscriber(stream=StreamSub(place.name, polling_interval=100))
    async def echo(value: str) -> str:
        return value

    async with broker:
        await broker.start()
        ready()
        await anyio.sleep_forever()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    from faststream.redis import RedisBroker

    url = f"redis://127.0.0.1:{place.port}"
    # Each request that waits has a connection of its own.
    async with RedisBroker(url, logger=None, max_connections=IN_FLIGHT * 2) as broker:
        yield Client(lambda text: broker.request(text, stream=place.name, timeout=10))
