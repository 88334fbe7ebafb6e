"""A process that reads a stream, and serves others: ``python -m tests.faults.streaming OPTIONS``.

The options are JSON. It tells the ids of its peers once it has read the first item.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel


class Api:
    """What the process serves."""

    async def count(self) -> AsyncIterator[int]:
        """Yield one number, and then nothing, for ever."""
        yield 1
        await anyio.sleep_forever()

    async def total(self, numbers: AsyncIterator[int]) -> int:
        """Read what is there, and wait for more."""
        return sum([number async for number in numbers])


async def main(options: dict[str, Any], reads: str) -> None:
    async with (
        RedisStreamsTransport(**options) as transport,
        RPCChannel(transport, expose=Api(), timeout=None) as channel,
    ):
        async with channel.get_api(to=reads).endless() as items:
            await items.__anext__()
            print("ready", transport.session_id, flush=True)
            await anyio.sleep_forever()


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    anyio.run(main, arguments["options"], arguments["reads"], backend=arguments["backend"])
