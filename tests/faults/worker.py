"""A worker process: ``python -m tests.faults.worker BACKEND URL STREAM LEDGER CLAIM_IDLE [GRACE]``.

Each run of a handler is a line of its ledger, written before anything else is done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio

from anyio_kkrpc import (
    RedisStreamsTransport,
    RPCChannel,
    current_call,
    serve_until_signalled,
)


class Api:
    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger

    def _note(self, what: str) -> None:
        with self._ledger.open("a") as file:
            file.write(f"{what} {os.getpid()} {current_call().attempt}\n")

    async def hang_once(self, key: str) -> str:
        """Hang in the first run, answer in the next."""
        self._note(key)
        if current_call().attempt == 1:
            await anyio.sleep_forever()
        return f"attempt {current_call().attempt}"

    def die(self) -> None:
        """Take the process down, each time."""
        self._note("die")
        os._exit(1)

    async def work(self, key: str, seconds: float) -> str:
        self._note(key)
        await anyio.sleep(seconds)
        return key

    async def count(self, gate: str) -> AsyncIterator[int]:
        """Yield the first number, and the others once a file is there."""
        yield 0
        while not Path(gate).exists():
            await anyio.sleep(0.01)
        for number in range(1, 500):
            yield number

    def pid(self) -> int:
        return os.getpid()


async def main(
    backend: str, url: str, stream: str, ledger: str, claim_idle: str, grace: str = "0"
) -> None:
    async with (
        RedisStreamsTransport(
            url, stream=stream, use_consumer_group=True, claim_idle=float(claim_idle)
        ) as transport,
        RPCChannel(
            transport, expose=Api(Path(ledger)), grace_period=float(grace), max_concurrency=4
        ) as channel,
    ):
        print("ready", flush=True)
        await serve_until_signalled(channel)
    print("left", flush=True)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:], backend=sys.argv[1])
