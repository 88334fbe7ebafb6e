"""How fast calls are, against what Redis itself allows: ``python -m benchmarks.first``.

Client and worker are two processes and share one server, which this starts by itself. The limit is
a bare loop of XADD and XREAD in the same two processes, on AnyIO and hiredis: no ids, no tasks, no
records, and as many entries in one write as are in flight.

Rounds of all cases are interleaved, so that a noisy machine is noisy for each of them, and the
figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, NamedTuple

import anyio
import hiredis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing._server import RedisServer, find_server

IN_FLIGHT = 64
PAYLOAD = "x" * 100
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
KINDS = ("limit", "broadcast", "group")


class Plan(NamedTuple):
    """How much one round measures."""

    rounds: int
    sequential: float
    in_flight: float
    warm_up: int


class Round(NamedTuple):
    """What one round found."""

    p50: float
    p99: float
    sequential: float
    in_flight: float


# The limit


class Bare:
    """One connection without anything: commands out, replies in."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self._stream = stream
        self._reader = hiredis.Reader()

    async def write(self, *commands: tuple[Any, ...]) -> None:
        await self._stream.send(b"".join(map(hiredis.pack_command, commands)))  # type: ignore[arg-type]

    async def read(self) -> Any:
        while (reply := self._reader.gets()) is False:
            self._reader.feed(await self._stream.receive())
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def entries(self, stream: bytes, after: bytes, block: bytes) -> list[Any]:
        await self.write((b"XREAD", b"COUNT", b"1000", b"BLOCK", block, b"STREAMS", stream, after))
        reply = await self.read()
        return reply[0][1] if reply else []


async def _open(stack: AsyncExitStack, port: int) -> Bare:
    return Bare(await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", port)))


async def limit_worker(port: int, name: str) -> None:
    requests, replies = f"{name}:q".encode(), f"{name}:r".encode()
    async with AsyncExitStack() as stack:
        reading, writing = await _open(stack, port), await _open(stack, port)
        last = b"0-0"
        _ready()
        while True:
            entries = await reading.entries(requests, last, b"5000")
            if not entries:
                continue
            last = entries[-1][0]
            await writing.write(*[(b"XADD", replies, b"*", *fields) for _, fields in entries])
            for _ in entries:
                await writing.read()


async def limit_client(port: int, name: str, plan: Plan) -> Round:
    requests, replies = f"{name}:q".encode(), f"{name}:r".encode()
    command = (b"XADD", requests, b"*", b"v", PAYLOAD.encode())
    async with AsyncExitStack() as stack:
        reading, writing = await _open(stack, port), await _open(stack, port)
        last = b"0-0"

        async def exchange(count: int, at_least: int) -> int:
            """Send so many, and wait for at least so many replies; return how many came."""
            nonlocal last
            if count:
                await writing.write(*[command] * count)
            came = 0
            while came < at_least:
                entries = await reading.entries(replies, last, b"5000")
                if entries:
                    last = entries[-1][0]
                    came += len(entries)
            for _ in range(count):
                await writing.read()
            return came

        for _ in range(plan.warm_up):
            await exchange(1, 1)
        times = await _sequential(lambda: exchange(1, 1), plan.sequential)
        done, start = 0, time.perf_counter()
        free = IN_FLIGHT
        while time.perf_counter() - start < plan.in_flight:
            free = await exchange(free, 1)
            done += free
        elapsed = time.perf_counter() - start
        await exchange(0, IN_FLIGHT - free)
    return _round(times, done / elapsed)


# Ours


class Echo:
    """What the worker exposes."""

    async def echo(self, value: str) -> str:
        """Return the value."""
        return value


def _transport(port: int, name: str, kind: str) -> RedisStreamsTransport:
    return RedisStreamsTransport(
        f"redis://127.0.0.1:{port}", stream=name, use_consumer_group=kind == "group"
    )


async def rpc_worker(port: int, name: str, kind: str) -> None:
    async with (
        _transport(port, name, kind) as transport,
        RPCChannel(transport, expose=Echo()) as channel,
    ):
        _ready()
        await channel.serve_forever()


async def rpc_client(port: int, name: str, kind: str, plan: Plan) -> Round:
    async with _transport(port, name, kind) as transport, RPCChannel(transport) as channel:
        api = channel.get_api()
        for _ in range(plan.warm_up):
            await api.echo(PAYLOAD)
        times = await _sequential(lambda: api.echo(PAYLOAD), plan.sequential)
        done = 0
        start = time.perf_counter()
        end = start + plan.in_flight

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < end:
                await api.echo(PAYLOAD)
                done += 1

        async with anyio.create_task_group() as group:
            for _ in range(IN_FLIGHT):
                group.start_soon(caller)
        return _round(times, done / (time.perf_counter() - start))


async def _sequential(call: Callable[[], Awaitable[Any]], seconds: float) -> list[float]:
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        await call()
        times.append(time.perf_counter() - start)
    return times


def _round(times: list[float], in_flight: float) -> Round:
    times.sort()
    return Round(
        p50=times[len(times) // 2],
        p99=times[len(times) * 99 // 100],
        sequential=len(times) / sum(times),
        in_flight=in_flight,
    )


# Processes


def _ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _child(role: str, kind: str, backend: str, port: int, name: str, plan: Plan) -> None:
    loop, options = BACKENDS[backend]

    async def main() -> None:
        if role == "worker":
            if kind == "limit":
                await limit_worker(port, name)
            await rpc_worker(port, name, kind)
        with anyio.fail_after(60 + plan.sequential + plan.in_flight):
            if kind == "limit":
                result = await limit_client(port, name, plan)
            else:
                result = await rpc_client(port, name, kind, plan)
        sys.stdout.write(" ".join(map(repr, result)) + "\n")

    anyio.run(main, backend=loop, backend_options=options)


def _command(role: str, kind: str, backend: str, port: int, name: str, plan: Plan) -> list[str]:
    here = [sys.executable, "-m", "benchmarks.first", "--child", role, kind, backend]
    return [*here, str(port), name, *map(str, plan)]


@contextmanager
def worker(kind: str, backend: str, port: int, name: str, plan: Plan) -> Iterator[int]:
    """A worker process that is ready; gives its id."""
    command = _command("worker", kind, backend, port, name, plan)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the worker for {kind} on {backend} did not start")
            yield process.pid
        finally:
            process.kill()


def measure(kind: str, backend: str, port: int, plan: Plan) -> Round:
    """Run one round of one case: a worker and a client, each a process."""
    name = f"bench-{uuid.uuid4().hex[:8]}"
    with worker(kind, backend, port, name, plan):
        command = _command("client", kind, backend, port, name, plan)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    return Round(*map(float, done.stdout.split()))


# The table


def _median(rounds: list[Round]) -> Round:
    return Round(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def table(results: dict[tuple[str, str], list[Round]]) -> str:
    """Return the medians as a Markdown table; ratios are to the limit of the same backend."""
    flight = f"{IN_FLIGHT} /s"
    lines = [
        f"| backend | case | p50 ms | p99 ms | 1 /s | of limit | {flight} | of limit | range |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (backend, kind), rounds in results.items():
        found, limit = _median(rounds), _median(results[backend, "limit"])
        speeds = [one.in_flight for one in rounds]
        lines.append(
            f"| {backend} | {kind} | {found.p50 * 1e3:.3f} | {found.p99 * 1e3:.3f} "
            f"| {found.sequential:,.0f} | {found.sequential / limit.sequential:.2f} "
            f"| {found.in_flight:,.0f} | {found.in_flight / limit.in_flight:.2f} "
            f"| {min(speeds):,.0f} to {max(speeds):,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print one table."""
    if sys.argv[1:2] == ["--child"]:
        role, kind, backend, port, name, rounds, sequential, in_flight, warm_up = sys.argv[2:]
        plan = Plan(int(rounds), float(sequential), float(in_flight), int(warm_up))
        _child(role, kind, backend, int(port), name, plan)
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round of each case")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all")
    parser.add_argument("--case", choices=KINDS, action="append", help="beside the limit; all")
    arguments = parser.parse_args()
    plan = Plan(1, 0.3, 0.4, 100) if arguments.quick else Plan(3, 0.5, 0.8, 200)
    backends = arguments.backend or list(BACKENDS)
    if importlib.util.find_spec("uvloop") is None:
        backends = [backend for backend in backends if backend != "uvloop"]
    kinds = [kind for kind in KINDS if kind == "limit" or kind in (arguments.case or KINDS)]
    results: dict[tuple[str, str], list[Round]] = {
        (backend, kind): [] for backend in backends for kind in kinds
    }
    started = time.perf_counter()
    with RedisServer(find_server()) as server:
        for _ in range(plan.rounds):
            for backend, kind in results:
                results[backend, kind].append(measure(kind, backend, server.port, plan))
        version = server.version
    print(
        f"{len(PAYLOAD)}-byte echo, client and worker in two processes, {version}, Python "
        f"{platform.python_version()}, {os.cpu_count()} CPUs, medians of {plan.rounds} rounds in "
        f"{time.perf_counter() - started:.0f} s\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
