"""Channels on a memory transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from anyio_kkrpc import MemoryTransport, RPCChannel
from tests.bounds import CALL_BOUND


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
