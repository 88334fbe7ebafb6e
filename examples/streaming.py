"""Reads a result item by item, with backpressure; leaving early ends it. Start worker.py first.

python examples/streaming.py [redis://localhost:6379]
"""

import sys

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-jobs", use_consumer_group=True) as transport,
        RPCChannel(transport) as channel,
    ):
        async for number in channel.get_api().count_to(3):
            print(number)
        async with channel.get_api().count_to(1_000_000) as numbers:
            async for number in numbers:
                if number == 10:
                    print("enough at", number)
                    break


anyio.run(main)
