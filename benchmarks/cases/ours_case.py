"""anyio_kkrpc, in its own dialect: every worker gets each request, or one of the group does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

from . import Client, Place

NEEDS = ("hiredis",)
BACKENDS = ("asyncio", "uvloop", "trio")
KINDS = ("broadcast", "group")


class Api:
    """What the worker exposes."""

    async def echo(self, value: Any) -> Any:
        """Return the value."""
        return value

    async def count(self, number: int) -> AsyncIterator[int]:
        """Yield so many numbers."""
        for one in range(number):
            yield one


def transport(place: Place, **options: Any) -> RedisStreamsTransport:
    options.setdefault("use_consumer_group", place.kind == "group")
    if place.kind.startswith("kkrpc"):
        options["dialect"] = place.kind  # all on one stream, as TypeScript peers have it
    return RedisStreamsTransport(f"redis://127.0.0.1:{place.port}", stream=place.name, **options)


async def serve(place: Place, ready: Callable[[], None]) -> None:
    async with transport(place) as streams, RPCChannel(streams, expose=Api()) as channel:
        ready()
        await channel.serve_forever()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    async with transport(place) as streams, RPCChannel(streams) as channel:
        yield Client(channel.get_api().echo)
