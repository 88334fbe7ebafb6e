"""The limit: XADD and XREAD without anything else, on AnyIO and hiredis.

No ids, no tasks, no records, and as many entries in one write as there are.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import hiredis
from anyio.abc import ByteStream

from . import PAYLOAD, Client, Place

NEEDS = ("hiredis",)
BACKENDS = ("asyncio", "uvloop", "trio")
KINDS = ("",)


class Bare:
    """One connection: commands out, replies in."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._reader = hiredis.Reader()

    async def write(self, *commands: tuple[Any, ...]) -> None:
        await self._stream.send(b"".join(map(hiredis.pack_command, commands)))

    async def read(self) -> Any:
        while (reply := self._reader.gets()) is False:
            self._reader.feed(await self._stream.receive())
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def entries(self, stream: bytes, after: bytes) -> list[Any]:
        command = (b"XREAD", b"COUNT", b"1000", b"BLOCK", b"5000", b"STREAMS", stream, after)
        await self.write(command)
        reply = await self.read()
        return reply[0][1] if reply else []


async def _open(stack: AsyncExitStack, port: int) -> Bare:
    return Bare(await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", port)))


async def serve(place: Place, ready: Callable[[], None]) -> None:
    requests, replies = f"{place.name}:q".encode(), f"{place.name}:r".encode()
    async with AsyncExitStack() as stack:
        reading, writing = await _open(stack, place.port), await _open(stack, place.port)
        last = b"0-0"
        ready()
        while True:
            entries = await reading.entries(requests, last)
            if not entries:
                continue
            last = entries[-1][0]
            await writing.write(*[(b"XADD", replies, b"*", *fields) for _, fields in entries])
            for _ in entries:
                await writing.read()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    requests, replies = f"{place.name}:q".encode(), f"{place.name}:r".encode()
    async with AsyncExitStack() as stack:
        reading, writing = await _open(stack, place.port), await _open(stack, place.port)
        last = b"0-0"

        async def exchange(text: str, count: int, at_least: int) -> int:
            """Send so many, and wait for at least so many replies; return how many came."""
            nonlocal last
            if count:
                command = (b"XADD", requests, b"*", b"v", text.encode())
                await writing.write(*[command] * count)
            came = 0
            while came < at_least:
                entries = await reading.entries(replies, last)
                if entries:
                    last = entries[-1][0]
                    came += len(entries)
            for _ in range(count):
                await writing.read()
            return came

        async def flood(window: int, seconds: float) -> int:
            done, free, end = 0, window, time.perf_counter() + seconds
            while time.perf_counter() < end:
                free = await exchange(PAYLOAD, free, 1)
                done += free
            await exchange(PAYLOAD, 0, window - free)
            return done + window - free

        yield Client(lambda text: exchange(text, 1, 1), flood)
