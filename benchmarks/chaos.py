"""Everything goes wrong at once, and nothing may be lost: ``python -m benchmarks.chaos``.

Worker processes are killed and replaced, connections are cut, and the server (AOF ``always``) is
killed and started again, while clients call. Each handler run is a line in its worker's file, each
outcome one in its client's. At the end both are compared, and one line of counts is printed:

- ``unanswered``: calls without an outcome;
- ``invented``: results that no run produced;
- ``unexplained``: requests that ran more than once although no worker that ran them was killed and
  none was claimed (``attempt`` 1 in each run);
- ``failed``: calls that ended in an error other than a timeout or a dead letter;
- ``timeouts`` and ``given_up``: calls that ended in these errors, which is allowed.

The exit code is 0 only if the first four are 0.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import anyio

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    RPCTimeoutError,
    current_call,
    serve_until_signalled,
)
from anyio_kkrpc.testing import RedisServer

STREAM = "chaos"
CLAIM_IDLE = 2.0
OPTIONS = {
    "stream": STREAM,
    "use_consumer_group": True,
    "claim_idle": CLAIM_IDLE,
    "block_timeout": 1.0,
    "health_check_interval": 1.0,
    "max_deliveries": 20,
}


class Api:
    def __init__(self, ledger: Path) -> None:
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._random = random.Random()

    async def work(self, key: str) -> str:
        """Note the run, take a while, and return what proves it."""
        proof = f"{self._random.getrandbits(64):x}"
        os.write(self._ledger, f"{key} {proof} {os.getpid()} {current_call().attempt}\n".encode())
        await anyio.sleep(self._random.random() * 0.05)
        return proof


async def work(url: str, ledger: str) -> None:
    async with (
        RedisStreamsTransport(url, **OPTIONS) as transport,
        RPCChannel(transport, expose=Api(Path(ledger)), grace_period=2) as channel,
    ):
        await serve_until_signalled(channel)


async def call(url: str, ledger: str, seconds: str, name: str) -> None:
    """Make calls for some time, 20 at once; note what is asked and what comes of it."""
    with Path(ledger).open("a", buffering=1) as file:
        async with (
            RedisStreamsTransport(url, **OPTIONS) as transport,
            RPCChannel(transport, timeout=30) as channel,
            anyio.create_task_group() as group,
        ):
            end = anyio.current_time() + float(seconds)

            async def caller(lane: int) -> None:
                number = 0
                while anyio.current_time() < end:
                    number += 1
                    key = f"{name}-{lane}-{number}"
                    file.write(f"asked {key} -\n")
                    try:
                        outcome = f"result {key} {await channel.get_api().work(key)}"
                    except RPCTimeoutError:
                        outcome = f"timeout {key} -"
                    except DeliveryError:
                        outcome = f"given_up {key} -"
                    except Exception as exc:
                        outcome = f"failed {key} {type(exc).__name__}:{str(exc).replace(' ', '_')}"
                    file.write(outcome + "\n")

            for lane in range(20):
                group.start_soon(caller, lane)


class Chaos:
    """The processes, and what happens to them."""

    def __init__(self, folder: Path, backend: str, seed: int) -> None:
        self.folder = folder
        self.backend = backend
        self.random = random.Random(seed)
        self.workers: list[subprocess.Popen[bytes]] = []
        self.killed: set[int] = set()
        self.events: Counter[str] = Counter()

    def spawn(self, role: str, *args: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.chaos", "--role", role, self.backend, *args]
        log = (self.folder / "log").open("ab")
        with log:
            return subprocess.Popen(command, stderr=log)

    def start_worker(self, url: str) -> None:
        self.events["workers"] += 1
        ledger = self.folder / f"run-{self.events['workers']}"
        self.workers.append(self.spawn("work", url, str(ledger)))

    def kill_worker(self) -> None:
        worker = self.workers.pop(self.random.randrange(len(self.workers)))
        worker.kill()
        worker.wait()
        self.killed.add(worker.pid)
        self.events["kills"] += 1

    def cut(self, url: str) -> None:
        import redis

        try:
            with redis.Redis.from_url(url, socket_timeout=2) as client:
                clients = [c for c in client.client_list() if c["name"].startswith("anyio_kkrpc")]
                for victim in self.random.sample(clients, min(3, len(clients))):
                    client.client_kill_filter(_id=victim["id"])
                    self.events["cuts"] += 1
        except redis.RedisError:
            pass

    def judge(self) -> dict[str, int]:
        """Compare what was asked with what ran."""
        runs: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
        for path in self.folder.glob("run-*"):
            for line in path.read_text().splitlines():
                key, proof, pid, attempt = line.split()
                runs[key].append((proof, int(pid), int(attempt)))
        counts: Counter[str] = Counter()
        outcomes: dict[str, tuple[str, str]] = {}
        asked = set()
        for path in self.folder.glob("call-*"):
            for line in path.read_text().splitlines():
                kind, key, what = line.split()
                if kind == "asked":
                    asked.add(key)
                else:
                    outcomes[key] = (kind, what)
        for key in asked:
            kind, what = outcomes.get(key, ("unanswered", ""))
            counts[kind] += 1
            if kind == "result" and what not in [proof for proof, _, _ in runs[key]]:
                counts["invented"] += 1
            if kind == "failed":
                print(f"failed: {key} {what}")
        for key, found in runs.items():
            explained = any(pid in self.killed or attempt > 1 for _, pid, attempt in found)
            if len(found) > 1:
                counts["twice"] += 1
                if not explained:
                    counts["unexplained"] += 1
                    print(f"unexplained: {key} {found}")
        names = ("result", "unanswered", "invented", "unexplained", "failed", "timeout", "given_up")
        return {"calls": len(asked), **{name: counts[name] for name in (*names, "twice")}}


def run(seconds: float, backend: str, seed: int, restarts: int) -> bool:
    """Make chaos for some time; print the counts, and return whether they are as they must be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chaos = Chaos(folder, backend, seed)
        args = ["--appendonly", "yes", "--appendfsync", "always", "--dir", name]
        with RedisServer(args=args) as server:
            for _ in range(4):
                chaos.start_worker(server.url)
            clients = [
                chaos.spawn("call", server.url, str(folder / f"call-{n}"), str(seconds), f"c{n}")
                for n in range(3)
            ]
            started = time.monotonic()
            next_kill, next_restart = 2.0, seconds / (restarts + 1)
            while (now := time.monotonic() - started) < seconds:
                time.sleep(0.2 + 0.3 * chaos.random.random())
                chaos.cut(server.url)
                if now > next_kill:
                    next_kill += 2.0
                    chaos.kill_worker()
                    chaos.start_worker(server.url)
                if now > next_restart:
                    next_restart += seconds / (restarts + 1)
                    server.kill()
                    time.sleep(0.3)
                    server.start()
                    chaos.events["restarts"] += 1
            for client in clients:
                client.wait(timeout=90)
            for worker in chaos.workers:
                worker.terminate()
            for worker in chaos.workers:
                worker.wait(timeout=30)
        result = chaos.judge()
        text = " ".join(f"{key}={value}" for key, value in {**result, **chaos.events}.items())
        print(f"{backend}: {text}")
        bad = [result[key] for key in ("unanswered", "invented", "unexplained", "failed")]
        if any(bad):
            print((folder / "log").read_text()[-4000:])
        return result["result"] > 0 and not any(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--restarts", type=int, default=3)
    options = parser.parse_args()
    return 0 if run(options.seconds, options.backend, options.seed, options.restarts) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        role, backend, *args = sys.argv[2:]
        anyio.run({"work": work, "call": call}[role], *args, backend=backend)
        sys.exit(0)
    sys.exit(main())
