"""NATS request and reply: in memory, at most once. nats-server runs beside."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio

from . import Client, Place, free_port, program

NEEDS = ("nats",)
PROGRAMS = ("nats-server",)
BACKENDS = ("asyncio", "uvloop")
KINDS = ("",)


@contextmanager
def server() -> Iterator[tuple[int, int]]:
    """A nats-server; gives its port and process id."""
    path = program("nats-server")
    assert path is not None
    port = free_port()
    command = [path, "-a", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(500):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.01)
            yield port, process.pid
        finally:
            process.terminate()


async def serve(place: Place, ready: Callable[[], None]) -> None:
    import nats

    connection = await nats.connect(f"nats://127.0.0.1:{place.port}")

    async def echo(message: Any) -> None:
        await message.respond(message.data)

    await connection.subscribe(place.name, cb=echo)
    await connection.flush()
    ready()
    await anyio.sleep_forever()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    import nats

    connection = await nats.connect(f"nats://127.0.0.1:{place.port}")
    try:
        yield Client(lambda text: connection.request(place.name, text.encode(), timeout=10))
    finally:
        await connection.close()
