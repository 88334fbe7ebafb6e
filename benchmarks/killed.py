"""How long after `kill -9` of a worker its calls are answered: ``python -m benchmarks.killed``.

``serve --workers 2`` has eight calls of a second, by halves in each of both, when one is killed;
all but ``--concurrency`` is on defaults. What is told is the time from the kill to the last answer,
less the second that a handler takes: five runs and their median.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import anyio
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer

API = """
import os

import anyio


class Api:
    def pid(self) -> int:
        return os.getpid()

    async def busy(self) -> None:
        await anyio.sleep(1)
"""
CALLS = 8


async def ask(url: str) -> float:
    """Return the seconds beyond the handler's own."""
    async with (
        RedisStreamsTransport(url, stream="killed") as transport,
        RPCChannel(transport) as channel,
    ):
        api = channel.get_api()
        pid = await api.pid()
        async with anyio.create_task_group() as group:
            for _ in range(CALLS):
                group.start_soon(api.busy)
            with redis.Redis.from_url(url) as client:
                while client.xpending("killed", "w")["pending"] < CALLS:
                    await anyio.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            killed = anyio.current_time()
        return anyio.current_time() - killed - 1


def run() -> float:
    """Measure once."""
    command = ["-m", "anyio_kkrpc", "serve", "killed:Api", "-g", "w", "-w", "2", "-s", "killed"]
    with tempfile.TemporaryDirectory() as directory, RedisServer() as server:
        Path(directory, "killed.py").write_text(API)
        with subprocess.Popen(
            [sys.executable, *command, "--concurrency", "4"],
            cwd=directory,
            env={**os.environ, "ANYIO_KKRPC_URL": server.url},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            begun = 0
            while begun < 2:
                begun += ": serving " in process.stderr.readline()
            taken = anyio.run(ask, server.url)
            process.terminate()
            process.communicate()
    return taken


if __name__ == "__main__":
    found = [run() for _ in range(5)]
    text = ", ".join(f"{seconds:.2f}" for seconds in found)
    print(f"killed: {text} s; median {statistics.median(found):.2f} s")
