"""The hand-rolled way: LPUSH and BRPOP on redis-py, a list for each answer."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from . import IN_FLIGHT, Client, Place

NEEDS = ("redis",)
BACKENDS = ("asyncio", "uvloop")
KINDS = ("",)


def _redis(place: Place) -> Any:
    from redis.asyncio import Redis

    return Redis(host="127.0.0.1", port=place.port, max_connections=IN_FLIGHT * 2)


async def serve(place: Place, ready: Callable[[], None]) -> None:
    async with _redis(place) as redis:
        ready()
        while True:
            _, request = await redis.brpop(place.name)
            number, value = request.split(b":", 1)
            await redis.lpush(f"{place.name}:{number.decode()}", value)


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    numbers = itertools.count()
    async with _redis(place) as redis:

        async def call(text: str) -> Any:
            number = next(numbers)
            await redis.lpush(place.name, f"{number}:{text}")
            return await redis.brpop(f"{place.name}:{number}", timeout=10)

        yield Client(call)
