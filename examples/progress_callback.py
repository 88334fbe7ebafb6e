"""Passes a function as an argument; the worker calls it while it works. Start worker.py first.

python examples/progress_callback.py [redis://localhost:6379]
"""

import sys

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


def show(done: int, count: int) -> None:
    print(f"{done} of {count}")


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-jobs", use_consumer_group=True) as transport,
        RPCChannel(transport) as channel,
    ):
        print(await channel.get_api().resize(5, show))


anyio.run(main)
