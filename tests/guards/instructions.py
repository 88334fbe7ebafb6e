"""Instructions per call or per item of a stream, counted by callgrind: the same on every run on a
quiet machine.

How many share a read or a write depends on how fast the other side is, so on a busy machine there
are more of them.

As a program it is one side of what is counted: ``instructions.py SIDE WHAT MODE LOOP URL``.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

# How many are counted. More of them change the result by less than a thousandth.
COUNTED = {"calls": 1000, "items": 10_000}
WARM = {"calls": 600, "items": 1000}
IN_FLIGHT = 64
PAYLOAD = "x" * 100
# Names of the counted side and of the library that starts and stops the counting.
SIDE, LIBRARY = "KKRPC_COUNTED_SIDE", "KKRPC_COUNTING_LIBRARY"

_SWITCH = """
#include <valgrind/callgrind.h>
void counting_start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void counting_stop(void) { CALLGRIND_STOP_INSTRUMENTATION; }
"""


def build_switch(folder: Path) -> Path | None:
    """Build what lets a program start and stop the counting; ``None`` where it can't be built."""
    if shutil.which("valgrind") is None or shutil.which("gcc") is None:
        return None
    source, library = folder / "switch.c", folder / "switch.so"
    source.write_text(_SWITCH)
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True)
    return library if done.returncode == 0 else None


def count(folder: Path, library: Path, side: str, what: str, mode: str, loop: str, url: str) -> int:
    """Return the instructions that one side executes for each call, calls being 64 in flight, or
    for each item of one stream, of which the worker has the source.
    """
    out = folder / f"{side}.{what}.{mode}.{loop}.out"
    environment = {
        **os.environ,
        SIDE: side,
        LIBRARY: str(library),
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    # Coverage of the test run must not be counted.
    for name in [name for name in environment if name.startswith("COV")]:
        del environment[name]
    callgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"]
    callgrind.append(f"--callgrind-out-file={out}")

    def command(role: str) -> list[str]:
        program = [sys.executable, __file__, role, what, mode, loop, url]
        return [*callgrind, *program] if role == side else program

    worker = subprocess.Popen(command("worker"), stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        subprocess.run(command("client"), env=environment, check=True, timeout=500)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(100) == 0
    finally:
        worker.kill()
        worker.wait()
        if worker.stdout is not None:
            worker.stdout.close()
    totals = re.findall(r"^(?:summary|totals):\s*(\d+)", out.read_text(), re.MULTILINE)
    return round(int(totals[-1]) / COUNTED[what])


def _switch(name: str) -> Callable[[], object]:
    function: Any = getattr(ctypes.CDLL(os.environ[LIBRARY]), name)
    return lambda: function() and None


async def _echo(value: str) -> str:
    if value in ("counting_start", "counting_stop"):
        # One look of the garbage collector at all that was ever made is as much as 150 calls. When
        # it comes depends on what was imported, so it has less to look at.
        gc.collect()
        gc.freeze()
        _switch(value)()
    return value


async def _numbers(number: int) -> AsyncIterator[int]:
    for one in range(number):
        yield one


async def _worker(url: str, what: str, options: dict[str, Any]) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with (
            RedisStreamsTransport(url, **options) as transport,
            RPCChannel(transport, expose={"echo": _echo, "numbers": _numbers}),
        ):
            print("ready", flush=True)
            async for _ in signals:
                return


async def _client(url: str, what: str, options: dict[str, Any]) -> None:
    async with RedisStreamsTransport(url, **options) as transport, RPCChannel(transport) as channel:
        api = channel.get_api()

        async def some(number: int) -> None:
            for _ in range(number // IN_FLIGHT):
                await api.echo(PAYLOAD)

        async def calls(number: int) -> None:
            async with anyio.create_task_group() as group:
                for _ in range(IN_FLIGHT):
                    group.start_soon(some, number)

        async def items(number: int) -> None:
            async for _ in api.numbers(number):
                pass

        async def switch(name: str) -> None:
            await (api.echo(name) if os.environ[SIDE] == "worker" else _echo(name))

        many: Callable[[int], Awaitable[None]] = {"calls": calls, "items": items}[what]
        await many(WARM[what])
        await switch("counting_start")
        await many(COUNTED[what])
        await switch("counting_stop")


def main() -> None:
    role, what, mode, loop, url = sys.argv[1:]
    options = {"stream": "counted", "max_len": 10_000, "use_consumer_group": mode == "group"}
    backend: dict[str, Any] = {"backend": "trio"}
    if loop != "trio":
        backend = {"backend": "asyncio", "backend_options": {"use_uvloop": loop == "uvloop"}}
    anyio.run(_worker if role == "worker" else _client, url, what, options, **backend)


if __name__ == "__main__":
    main()
