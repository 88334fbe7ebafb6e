"""What only anyio_kkrpc is asked: large and streamed values, idle peers, more workers, memory.

``python -m benchmarks._ours NAME BACKEND PLACE PID SERVER`` is the client process of one measure.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import anyio

from anyio_kkrpc import RPCChannel
from anyio_kkrpc.testing._server import RedisServer

from ._processes import cpu, run, worker
from .cases import IN_FLIGHT, PAYLOAD, Place, limit_case, ours_case

MEBIBYTE = 2**20
SECONDS = 1.5
LARGE_ROUNDS, LARGE_SECONDS = 5, 0.3
ITEMS = 50_000
CALLS = 10_000
IDLE = 5.0
PEERS = 50

Found = dict[str, float]


# In the client's process


async def large(place: Place, pid: int, server: int) -> Found:
    """1 MiB and 15 MiB there and back, one at a time; MB/s of payload in one direction.

    Interleaved, and the median of some rounds: they differ by less than the machine does.
    """
    async with AsyncExitStack() as stack:
        there = place._replace(name=f"{place.name}-limit")
        limit = await stack.enter_async_context(limit_case.connect(there))
        echoes: dict[str, Any] = {}
        for codec in ("json", "cbor"):
            streams = ours_case.transport(place, codec=codec)
            channel = RPCChannel(await stack.enter_async_context(streams))
            echoes[codec] = (await stack.enter_async_context(channel)).get_api().echo
        kinds: dict[str, tuple[int, Callable[[Any], Awaitable[Any]], Any]] = {}
        for mebibytes in (1, 15):
            size = mebibytes * MEBIBYTE
            text, data = "x" * size, os.urandom(size)
            kinds[f"limit, {mebibytes} MiB"] = (size, limit.call, text)
            kinds[f"text, {mebibytes} MiB"] = (size, echoes["json"], text)
            kinds[f"bytes in cbor, {mebibytes} MiB"] = (size, echoes["cbor"], data)
            if mebibytes == 1:  # more of it is larger than a message may be
                encoded = base64.b64encode(data).decode()
                kinds["bytes in json, 1 MiB"] = (size, echoes["json"], encoded)
        rounds: list[Found] = []
        for _ in range(LARGE_ROUNDS):
            rounds.append({})
            for name, (size, call, value) in kinds.items():
                rate = await _rate(lambda call=call, value=value: call(value), LARGE_SECONDS)
                rounds[-1][name] = size * rate / 1e6
    return medians(rounds)


async def streams(place: Place, pid: int, server: int) -> Found:
    """Items/s of one stream of small items."""
    async with ours_case.transport(place) as streams, RPCChannel(streams) as channel:
        api = channel.get_api()
        async for _ in await api.count(100):
            pass
        start, received = time.perf_counter(), 0
        async for _ in await api.count(ITEMS):
            received += 1
        assert received == ITEMS
        return {"items/s": ITEMS / (time.perf_counter() - start)}


async def flood(place: Place, pid: int, server: int) -> Found:
    """Calls/s with 64 in flight, and CPU microseconds per call."""
    async with ours_case.connect(place) as client:
        for _ in range(200):
            await client.call(PAYLOAD)
        ids = (os.getpid(), pid, server)
        before = [cpu(one) for one in ids]
        done, start = 0, time.perf_counter()

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < start + SECONDS:
                await client.call(PAYLOAD)
                done += 1

        async with anyio.create_task_group() as group:
            for _ in range(IN_FLIGHT):
                group.start_soon(caller)
        elapsed = time.perf_counter() - start
        used = [(cpu(one) - then) / done * 1e6 for one, then in zip(ids, before, strict=True)]
        return {
            "calls/s": done / elapsed,
            **dict(zip(("client us", "worker us", "server us"), used, strict=True)),
            "server busy": used[2] * done / elapsed / 1e6,
        }


async def memory(place: Place, pid: int, server: int) -> Found:
    """Bytes per call that waits, and of a task that waits for an event alone."""
    async with ours_case.connect(place) as client:
        await client.call(PAYLOAD)
        found = {}
        never = anyio.Event()

        async def bare() -> None:
            await never.wait()

        async def calls() -> None:
            await client.call(PAYLOAD)

        os.kill(pid, 19)  # SIGSTOP: the worker answers nothing meanwhile
        try:
            for name, function in (("a task", bare), ("a call", calls)):
                gc.collect()
                tracemalloc.start()
                async with anyio.create_task_group() as group:
                    before = tracemalloc.get_traced_memory()[0]
                    for _ in range(CALLS):
                        group.start_soon(function)
                    await anyio.wait_all_tasks_blocked()
                    await anyio.sleep(1)
                    gc.collect()
                    found[name] = (tracemalloc.get_traced_memory()[0] - before) / CALLS
                    group.cancel_scope.cancel()
                tracemalloc.stop()
        finally:
            os.kill(pid, 18)  # SIGCONT
    return found


async def idle(place: Place, pid: int, server: int) -> Found:
    """Share of a core of an idle client and an idle worker; commands a second of both."""
    from redis import Redis  # its asyncio client can't be used on trio

    async with ours_case.connect(place) as client:
        await client.call(PAYLOAD)
        redis = Redis(port=place.port)

        def commands() -> int:
            stats = redis.info("commandstats")
            blocking = ("cmdstat_xread", "cmdstat_xreadgroup", "cmdstat_info")
            return sum(int(one["calls"]) for name, one in stats.items() if name not in blocking)

        ids = (os.getpid(), pid)
        counted, before = commands(), [cpu(one) for one in ids]
        start = time.perf_counter()
        await anyio.sleep(IDLE)
        elapsed = time.perf_counter() - start
        used = [(cpu(one) - then) / elapsed for one, then in zip(ids, before, strict=True)]
        return {
            "client": used[0],
            "worker": used[1],
            "commands/s of both": (commands() - counted) / elapsed,
        }


async def first(place: Place, pid: int, server: int) -> Found:
    """Milliseconds to connect, and to the answer of the first call after that."""
    start = time.perf_counter()
    async with ours_case.transport(place) as streams, RPCChannel(streams) as channel:
        connected = time.perf_counter()
        await channel.get_api().echo(PAYLOAD)
        return {"connect ms": (connected - start) * 1e3, "call ms": _since(connected) * 1e3}


async def _rate(call: Callable[[], Awaitable[Any]], seconds: float) -> float:
    await call()
    done, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        await call()
        done += 1
    return done / _since(start)


def _since(start: float) -> float:
    return time.perf_counter() - start


# In the process that asks for them


def measure(
    name: str, backend: str, redis: RedisServer, *, kind: str = "group", workers: int = 1
) -> Found:
    """Run one measure in a process of its own, with so many workers."""
    place = Place(redis.port, f"bench-{time.monotonic_ns()}", kind)
    with ExitStack() as stack:
        pids = [stack.enter_context(worker("ours", backend, place)) for _ in range(workers)]
        if name == "large":
            there = place._replace(name=f"{place.name}-limit")
            stack.enter_context(worker("limit", backend, there))
        return _client(name, backend, place, pids[0], redis.pid)


def _client(name: str, backend: str, place: Place, pid: int, server: int) -> Found:
    more = (json.dumps(place), str(pid), str(server))
    command = [sys.executable, "-m", __spec__.name, name, backend, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    found: Found = json.loads(done.stdout)
    return found


@contextmanager
def idle_peers(place: Place, backend: str, count: int) -> Iterator[None]:
    """So many peers on a stream, in a process of their own, that do nothing."""
    more = (json.dumps(place), str(count), "0")
    command = [sys.executable, "-m", __spec__.name, "peers", backend, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


async def peers(place: Place, count: int, server: int) -> Found:
    """Attach so many peers that do nothing."""
    async with anyio.create_task_group() as group:

        async def one(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            async with ours_case.connect(place):
                task_status.started()
                await anyio.sleep_forever()

        for _ in range(count):
            await group.start(one)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
    return {}


def with_peers(backend: str, redis: RedisServer, kind: str, rounds: int) -> tuple[Found, Found]:
    """Return the flood alone and with idle peers, interleaved."""
    alone, among = [], []
    for _ in range(rounds):
        for found, count in ((alone, 0), (among, PEERS)):
            place = Place(redis.port, f"bench-{time.monotonic_ns()}", kind)
            with worker("ours", backend, place) as pid, ExitStack() as stack:
                if count:
                    stack.enter_context(idle_peers(place, backend, count))
                found.append(_client("flood", backend, place, pid, redis.pid))
    return medians(alone), medians(among)


def imports() -> Found:
    """Milliseconds that imports take, one after the other in one process.

    AnyIO imports most of itself when it is used, so its event loop is imported with it.
    """
    code = "import time; print(time.perf_counter())"
    steps = {
        "AnyIO ms": "import anyio",
        "its loop ms": "import anyio._backends._asyncio",
        "transport ms": "from anyio_kkrpc.redis import RedisStreamsTransport",
    }
    # Installed packages are compiled.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    for step in steps.values():
        code += f"; {step}; print(time.perf_counter())"
    rounds = []
    for _ in range(7):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
        times = [float(line) * 1e3 for line in done.stdout.split()]
        spans = [end - start for start, end in pairwise(times)]
        rounds.append(dict(zip(steps, spans, strict=True)))
    found = medians(rounds)
    alone, with_loop = found["AnyIO ms"], found["AnyIO ms"] + found["its loop ms"]
    all_of_it = with_loop + found["transport ms"]
    return found | {"times AnyIO": all_of_it / with_loop, "times AnyIO alone": all_of_it / alone}


def medians(rounds: list[Found]) -> Found:
    """Return the median of each figure."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def report(backends: list[str], redis: RedisServer, rounds: int) -> Iterator[tuple[str, Found]]:
    """Measure one after the other; give the figures and what they are of."""
    yield "import", imports()
    for backend in backends:
        for name in ("first", "streams", "large", "memory", "idle"):
            some = [measure(name, backend, redis) for _ in range(1 if name == "idle" else rounds)]
            yield f"{name}, {backend}", medians(some)
        for count in (1, 2, 4):
            some = [measure("flood", backend, redis, workers=count) for _ in range(rounds)]
            yield f"{count} workers, {backend}", medians(some)
        for kind in (*ours_case.KINDS, "kkrpc-2"):
            alone, among = with_peers(backend, redis, kind, rounds)
            yield f"no idle peers, {kind}, {backend}", alone
            yield f"{PEERS} idle peers, {kind}, {backend}", among


if __name__ == "__main__":
    _name, _backend, _place, _pid, _server = sys.argv[1:]
    _where = Place(*json.loads(_place))
    _result = run(_backend, globals()[_name], _where, int(_pid), int(_server))
    sys.stdout.write(json.dumps(_result))
