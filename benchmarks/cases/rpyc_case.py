"""RPyC over TCP, without a broker: blocking, one connection."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from . import PAYLOAD, Client, Place

NEEDS = ("rpyc",)
BACKENDS = ("asyncio",)  # of the program that calls it; RPyC itself uses none
KINDS = ("",)
DIRECT = True


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    import rpyc

    connection = rpyc.connect("127.0.0.1", place.port)
    echo = connection.root.echo
    later = rpyc.async_(echo)

    async def call(text: str) -> Any:
        return echo(text)

    async def flood(window: int, seconds: float) -> int:
        done, waiting, end = 0, deque[Any](), time.perf_counter() + seconds
        while time.perf_counter() < end:
            while len(waiting) < window:
                waiting.append(later(PAYLOAD))
            waiting.popleft().wait()
            done += 1
        for result in waiting:
            result.wait()
        return done + len(waiting)

    try:
        yield Client(call, flood)
    finally:
        connection.close()


async def serve(place: Place, ready: Callable[[], None]) -> None:
    import rpyc
    from rpyc.utils.server import ThreadedServer

    class Service(rpyc.Service):  # type: ignore[misc]
        def exposed_echo(self, value: str) -> str:
            return value

    server = ThreadedServer(Service, hostname="127.0.0.1", port=place.port)
    ready()
    server.start()
