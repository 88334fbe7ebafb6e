"""Describes the workers' API by Protocols, for editors and type checkers. Start worker.py first.

python examples/typed_api.py [redis://localhost:6379]
"""

import sys
from collections.abc import AsyncIterator, Awaitable
from datetime import datetime
from typing import Protocol

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


class Math(Protocol):
    async def add(self, a: int, b: int) -> int: ...


class Api(Protocol):
    math: Math  # a nested object

    @property
    def started(self) -> Awaitable[datetime]: ...

    def count_to(self, last: int) -> AsyncIterator[int]: ...  # a stream


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-jobs", use_consumer_group=True) as transport,
        RPCChannel(transport) as channel,
    ):
        api = channel.get_api(Api)
        print(await api.math.add(7, 8))
        started = await api.started  # JSON has no datetime; the annotation makes it one again
        print("working since", started.strftime("%Y-%m-%d"))
        async for number in api.count_to(3):
            print(number)


anyio.run(main)
