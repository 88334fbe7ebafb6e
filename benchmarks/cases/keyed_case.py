"""anyio_kkrpc, each call with a key of its own: claimed, run once, its result kept and told.

What it is compared with, next to calls without a key, is what others call a result: docket's and
taskiq's is kept in Redis and asked for, too.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from anyio_kkrpc import RPCChannel, with_call_options

from . import Client, Place
from .ours_case import BACKENDS, NEEDS, serve, transport

__all__ = ("BACKENDS", "KINDS", "NEEDS", "connect", "serve")

KINDS = ("group",)
# Seconds for which results are kept.
KEEP = 60.0


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    async with transport(place) as streams, RPCChannel(streams) as channel:
        api, mine, numbers = channel.get_api(), uuid.uuid4().hex[:8], count()

        async def call(text: str) -> Any:
            key = f"{mine}-{next(numbers)}"
            return await with_call_options(api, key=key, keep=KEEP).echo(text)

        yield Client(call)
