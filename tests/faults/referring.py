"""A worker that gives objects by reference, and uses those of others.

Run as ``python -m tests.faults.referring OPTIONS``, which are JSON. It tells its id once it serves.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, by_reference, current_call


@by_reference
class Session:
    def ask(self, question: str) -> str:
        return f"asked: {question}"

    async def wait(self) -> None:
        await anyio.sleep_forever()


class Api:
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def open_session(self) -> Session:
        return Session()

    def keep(self, thing: Any) -> None:
        self.kept.append(thing)

    async def use(self, thing: Any) -> str:
        """Use it, and answer in the second run."""
        told: str = await thing.ask(current_call().attempt)
        if current_call().attempt == 1:
            await anyio.sleep_forever()
        return told


async def main(options: dict[str, Any]) -> None:
    async with (
        RedisStreamsTransport(**options) as transport,
        RPCChannel(transport, expose=Api(), timeout=None),
    ):
        print("ready", transport.session_id, flush=True)
        await anyio.sleep_forever()


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    anyio.run(main, arguments["options"], backend=arguments["backend"])
