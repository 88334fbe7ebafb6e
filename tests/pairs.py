"""Channels on a memory transport."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import anyio

from anyio_kkrpc import MemoryTransport, RPCChannel
from tests.bounds import BOUND, CALL_BOUND


class Pair(NamedTuple):
    """A client and a server that exposes something."""

    client: RPCChannel
    server: RPCChannel
    api: Any
    transports: tuple[MemoryTransport, MemoryTransport]


@asynccontextmanager
async def pair(
    api: object, *, codec: str | None = "json", server: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Pair]:
    """Open two channels; ``options`` are the client's."""
    a, b = MemoryTransport.pair(codec=codec)
    options.setdefault("timeout", CALL_BOUND)
    async with a, b, RPCChannel(b, expose=api, **(server or {})) as serving:
        async with RPCChannel(a, **options) as client:
            yield Pair(client, serving, client.get_api(), (a, b))


# Seconds between two looks: to collect garbage in a process of many tests takes a tenth of one.
LOOK = 0.3


async def none_left(*channels: RPCChannel) -> None:
    """Wait until nobody has anything of the others."""
    with anyio.fail_after(BOUND):
        while True:
            gc.collect()
            told = [channel.statistics() for channel in channels]
            if not any(one.references_given or one.references_held for one in told):
                return
            await anyio.sleep(LOOK)
