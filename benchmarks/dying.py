"""What ``serve`` does when something of it dies: ``python -m benchmarks.dying [asyncio] [trio]``.

For each way of dying there is a service of its own, with two workers, on a server of its own. What
is told is what the service said, and the seconds until the next call was answered, made at that
moment; or until the service was over, its exit code, and how many of its processes were left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
from anyio import to_thread

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, RPCError
from anyio_kkrpc.testing import RedisServer

API = """
import os
import signal

import anyio

from anyio_kkrpc import current_call


class Api:
    def pid(self) -> int:
        return os.getpid()

    async def busy(self) -> int:
        await anyio.sleep(1)
        return os.getpid()

    def die(self, code: int) -> str:
        if current_call().attempt == 1:
            os._exit(code)
        return "answered by the next one"

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
"""
WORKERS = 2
CALLS = 8
WITHIN = 60.0


class Service:
    """A service that runs, and a client of it.

    :ivar said: lines of the service since it served
    """

    def __init__(self, url: str, process: subprocess.Popen[str], log: Path, api: Any) -> None:
        self.url = url
        self.process = process
        self._log = log
        self._begun = len(log.read_text())
        self.api = api
        self.workers: set[int] = set()
        self.seconds: float | None = None
        self.result = ""

    @property
    def said(self) -> list[str]:
        lines = self._log.read_text()[self._begun :].splitlines()
        return [line.removeprefix("anyio-kkrpc: ") for line in lines if line.startswith("anyio-")]

    async def find_workers(self) -> None:
        while len(self.workers) < WORKERS:
            self.workers.add(await self.api.pid())

    async def next_answer(self) -> None:
        """Note how long the next call takes."""
        begun = monotonic()
        await self.api.pid()
        self.seconds = monotonic() - begun

    async def over(self) -> None:
        """Note how long it takes until all processes are gone."""
        begun = monotonic()
        await to_thread.run_sync(self.process.wait, WITHIN)
        while (left := sum(map(_lives, self.workers))) and monotonic() - begun < WITHIN:
            await anyio.sleep(0.01)
        self.seconds = monotonic() - begun
        self.result = f"over, exit code {self.process.returncode}, {left} processes left"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def exits(service: Service, code: int) -> None:
    async with anyio.create_task_group() as group:

        async def die() -> None:
            begun = monotonic()
            answer = await service.api.die(code)
            service.result = f"the call itself: {answer} after {monotonic() - begun:.2f} s"

        group.start_soon(die)
        await anyio.sleep(0.1)
        await service.next_answer()


async def worker_gets(service: Service, number: signal.Signals) -> None:
    """End a worker while calls run, by halves in each of both."""
    begun = monotonic()
    async with anyio.create_task_group() as group:
        for _ in range(CALLS):
            group.start_soon(service.api.busy)
        await anyio.sleep(0.5)
        os.kill(min(service.workers), number)
        killed = monotonic()
        await service.next_answer()
    service.result = (
        f"{CALLS} calls of 1 s that ran: all answered, the last {monotonic() - killed:.2f} s after "
        f"that, {monotonic() - begun:.2f} s after they were made"
    )


async def reloads(service: Service) -> None:
    """Exchange the workers while calls run."""
    before, answers = set(service.workers), 0
    service.process.send_signal(signal.SIGHUP)
    await service.next_answer()
    longest, end = 0.0, False

    async def call() -> None:
        nonlocal answers, longest
        while not end:
            begun = monotonic()
            service.workers.add(await service.api.busy())
            longest = max(longest, monotonic() - begun)
            answers += 1

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(call)
        with anyio.fail_after(WITHIN):
            while not any("the workers are new" in line for line in service.said):
                await anyio.sleep(0.05)
        end = True
    gone = not any(map(_lives, before))
    service.result = (
        f"{answers} calls of 1 s meanwhile, none lost, the longest took {longest:.2f} s; "
        f"the former workers are {'gone' if gone else 'THERE'}"
    )


async def supervisor_gets(service: Service, number: signal.Signals) -> None:
    async with anyio.create_task_group() as group:
        busy = "not answered"

        async def call() -> None:
            nonlocal busy
            try:
                await service.api.busy()
                busy = "answered"
            except RPCError as exc:
                busy = type(exc).__name__

        group.start_soon(call)
        await anyio.sleep(0.3)
        service.process.send_signal(number)
        await service.over()
    service.result += f"; a call of 1 s that ran then was {busy}"


async def destroyed(service: Service) -> None:
    async with RedisStreamsTransport(
        service.url, stream="dying", honor_destroy_signal=False
    ) as transport:
        await transport.signal_destroy()
    await service.over()


async def poisoned(service: Service) -> None:
    """A call that kills whoever runs it, and others meanwhile."""
    longest, end = 0.0, ""

    async with anyio.create_task_group() as group:

        async def kill() -> None:
            nonlocal end
            begun = monotonic()
            try:
                await service.api.kill()
            except RPCError as exc:
                end = f"{type(exc).__name__} after {monotonic() - begun:.1f} s"

        group.start_soon(kill)
        while not end:
            begun = monotonic()
            await service.api.pid()
            longest = max(longest, monotonic() - begun)
            await anyio.sleep(0.05)
        await service.next_answer()
    service.result = f"the call itself: {end}; other calls meanwhile took {longest:.2f} s at most"


Way = Callable[[Service], Awaitable[None]]
WAYS: dict[str, Way] = {
    "a handler calls os._exit(0)": lambda service: exits(service, 0),
    "a handler calls os._exit(2)": lambda service: exits(service, 2),
    "SIGTERM of one worker": lambda service: worker_gets(service, signal.SIGTERM),
    "kill -9 of one worker": lambda service: worker_gets(service, signal.SIGKILL),
    "SIGHUP of the supervisor": reloads,
    "SIGTERM of the supervisor": lambda service: supervisor_gets(service, signal.SIGTERM),
    "SIGINT of the supervisor": lambda service: supervisor_gets(service, signal.SIGINT),
    "kill -9 of the supervisor": lambda service: supervisor_gets(service, signal.SIGKILL),
    "a destroy signal": destroyed,
    "a request that kills each worker that runs it": poisoned,
}
POISON = "a request that kills each worker that runs it"


def start(url: str, folder: Path, target: str, *more: str) -> tuple[subprocess.Popen[str], Path]:
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                sys.executable,
                *f"-m anyio_kkrpc serve {target} -g w -s dying -w {WORKERS}".split(),
                *more,
            ],
            cwd=folder,
            env={**os.environ, "ANYIO_KKRPC_URL": url},
            stderr=stream,
            text=True,
        )
    return process, log


@asynccontextmanager
async def running(folder: Path, *more: str) -> AsyncIterator[Service]:
    (folder / "dying.py").write_text(API)
    with RedisServer() as server:
        process, log = start(server.url, folder, "dying:Api", *more)
        try:
            with anyio.fail_after(WITHIN):
                while log.read_text().count(": serving ") < WORKERS:
                    await anyio.sleep(0.05)
            async with (
                RedisStreamsTransport(
                    server.url, stream="dying", use_consumer_group=True, consumer_group="w",
                    honor_destroy_signal=False,
                ) as transport,
                RPCChannel(transport, timeout=WITHIN) as channel,
            ):  # fmt: skip
                service = Service(server.url, process, log, channel.get_api())
                await service.find_workers()
                yield service
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(WITHIN)


async def run(what: str, way: Way, *more: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with running(Path(folder), *more) as service:
            await way(service)
            if service.process.poll() is None and what != POISON:
                with anyio.move_on_after(WITHIN):
                    while not any(": serving " in f": {line}" for line in service.said):
                        await anyio.sleep(0.05)
            said = [
                line for line in service.said if "serving" not in line and "ended (" not in line
            ]
            tell(what, [*said, service.result], service.seconds)


def fail_to_start(more: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as name, RedisServer() as server:
        folder = Path(name)
        (folder / "broken.py").write_text("raise ImportError('no such thing')\n")
        begun = monotonic()
        process, log = start(server.url, folder, "broken:Api", *more)
        code = process.wait(WITHIN)
        lines = log.read_text().splitlines()
        said = [*dict.fromkeys(line.removeprefix("anyio-kkrpc: ") for line in lines)]
        over = f"over, exit code {code}"
        tell("a first start that fails for all", [*said, over], monotonic() - begun)


def tell(what: str, said: list[str], seconds: float | None) -> None:
    text = "; ".join(filter(None, said))
    print(f"| {what} | {text} | {'' if seconds is None else f'{seconds:.2f}'} |", flush=True)


def main() -> None:
    for backend in sys.argv[1:] or ["asyncio", "trio"]:
        print(
            f"\n| {backend}: what died | what the service did | s to the next answer, or its end |"
        )
        print("| --- | --- | ---: |")
        for what, way in WAYS.items():
            more = ["--backend", backend, "--concurrency", str(CALLS // WORKERS)]
            if what == POISON:  # on defaults the pauses between its deliveries take minutes
                more += ["--max-deliveries", "3", "--claim-idle", "1"]
            anyio.run(run, what, way, *more)
        fail_to_start(("--backend", backend))


if __name__ == "__main__":
    main()
