"""A worker of a consumer group: each call is handled by one of all that are started.

python examples/worker.py [redis://localhost:6379]
"""

import os
import sys
from datetime import datetime, timezone
from typing import Any

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, in_thread

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


class Math:
    def add(self, a: int, b: int) -> int:
        return a + b

    @in_thread
    def factorize(self, number: int) -> list[int]:
        """Takes long and awaits nothing, so it runs in a worker thread."""
        factors, divisor = [], 2
        while number > 1:
            while number % divisor == 0:
                factors.append(divisor)
                number //= divisor
            divisor += 1
        return factors


class Api:
    math = Math()
    started = datetime.now(timezone.utc)

    def pid(self) -> int:
        return os.getpid()

    async def resize(self, count: int, on_progress: Any) -> str:
        """Calls a function of the caller after each step."""
        for done in range(1, count + 1):
            await anyio.sleep(0.01)
            await on_progress(done, count)
        return f"{count} pictures"

    async def count_to(self, last: int) -> Any:
        """Streams its results."""
        for number in range(1, last + 1):
            yield number


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-jobs", use_consumer_group=True) as transport,
        RPCChannel(transport, expose=Api()) as channel,
    ):
        print("working", flush=True)
        await channel.serve_forever()


anyio.run(main)
