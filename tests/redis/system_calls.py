"""The system calls of a lone call, as strace tells them.

As a program it is the client that is watched: ``system_calls.py LOOP URL STREAM``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

CALLS = 100
WARM = 20
# What nothing else calls, before and behind what is counted.
_MARK = "getppid"
_LINE = re.compile(r"^(\d+) +(\w+)\(", re.MULTILINE)


def can_watch() -> bool:
    """Whether there is strace, and it may watch a child."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


def count(folder: Path, loop: str, url: str, stream: str) -> dict[str, float]:
    """Return how often the client makes each system call for each call, one after the other."""
    out = folder / f"{loop}.strace"
    watched = ["strace", "-f", "-qq", "-o", str(out), sys.executable, __file__, loop, url, stream]
    environment = {name: value for name, value in os.environ.items() if "COV" not in name}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run(watched, env=environment, check=True, timeout=300)
    lines = [match.groups() for match in _LINE.finditer(out.read_text())]
    begin, end = (place for place, (_, name) in enumerate(lines) if name == _MARK)
    here = lines[begin][0]
    counter = Counter(name for task, name in lines[begin + 1 : end] if task == here)
    return {name: times / CALLS for name, times in counter.items()}


async def _client(url: str, stream: str) -> None:
    async with (
        RedisStreamsTransport(url, stream=stream, use_consumer_group=True) as transport,
        RPCChannel(transport) as channel,
    ):
        api = channel.get_api()
        for number in range(WARM):
            await api.echo(number)
        os.getppid()
        for number in range(CALLS):
            await api.echo(number)
        os.getppid()


def main() -> None:
    loop, url, stream = sys.argv[1:]
    backend: dict[str, Any] = {"backend": "trio"}
    if loop != "trio":
        backend = {"backend": "asyncio", "backend_options": {"use_uvloop": loop == "uvloop"}}
    anyio.run(_client, url, stream, **backend)


if __name__ == "__main__":
    main()
