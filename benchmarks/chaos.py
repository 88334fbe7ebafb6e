"""Everything goes wrong at once, and nothing may be lost: ``python -m benchmarks.chaos``.

Clients call, and cancel a third of their calls; they read streams, pass callbacks and large
payloads. Meanwhile workers are killed or told to end, and replaced, or stopped for a while,
connections are cut, the server is paused, stopped, and killed and started again (AOF ``always``).
Each run of a handler and its end is a line in its worker's file, each outcome one in its client's.
At the end they are compared, what is wrong is told call by call, and one line of counts is printed:

- ``unanswered``: calls without an outcome;
- ``late``: outcomes more than ``--slack`` (1 s) after their deadline, or after a cancel;
- ``overrun``: handlers that ran on for longer than that after their caller had cancelled;
- ``invented``: results that no run produced, streams and payloads that aren't as they were sent;
- ``unheard``: callbacks of the run that was answered which hadn't come before its result;
- ``unexplained``: requests of a group that ran more than once although nothing happened to a worker
  that ran them and none was claimed (``attempt`` 1 in each run);
- ``failed``: calls that ended in an error other than a timeout, a dead letter or a stream's source
  that is gone;
- ``left``: keys, consumers and pending entries in Redis after all have ended.

In a group some calls have keys that several callers use at about the same time:

- ``unequal``: keys for which callers got different results;
- ``rerun``: runs that began after somebody had the result of their key. A process that was stopped
  just then, or got no processor, may have asked before.

With ``--topology sentinel`` or ``cluster`` there are several servers, without persistence: masters
are killed, stopped, and made replicas, in a Cluster the slot moves key by key. A writer beside the
callers adds entries: ``written`` tells how many were acknowledged, ``missing`` how many of them the
next masters didn't have. Cancels and acknowledgements are lost as well: what ran on both sides of
that is neither ``unexplained`` nor ``overrun``. So are callbacks that had been accepted: calls that
miss some are ``lost_callbacks`` then, not ``unheard``. A result that the next master lacks, so that
its key runs again, is one of ``lost_results``, and neither ``unequal`` nor a ``rerun``.

The exit code is 0 only if these are 0. ``timeout`` and ``given_up`` are calls that ended in these
errors, which is allowed. Time in which the caller, the server or the worker was stopped, paused or
got no processor doesn't count for ``late`` and ``overrun``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import redis

from anyio_kkrpc import (
    DeliveryError,
    RedisStreamsTransport,
    RPCChannel,
    RPCTimeoutError,
    current_call,
    serve_until_signalled,
    with_call_options,
)
from anyio_kkrpc.testing import RedisServer
from tests.topologies import ClusterSetup, Node, SentinelSetup, TopologyError

STREAM = "chaos"
CLAIM_IDLE = 2.0
INBOX_TTL = 10.0
OPTIONS: dict[str, Any] = {
    "stream": STREAM,
    "claim_idle": CLAIM_IDLE,
    "block_timeout": 1.0,
    "health_check_interval": 1.0,
    "max_deliveries": 20,
    "inbox_ttl": INBOX_TTL,
}
# Seconds that a call waits, and that one which is cancelled would last.
TIMEOUT = 30.0
LONG = 10.0
# Seconds after which peers have found a server that is back.
RETURN = 2.0
# A process whose loop doesn't turn for so long got no processor.
_LAG = 0.2
LANES = {"group": 20, "broadcast": 6}
WRONG = ["unanswered", "late", "overrun", "invented", "unheard", "unexplained", "failed", "left"]
WRONG += ["unequal", "rerun"]
# Seconds for which results are kept: longer than all of it lasts.
KEEP = 3600.0
# Keys that are in use at a time, and for how many seconds each is.
KEYS, WINDOW = 4, 0.5

EVENTS = [
    "workers",
    "ended",
    "kills",
    "terms",
    "stops",
    "server_stops",
    "pauses",
    "restarts",
    "cuts",
]


class Ledger:
    """A file of one process, with a line for each thing that happened, and when."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, **more: Any) -> None:
        line = {"what": what, "at": time.time(), "pid": os.getpid(), **more}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    async def watch(self) -> None:
        """Note when this process got no processor, or was stopped."""
        while True:
            before = time.time()
            await anyio.sleep(_LAG / 4)
            if time.time() - before > _LAG:
                self.note("lag", since=before)


class Api:
    """What is called; each run has a proof that nobody could invent."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._random = random.Random()

    def _begin(self, key: str) -> str:
        proof = f"{self._random.getrandbits(64):x}"
        self._ledger.note("run", key=key, proof=proof, attempt=current_call().attempt)
        return proof

    async def work(self, key: str) -> str:
        proof = self._begin(key)
        await anyio.sleep(self._random.random() * 0.05)
        return proof

    async def once(self, key: str) -> str:
        """Run once for all who ask."""
        proof = self._begin(key)
        await anyio.sleep(self._random.random() * 0.2)
        return proof

    async def cancelled(self, key: str) -> None:
        """Be cancelled: nobody waits for so long."""
        proof = self._begin(key)
        try:
            await anyio.sleep(LONG)
        finally:
            self._ledger.note("end", key=key, proof=proof)

    async def large(self, key: str, payload: str) -> list[str]:
        return [self._begin(key), payload[::-1]]

    async def tell(self, key: str, count: int, callback: Callable[..., Awaitable[None]]) -> str:
        proof = self._begin(key)
        for number in range(count):
            await callback(proof, number)
        return proof

    async def items(self, key: str, count: int, size: int) -> AsyncIterator[list[Any]]:
        proof = self._begin(key)
        for number in range(count):
            yield [proof, number, "x" * size]

    async def total(self, key: str, numbers: AsyncIterator[int]) -> list[Any]:
        proof = self._begin(key)
        return [proof, sum([number async for number in numbers])]


class Wrong(Exception):
    """What came is not what was sent."""


class Caller:
    """Makes calls of all kinds, one after the other."""

    def __init__(self, channel: RPCChannel, ledger: Ledger, name: str, *, keyed: bool) -> None:
        self._keyed = keyed
        self._api = with_call_options(channel.get_api(), timeout=TIMEOUT)
        self._ledger = ledger
        self._name = name
        self._random = random.Random(name)
        self._number = 0
        # When the present call has to have moved on.
        self._due = 0.0

    async def run(self, end: float) -> None:
        kinds = [self._cancel] * 8 + [self._work] * 8
        kinds += [self._large] * 2 + [self._tell] * 3 + [self._items] * 3 + [self._total] * 2
        kinds += [self._once] * (8 if self._keyed else 0)
        while anyio.current_time() < end:
            await self._one(self._random.choice(kinds))

    async def _one(self, kind: Callable[[str], Awaitable[dict[str, Any]]]) -> None:
        self._number += 1
        key = f"{self._name}-{self._number}"
        self._ledger.note("asked", key=key, kind=kind.__name__)
        self._due = time.time() + TIMEOUT
        found: dict[str, Any] = {}
        try:
            found = await kind(key)
            outcome = found.pop("outcome", "result")
        except RPCTimeoutError:
            outcome = "timeout"
        except Exception as exc:
            # A handler may be told that the stream that it reads can't be had.
            given_up = isinstance(exc, DeliveryError) or str(exc).startswith("DeliveryError: ")
            given_up = given_up or "items of the stream were lost" in str(exc)
            outcome = "given_up" if given_up else "failed"
            found = {"error": f"{type(exc).__name__}: {exc}"}
        self._ledger.note(outcome, key=key, due=self._due, **found)

    async def _work(self, key: str) -> dict[str, Any]:
        return {"proof": await self._api.work(key)}

    async def _once(self, key: str) -> dict[str, Any]:
        shared = f"shared-{int(time.time() / WINDOW)}-{random.randrange(KEYS)}"
        api = with_call_options(self._api, key=shared, keep=KEEP)
        return {"proof": await api.once(shared), "shared": shared}

    async def _cancel(self, key: str) -> dict[str, Any]:
        with anyio.CancelScope() as scope:
            scope.deadline = anyio.current_time() + self._random.random() ** 2
            await self._api.cancelled(key)
        self._due = time.time() - max(anyio.current_time() - scope.deadline, 0.0)
        return {"outcome": "cancelled"}

    async def _large(self, key: str) -> dict[str, Any]:
        payload = f"{self._random.getrandbits(64):016x}" * self._random.choice((500, 5000, 50_000))
        proof, back = await self._api.large(key, payload)
        if back != payload[::-1]:
            raise Wrong("the payload")
        return {"proof": proof}

    async def _tell(self, key: str) -> dict[str, Any]:
        heard: defaultdict[str, list[int]] = defaultdict(list)
        count = self._random.randrange(1, 40)
        proof = await self._api.tell(key, count, lambda proof, number: heard[proof].append(number))
        return {"proof": proof, "unheard": len(set(range(count)) - set(heard[proof]))}

    async def _items(self, key: str) -> dict[str, Any]:
        count, size = self._random.choice(((5, 10), (100, 10), (20, 100_000)))
        leave_at = self._random.choice((None, None, count // 2))
        proofs, expected = set(), 0
        async with self._api.items(key, count, size) as items:
            async for proof, number, text in items:
                self._due = time.time() + TIMEOUT
                proofs.add(proof)
                if number != expected or len(text) != size:
                    raise Wrong(f"item {expected} is {number} of {len(text)}")
                expected += 1
                if expected == leave_at:
                    break
        if expected != (leave_at or count) or len(proofs) != 1:
            raise Wrong(f"{expected} items of {len(proofs)} runs")
        return {"proof": proofs.pop()}

    async def _total(self, key: str) -> dict[str, Any]:
        async def numbers() -> AsyncIterator[int]:
            for number in range(50):
                yield number

        proof, total = await self._api.total(key, numbers())
        if total != sum(range(50)):
            raise Wrong(f"the total {total}")
        return {"proof": proof}


async def work(url: str, mode: str, ledger: str) -> None:
    book = Ledger(ledger)
    async with (
        RedisStreamsTransport(url, use_consumer_group=mode == "group", **OPTIONS) as transport,
        RPCChannel(transport, expose=Api(book), grace_period=2) as channel,
        anyio.create_task_group() as group,
    ):
        group.start_soon(book.watch)
        book.note("ready")
        await serve_until_signalled(channel)
        group.cancel_scope.cancel()


async def call(url: str, mode: str, ledger: str, seconds: str, name: str) -> None:
    """Make calls for some time, several at once; note what is asked and what comes of it."""
    book = Ledger(ledger)
    async with (
        RedisStreamsTransport(url, use_consumer_group=mode == "group", **OPTIONS) as transport,
        RPCChannel(transport) as channel,
        anyio.create_task_group() as watching,
    ):
        watching.start_soon(book.watch)
        book.note("ready")
        end = anyio.current_time() + float(seconds)
        async with anyio.create_task_group() as group:
            for lane in range(LANES[mode]):
                caller = Caller(channel, book, f"{name}-{lane}", keyed=mode == "group")
                group.start_soon(caller.run, end)
        watching.cancel_scope.cancel()


class Outage(NamedTuple):
    """A time in which a process, or the server as pid 0, did nothing."""

    pid: int
    since: float
    until: float


class One:
    """One server, which keeps everything on its disk."""

    def __init__(self, folder: str) -> None:
        args = ["--appendonly", "yes", "--appendfsync", "always", "--dir", folder]
        self._server = RedisServer(args=args)
        self.happenings: list[Callable[[], str]] = []

    def __enter__(self) -> One:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int:
        return self._server.pid

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=5)

    def restart(self) -> None:
        self._server.kill()
        time.sleep(0.3)
        self._server.start()


class Several:
    """Masters and replicas; what happens to them returns what it was."""

    def __init__(self, kind: str) -> None:
        self._setup = ClusterSetup() if kind == "cluster" else SentinelSetup()
        self.happenings: list[Callable[[], str]] = [self._fail_over, self._freeze]
        if isinstance(self._setup, ClusterSetup):
            self.happenings.append(self._move)

    def __enter__(self) -> Several:
        self._setup.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._setup.stop()

    @property
    def url(self) -> str:
        return self._setup.url

    @property
    def pid(self) -> int:
        return self._master().pid

    def client(self) -> redis.Redis:
        return redis.Redis(port=self._master().port, socket_timeout=5)

    def restart(self) -> None:
        """Kill the master; it comes back as a replica of the next one."""
        master = self._master()
        master.kill()
        self._wait_other(master)
        self._setup.heal()

    def _master(self) -> Node:
        setup = self._setup
        return setup.owner(STREAM) if isinstance(setup, ClusterSetup) else setup.master()

    def _wait_other(self, master: Node) -> None:
        if isinstance(self._setup, ClusterSetup):
            self._setup.wait_owner(STREAM, master)
        else:
            self._setup.wait_master(master)

    def _fail_over(self) -> str:
        if isinstance(self._setup, ClusterSetup):
            self._setup.failover(STREAM, *random.choice(([], ["TAKEOVER"])))
        else:
            self._setup.failover()
        self._setup.heal()
        return "failovers"

    def _freeze(self) -> str:
        master = self._master()
        master.freeze()
        self._wait_other(master)
        self._setup.heal()
        return "master_stops"

    def _move(self) -> str:
        assert isinstance(self._setup, ClusterSetup)
        self._setup.move(STREAM, self._setup.stranger(STREAM), pause=0.01)
        return "moves"


class Writer(threading.Thread):
    """Adds entries beside the stream of the callers, and remembers which were acknowledged.

    As a context manager it ends with the block: a thread that goes on would keep the program.
    """

    KEY = f"{{{STREAM}}}:written"

    def __init__(self, servers: One | Several) -> None:
        super().__init__()
        self._servers = servers
        self._acknowledged: set[bytes] = set()
        self._ended = threading.Event()

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.is_set():
            with (
                suppress(redis.RedisError, OSError, TopologyError),
                self._servers.client() as client,
            ):
                while not self._ended.wait(0.005):
                    self._acknowledged.add(client.xadd(self.KEY, {"a": "b"}))

    def counted(self) -> tuple[int, int]:
        """Return how many were acknowledged, and how many of them aren't there; after its end."""
        with self._servers.client() as client:
            there = {entry for entry, _ in client.xrange(self.KEY)}
            client.delete(self.KEY)
        return len(self._acknowledged), len(self._acknowledged - there)


class Chaos:
    """The processes, and what happens to them. None of them outlives its block."""

    def __init__(self, folder: Path, servers: One | Several, mode: str, backend: str) -> None:
        self.folder = folder
        self.servers = servers
        self.mode = mode
        self.backend = backend
        self.random = random.Random()
        self.workers: list[subprocess.Popen[bytes]] = []
        self.leaving: list[subprocess.Popen[bytes]] = []
        # When a worker was killed, and those to which anything happened.
        self.killed: dict[int, float] = {}
        self.hurt: set[int] = set()
        self.outages: list[Outage] = []
        # When another server took over, which may not have the last entries.
        self.taken_over: list[Outage] = []
        self.events: Counter[str] = Counter(dict.fromkeys(EVENTS, 0))
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._all:
            process.kill()
            process.wait()

    def spawn(self, role: str, *args: str) -> subprocess.Popen[bytes]:
        arguments = [role, self.backend, self.servers.url, self.mode, *args]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos", "--role", *arguments], stderr=log
            )
        self._all.append(process)
        return process

    def start_worker(self) -> None:
        self.events["workers"] += 1
        self.workers.append(self.spawn("work", str(self.folder / f"run-{self.events['workers']}")))

    def one(self) -> subprocess.Popen[bytes]:
        worker = self.random.choice(self.workers)
        self.hurt.add(worker.pid)
        return worker

    def kill_worker(self) -> None:
        worker = self.one()
        self.workers.remove(worker)
        worker.kill()
        worker.wait()
        self.killed[worker.pid] = time.time()
        self.events["kills"] += 1
        self.start_worker()

    def end_worker(self) -> None:
        worker = self.one()
        self.workers.remove(worker)
        worker.terminate()
        self.leaving.append(worker)
        self.events["terms"] += 1
        self.start_worker()

    def stop_worker(self) -> None:
        worker, seconds = self.one(), self.random.choice((0.5, 1.5, CLAIM_IDLE + 1))
        self.freeze(worker.pid, worker.pid, seconds)
        self.events["stops"] += 1

    def stop_server(self) -> None:
        self.freeze(self.servers.pid, 0, self.random.choice((0.3, 1.0, 2.0)))
        self.events["server_stops"] += 1

    def freeze(self, pid: int, who: int, seconds: float) -> None:
        since = time.time()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        self.outages.append(Outage(who, since, time.time()))

    def pause_server(self) -> None:
        seconds, since = self.random.choice((0.3, 1.0)), time.time()
        with suppress(redis.RedisError), self.client() as client:
            client.execute_command("CLIENT", "PAUSE", int(seconds * 1000), "ALL")
            time.sleep(seconds)
            self.events["pauses"] += 1
        self.outages.append(Outage(0, since, time.time()))

    def restart_server(self) -> None:
        self.happen(self.servers.restart, "restarts")

    def happen(self, happening: Callable[[], str | None], what: str | None = None) -> None:
        """Let something happen to the servers, after which another one may be the master."""
        since = time.time()
        what = happening() or what
        outage = Outage(0, since, time.time() + RETURN)
        self.events[str(what)] += 1
        self.outages.append(outage)
        if self.servers.happenings:
            self.taken_over.append(outage)

    def cut(self) -> None:
        with suppress(redis.RedisError), self.client() as client:
            # Peers pause, up to a second, before they replace a connection that didn't last.
            clients = [
                one
                for one in client.client_list()
                if one["name"].startswith("anyio_kkrpc") and int(one["age"]) > RETURN
            ]
            for victim in self.random.sample(clients, min(3, len(clients))):
                client.client_kill_filter(_id=victim["id"])
                self.events["cuts"] += 1

    def client(self) -> redis.Redis:
        return self.servers.client()

    def run(self, seconds: float, restarts: int) -> None:
        """Let all of it happen for some time, and all end cleanly."""
        for _ in range(4):
            self.start_worker()
        callers = [
            self.spawn("call", str(self.folder / f"call-{n}"), str(seconds), f"c{n}")
            for n in range(3)
        ]
        self.wait_until_ready()
        what = [self.kill_worker, self.end_worker, self.stop_worker, self.stop_server]
        what += [self.pause_server, self.kill_worker, self.stop_worker]
        for number, happening in enumerate(self.servers.happenings):
            what.insert(2 * number, partial(self.happen, happening))
        started, turn = time.monotonic(), 0
        next_hit, next_restart = 1.5, seconds / (restarts + 1)
        while (now := time.monotonic() - started) < seconds:
            time.sleep(0.2 + 0.3 * self.random.random())
            self.cut()
            self.replace_dead()
            if now > next_hit:
                next_hit = now + 1.0
                what[turn % len(what)]()
                turn += 1
            if now > next_restart:
                next_restart += seconds / (restarts + 1)
                self.restart_server()
        for caller in callers:
            with suppress(subprocess.TimeoutExpired):
                caller.wait(timeout=4 * TIMEOUT)
            caller.kill()
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers + self.leaving:
            try:
                worker.wait(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                worker.kill()
                self.killed[worker.pid] = time.time()

    def wait_until_ready(self) -> None:
        """Wait for the first workers and callers: what is done to those that enter ends them."""
        until = time.monotonic() + 4 * TIMEOUT
        while len([path for path in self.folder.glob("*-*") if path.stat().st_size]) < 7:
            if time.monotonic() > until:
                raise RuntimeError((self.folder / "log").read_text()[-4000:])
            time.sleep(0.1)

    def replace_dead(self) -> None:
        """Start others for workers that ended by themselves, since they could not enter."""
        for worker in [worker for worker in self.workers if worker.poll() is not None]:
            self.workers.remove(worker)
            self.hurt.add(worker.pid)
            self.killed[worker.pid] = time.time()
            self.events["ended"] += 1
            self.start_worker()

    def take_over(self) -> None:
        """Have a last worker take what the others had no time to give back."""
        with self.client() as client:

            def pending() -> int:
                return sum(group["pending"] for group in client.xinfo_groups(STREAM))

            if not pending():
                return
            self.start_worker()
            until = time.monotonic() + 30
            while pending() and time.monotonic() < until:
                time.sleep(0.2)
            worker = self.workers.pop()
            worker.terminate()
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

    def left(self) -> list[str]:
        """Return what is in Redis though nobody is there, once what was killed had its time."""
        self.take_over()
        allowed = {STREAM, f"{{{STREAM}}}:control", f"{{{STREAM}}}:dead"}
        passing = tuple(f"{{{STREAM}}}:{kind}:" for kind in ("call", "waits", "items", "turns"))
        until = time.monotonic() + INBOX_TTL * 1.5
        with self.client() as client:
            while True:
                found = [key.decode() for key in client.keys("*") if key.decode() not in allowed]
                # What is kept of calls with keys goes by itself, and who waited for requests.
                found = [
                    key for key in found if not key.startswith(passing) or client.pttl(key) == -1
                ]
                groups = client.xinfo_groups(STREAM)
                found += [f"{group['pending']} pending" for group in groups if group["pending"]]
                if not found or time.monotonic() > until:
                    return found
                time.sleep(0.2)


class Judge:
    """Compares what was asked with what ran."""

    def __init__(self, chaos: Chaos, slack: float) -> None:
        self.chaos = chaos
        self.slack = slack
        self.counts: Counter[str] = Counter(dict.fromkeys(WRONG, 0))
        self.runs: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self.ends: dict[str, float] = {}
        self.asked: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.outages: list[Outage] = list(chaos.outages)
        for path in [*chaos.folder.glob("run-*"), *chaos.folder.glob("call-*")]:
            for text in path.read_text().splitlines():
                with suppress(ValueError):  # one that was being written when it was killed
                    self._take(json.loads(text))

    def _take(self, line: dict[str, Any]) -> None:
        what = line["what"]
        if what == "lag":
            self.outages.append(Outage(line["pid"], line["since"], line["at"]))
        elif what == "run":
            self.runs[line["key"]].append(line)
        elif what == "end":
            self.ends[line["proof"]] = line["at"]
        elif what == "ready":
            pass
        elif what == "asked":
            self.asked[line["key"]] = line
        else:
            self.outcomes[line["key"]] = line

    def judge(self) -> Counter[str]:
        self.counts["calls"] = len(self.asked)
        for key in self.asked:
            outcome = self.outcomes.get(key)
            if outcome is None:
                self._complain("unanswered", key, "")
                continue
            self.counts[outcome["what"]] += outcome["what"] != "failed"
            self._judge_outcome(key, outcome)
        for key in self.runs:
            self._judge_runs(key)
        self._judge_keys()
        for what in self.chaos.left():
            self._complain("left", what, "")
        return self.counts

    def _judge_outcome(self, key: str, outcome: dict[str, Any]) -> None:
        what = outcome["what"]
        if what == "failed":
            wrong = outcome["error"].startswith("Wrong")
            self._complain("invented" if wrong else "failed", key, outcome["error"])
        proofs = [run["proof"] for run in self.runs[outcome.get("shared", key)]]
        if what == "result" and outcome["proof"] not in proofs:
            self._complain("invented", key, outcome["proof"])
        if outcome.get("unheard"):
            if self._taken_over([self.asked[key]["at"], outcome["at"]]):
                self.counts["lost_callbacks"] += 1
            else:
                self._complain("unheard", key, f"{outcome['unheard']} callbacks")
        late = self._counted(outcome["due"], outcome["at"], {outcome["pid"]})
        if late > self.slack:
            self._complain("late", key, f"{what}, {late:.1f} s after its time")

    def _judge_keys(self) -> None:
        """Compare what those were told who used the same key, and when it ran."""
        told: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for outcome in self.outcomes.values():
            if "shared" in outcome:
                told[outcome["shared"]].append(outcome)
        self.counts["keys"] = len(told)
        self.counts["shared"] = sum(map(len, told.values()))
        for key, outcomes in told.items():
            had, runs = min(outcome["at"] for outcome in outcomes), self.runs[key]
            proofs = {outcome["proof"] for outcome in outcomes}
            again = [run for run in runs if run["at"] > had + _LAG and not self._stood(run, had)]
            times = [entry["at"] for entry in (*outcomes, *runs)]
            if (len(proofs) > 1 or again) and self._taken_over(times):
                self.counts["lost_results"] += 1
                continue
            if len(proofs) > 1:
                self._complain("unequal", key, f"{len(proofs)} results")
            for run in again:
                self._complain("rerun", key, f"{run['at'] - had:.2f} s after somebody had it")

    def _stood(self, run: dict[str, Any], at: float) -> bool:
        """Whether the process of a run stood still at a time, and for no other reason ran after."""
        return any(
            outage.pid == run["pid"] and outage.since < at + _LAG and outage.until > at
            for outage in self.outages
        )

    def _judge_runs(self, key: str) -> None:
        runs, outcome = self.runs[key], self.outcomes.get(key)
        times = [run["at"] for run in runs]
        if outcome is not None and outcome["what"] == "cancelled":
            if self._taken_over([outcome["at"], *times]):
                return
            for run in runs:
                pid = run["pid"]
                end = self.ends.get(run["proof"], self.chaos.killed.get(pid, run["at"] + LONG))
                since = max(outcome["due"], run["at"])
                over = self._counted(since, end, {0, pid, outcome["pid"]})
                if over > self.slack:
                    self._complain(
                        "overrun",
                        key,
                        f"{over:.1f} s in {pid}, begun "
                        f"{run['at'] - outcome['due']:+.1f} s after it, attempt {run['attempt']}",
                    )
        if self.chaos.mode == "group" and len(runs) > 1:
            self.counts["twice"] += 1
            if self._taken_over(times):
                return
            if not any(run["pid"] in self.chaos.hurt or run["attempt"] > 1 for run in runs):
                self._complain("unexplained", key, f"{len(runs)} runs")

    def _taken_over(self, times: list[float]) -> bool:
        """Whether another server took over between the first of these times and the last, or
        shortly before: it may have lost an acknowledgement, or a cancel.
        """
        return any(
            outage.since < max(times) and min(times) < outage.until
            for outage in self.chaos.taken_over
        )

    def _counted(self, since: float, until: float, pids: set[int]) -> float:
        """Return how many of these seconds none of these processes was stopped."""
        position = since
        counted = 0.0
        for outage in sorted(self.outages, key=lambda outage: outage.since):
            if outage.pid in pids and outage.until > position and outage.since < until:
                counted += max(outage.since - position, 0.0)
                position = outage.until
        return counted + max(until - position, 0.0)

    def _complain(self, kind: str, key: str, why: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= 20:
            asked = self.asked.get(key, {})
            print(f"{kind}: {key} {asked.get('kind', '')} {why}", *self._around(key))

    def _around(self, key: str) -> list[str]:
        """What happened to the call, in seconds since it was asked."""
        asked = self.asked.get(key)
        if asked is None:
            return []
        start = asked["at"]
        lines = [(run["at"], f"run in {run['pid']}") for run in self.runs[key]]
        lines += [
            (self.ends[run["proof"]], "end") for run in self.runs[key] if run["proof"] in self.ends
        ]
        last = max([start, *(at for at, _ in lines)])
        if key in self.outcomes:
            outcome = self.outcomes[key]
            last = max(last, outcome["at"])
            lines.append((outcome["at"], outcome["what"]))
        pids = {0, asked["pid"], *(run["pid"] for run in self.runs[key])}
        for outage in self.outages:
            if outage.pid in pids and outage.until > start and outage.since < last:
                name = f"{outage.pid} stopped" if outage.pid else "server away"
                lines.append((outage.since, f"{name} for {outage.until - outage.since:.1f}"))
        for run in self.runs[key]:
            if run["pid"] in self.chaos.killed:
                lines.append((self.chaos.killed[run["pid"]], f"{run['pid']} killed"))
        return [f"[{at - start:.1f} {what}]" for at, what in sorted(lines)]


def run(
    seconds: float, backend: str, mode: str, restarts: int, slack: float, topology: str
) -> bool:
    """Make chaos for some time; print the counts, and return whether they are as they must be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            One(name) if topology == "one" else Several(topology) as servers,
            Chaos(folder, servers, mode, backend) as chaos,
        ):
            with nullcontext() if topology == "one" else Writer(servers) as writer:
                chaos.run(seconds, restarts)
            if writer is not None:
                chaos.events["written"], chaos.events["missing"] = writer.counted()
            counts = Judge(chaos, slack).judge()
        order = ["calls", "result", "cancelled", *WRONG]
        order += [key for key in {**counts, **chaos.events} if key not in order]
        text = " ".join(f"{key}={counts[key] + chaos.events[key]}" for key in order)
        print(f"{backend} {mode}: {text}", flush=True)
        wrong = any(counts[key] for key in WRONG)
        if wrong:
            print((folder / "log").read_text()[-4000:])
        return counts["result"] > 0 and not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each mode")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--mode", choices=("group", "broadcast", "both"), default="both")
    parser.add_argument("--topology", choices=("one", "sentinel", "cluster"), default="one")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--slack", type=float, default=1, help="seconds that aren't late yet")
    options = parser.parse_args()
    modes = ("group", "broadcast") if options.mode == "both" else (options.mode,)
    settings = (options.restarts, options.slack, options.topology)
    fine = [run(options.seconds, options.backend, mode, *settings) for mode in modes]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        role, backend, *args = sys.argv[2:]
        anyio.run({"work": work, "call": call}[role], *args, backend=backend)
        sys.exit(0)
    sys.exit(main())
