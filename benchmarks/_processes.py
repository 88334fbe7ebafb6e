"""Client and worker as processes of their own, and what they used.

``python -m benchmarks._processes ROLE CASE BACKEND PLACE PLAN`` is what such a process runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import anyio

from .cases import IN_FLIGHT, PAYLOAD, Place, free_port, load

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


class Plan(NamedTuple):
    """How much one round measures."""

    rounds: int
    sequential: float
    in_flight: float
    warm_up: int


class Round(NamedTuple):
    """What one round found: seconds, calls a second, CPU seconds per 10,000 calls."""

    p50: float
    p99: float
    in_flight: float
    client: float
    worker: float
    server: float


class Failed(Exception):
    """A case that could not be measured."""


def cpu(pid: int) -> float:
    """Return the CPU seconds that a process has used; 0 where the system doesn't tell."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Linux' id of the clock of another process
    except OSError:
        return 0.0


@contextmanager
def worker(case: str, backend: str, place: Place, python: str = sys.executable) -> Iterator[int]:
    """A worker process that is ready; gives its id."""
    command = [python, *_command("worker", case, backend, place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise Failed("its worker did not start")
            yield process.pid
        finally:
            process.kill()


def measure(
    case: str,
    backend: str,
    kind: str,
    redis: tuple[int, int],
    plan: Plan,
    name: str,
    python: str,
) -> Round:
    """Run one round: a worker and a client, each a process.

    :param redis: port and process id of the server that all share who use Redis
    :param python: what runs the two
    :raises Failed: if one of them doesn't start, fails, or takes two minutes
    """
    module = load(case)
    with ExitStack() as stack:
        port, server = redis
        if hasattr(module, "server"):
            port, server = stack.enter_context(module.server())
        elif getattr(module, "DIRECT", False):
            port, server = free_port(), 0
        place = Place(port, name, kind)
        pid = stack.enter_context(worker(case, backend, place, python))
        command = [python, *_command("client", case, backend, place, *plan, pid, server)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, timeout=120
            )
        except subprocess.CalledProcessError:
            raise Failed("its client failed") from None
        except subprocess.TimeoutExpired:
            raise Failed("its client took two minutes") from None
    return Round(*json.loads(done.stdout))


def run(backend: str, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """Run a function on one of the three backends."""
    loop, options = LOOPS[backend]
    return anyio.run(function, *arguments, backend=loop, backend_options=options)


def _command(role: str, case: str, backend: str, place: Place, *more: Any) -> list[str]:
    here = ["-m", __spec__.name, role, case, backend]
    return [*here, json.dumps(place), json.dumps(more)]


async def _client(case: str, place: Place, plan: Plan, pid: int, server: int) -> Round:
    async with load(case).connect(place) as client:
        call = client.call
        for _ in range(plan.warm_up):
            await call(PAYLOAD)
        times = []
        end = time.perf_counter() + plan.sequential
        while (start := time.perf_counter()) < end:
            await call(PAYLOAD)
            times.append(time.perf_counter() - start)

        async def flood(window: int, seconds: float) -> int:
            done = 0
            end = time.perf_counter() + seconds

            async def caller() -> None:
                nonlocal done
                while time.perf_counter() < end:
                    await call(PAYLOAD)
                    done += 1

            async with anyio.create_task_group() as group:
                for _ in range(window):
                    group.start_soon(caller)
            return done

        flood = client.flood or flood
        await flood(IN_FLIGHT, 0.1)
        ids = (os.getpid(), pid, server)
        before = [one and cpu(one) for one in ids]
        start = time.perf_counter()
        done = await flood(IN_FLIGHT, plan.in_flight)
        elapsed = time.perf_counter() - start
        used = [one and cpu(one) - then for one, then in zip(ids, before, strict=True)]
        times.sort()
        return Round(
            times[len(times) // 2],
            times[len(times) * 99 // 100],
            done / elapsed,
            *(seconds / done * 10_000 for seconds in used),
        )


def _ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _main(role: str, case: str, backend: str, place: str, more: str) -> None:
    where = Place(*json.loads(place))
    if role == "worker":
        run(backend, load(case).serve, where, _ready)
        return
    *plan, pid, server = json.loads(more)
    found = run(backend, _client, case, where, Plan(*plan), pid, server)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
