"""A caller leaves many running calls at once: ``python -m benchmarks.cancels --calls 10000``.

One worker process runs them all. Printed are how many run on, and what the cancels cost the server,
with and without idle peers. The exit code is 0 only if none runs two seconds later.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import anyio
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, serve_until_signalled
from anyio_kkrpc.testing import RedisServer

STREAM = "cancels"
# Seconds after the cancel: when it is looked, the last time for the verdict.
LOOKS = (0.5, 1.0, 2.0)


class Api:
    def __init__(self) -> None:
        self._running = 0

    async def work(self) -> None:
        self._running += 1
        try:
            await anyio.sleep_forever()
        finally:
            self._running -= 1

    def running(self) -> int:
        return self._running


def peer(url: str) -> RedisStreamsTransport:
    return RedisStreamsTransport(url, stream=STREAM, use_consumer_group=True)


async def work(url: str, calls: str) -> None:
    async with (
        peer(url) as transport,
        RPCChannel(transport, expose=Api(), max_concurrency=int(calls) + 10) as channel,
    ):
        await serve_until_signalled(channel)


async def measure(url: str, calls: int, idle: int) -> int:
    """Return how many handlers run on after the last look."""
    async with AsyncExitStack() as stack:
        channels = []
        for _ in range(idle + 2):
            transport = await stack.enter_async_context(peer(url))
            channel = await stack.enter_async_context(RPCChannel(transport, timeout=None))
            channels.append(channel)
        watching, calling = channels[-2:]
        running: Callable[[], Awaitable[int]] = watching.get_api().running
        witness = stack.enter_context(redis.Redis.from_url(url))
        async with anyio.create_task_group() as group:
            for _ in range(calls):
                group.start_soon(calling.get_api().work)
            while await running() < calls:
                await anyio.sleep(0.1)
            witness.config_resetstat()
            began = anyio.current_time()
            group.cancel_scope.cancel()
        left = []
        for look in LOOKS:
            await anyio.sleep_until(began + look)
            left.append(await running())
        stats = witness.info("commandstats")
        commands = sum(one["calls"] for one in stats.values())
        seconds = sum(one["usec"] for one in stats.values()) / 1e6
    print(
        f"{idle} idle peers: of {calls} handlers run on after {LOOKS} s: {left}; for each cancel "
        f"the server had {commands / calls:.2f} commands in {seconds / calls * 1e6:.0f} us"
    )
    return left[-1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cancels")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--idle", type=int, nargs="*", default=[0, 50])
    parser.add_argument("--backend", default="asyncio", choices=["asyncio", "trio"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        anyio.run(work, *options.worker, backend=options.backend)
        return
    with RedisServer() as server:
        command = [sys.executable, "-m", "benchmarks.cancels", "--backend", options.backend]
        worker = subprocess.Popen([*command, "--worker", server.url, str(options.calls)])
        try:
            left = [
                anyio.run(measure, server.url, options.calls, idle, backend=options.backend)
                for idle in options.idle
            ]
        finally:
            worker.terminate()
            worker.wait()
    sys.exit(int(any(left)))


if __name__ == "__main__":
    main()
