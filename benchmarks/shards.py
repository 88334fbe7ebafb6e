"""What a call costs with one shard on one server, and with four on four.

``python -m benchmarks.shards``

Four processes call and four serve, each caller with so many calls in flight, on real servers on the
loopback interface. Processor time is counted, not time: of the processes as they tell it, and of
the servers as INFO has it, over the same number of calls. The ways take turns, so that whatever
else the machine does meets all alike. One line is printed for each, in microseconds for one call:

- ``client``, ``worker``, ``servers``: of all processes of a kind, together;
- ``total``: their sum, the median over the rounds; ``ratio``: to that of the first way.

Whoever calls is at home in one shard (``sticky``), has its calls spread over all, or has a key
with each. A worker serves all shards, or one alone.

``python -m benchmarks.shards --dead``

One of three masters is killed and started again, some times. Meanwhile a caller at home in each of
4 shards makes so many calls a second, whether others are answered or not, and workers serve all.
Printed is how long calls of those took that are at home in the shards of the other masters, in
milliseconds: while all masters live, and while one is dead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from itertools import count
from statistics import median, quantiles
from typing import Any, NamedTuple

import anyio
import msgspec

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, RPCError, with_call_options
from anyio_kkrpc.redis._stream._places import home_of, name_of_shard
from tests.topologies import ClusterSetup

STREAM = "bench"
PROCESSES = 4
IN_FLIGHT = 64


class Way(NamedTuple):
    """How calls are made."""

    name: str
    shards: int
    servers: int
    route: str = "sticky"
    keyed: bool = False
    alone: bool = False


WAYS = [
    Way("1 shard, 1 server", 1, 1),
    Way("4 shards, 4 servers, sticky", 4, 4),
    Way("the same, a worker for each shard", 4, 4, alone=True),
    Way("4 shards, 4 servers, spread", 4, 4, "spread"),
    Way("4 shards, 4 servers, a key with each", 4, 4, keyed=True),
]


class Task(msgspec.Struct):
    """What a process is to do.

    :ivar number: its own, of those that do the same
    :ivar calls: whether it calls, or serves
    """

    url: str
    way: Way
    number: int
    calls: bool


class Api:
    def echo(self, value: int) -> int:
        return value


async def work(task: Task) -> None:
    """Be one of the processes: for each line of a number, make so many calls, and tell its time."""
    way = task.way
    transport = RedisStreamsTransport(
        task.url,
        stream=STREAM,
        shards=way.shards,
        route="spread" if way.route == "spread" else "sticky",
        use_consumer_group=True,
        serve_shards=[task.number] if way.alone and not task.calls else None,
        session_id=homes(way.shards)[task.number] if task.calls else None,
    )
    api = None if task.calls else Api()
    async with transport, RPCChannel(transport, expose=api) as channel:
        while True:
            # Whoever serves does so meanwhile; the wait costs no processor time.
            line = await anyio.to_thread.run_sync(sys.stdin.readline)
            if not line.strip():
                return
            before = time.process_time()
            if task.calls:
                await make_calls(channel, int(line), keyed=way.keyed)
            print(time.process_time() - (before if task.calls else 0), flush=True)


def homes(shards: int) -> list[str]:
    """Return names of callers of which each is at home in another shard."""
    return [
        next(f"p{n}-{one}" for n in count() if home_of(f"p{n}-{one}", shards) == one % shards)
        for one in range(PROCESSES)
    ]


async def make_calls(channel: RPCChannel, calls: int, *, keyed: bool) -> None:
    numbers = iter(range(calls))

    async def call(numbers: Iterator[int]) -> None:
        api = channel.get_api()
        for number in numbers:
            one = with_call_options(api, shard_key=str(number)) if keyed else api
            await one.echo(number)

    async with anyio.create_task_group() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.start_soon(call, numbers)


class Running:
    """One way, with its servers and processes."""

    def __init__(
        self, way: Way, stack: ExitStack, *, callers: int = PROCESSES, workers: int = PROCESSES
    ) -> None:
        self.way = way
        self.setup = stack.enter_context(ClusterSetup(masters=way.servers, replicas=0))
        self.workers = [self._start(stack, n, calls=False) for n in range(workers)]
        self.callers = [self._start(stack, n, calls=True) for n in range(callers)]
        self.rounds: list[tuple[float, float, float]] = []

    def _start(self, stack: ExitStack, number: int, *, calls: bool) -> subprocess.Popen[str]:
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.shards", "--work"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.terminate)
        task = Task(self.setup.url, self.way, number, calls)
        self._say(process, msgspec.json.encode(task).decode())
        return process

    def _say(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def _hear(self, process: subprocess.Popen[str]) -> float:
        assert process.stdout is not None
        return float(process.stdout.readline())

    def _ask(self, processes: list[subprocess.Popen[str]], calls: int) -> float:
        for process in processes:
            self._say(process, str(calls))
        return sum([self._hear(process) for process in processes])

    def _servers(self) -> float:
        facts = [node.facts("INFO", "cpu") for node in self.setup.nodes]
        return sum(float(one["used_cpu_user"]) + float(one["used_cpu_sys"]) for one in facts)

    def run(self, calls: int, *, kept: bool) -> None:
        """Make so many calls by each caller."""
        servers, workers = self._servers(), self._ask(self.workers, 0)
        clients = self._ask(self.callers, calls)
        workers = self._ask(self.workers, 0) - workers
        servers = self._servers() - servers
        if kept:
            scale = 1e6 / (calls * PROCESSES)
            self.rounds.append((clients * scale, workers * scale, servers * scale))


class Times:
    """What callers saw, in seconds for each call: with all masters, and while one was dead."""

    def __init__(self) -> None:
        self.others: dict[bool, list[float]] = {False: [], True: []}
        self.own: dict[bool, list[float]] = {False: [], True: []}
        self.failed = 0
        self.dead = False
        self.counts = False

    async def call(self, api: Any, *, own: bool) -> None:
        """Make one call.

        :param own: whether its caller is at home where the master is killed
        """
        times, counts = (self.own if own else self.others)[self.dead], self.counts
        began = anyio.current_time()
        try:
            await api.echo(1)
        except RPCError:
            self.failed += 1
        else:
            if counts:
                times.append(anyio.current_time() - began)

    async def go_on(self, api: Any, rate: float, *, own: bool) -> None:
        """Make so many calls a second, for ever."""
        at = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            while True:
                at += 1 / rate
                await anyio.sleep_until(at)
                tasks.start_soon(partial(self.call, api, own=own))


async def kill_masters(
    setup: ClusterSetup, callers: list[RedisStreamsTransport], times: Times, options: Any
) -> None:
    """Measure with all masters, and without the last one, in turn."""

    async def measure(*, dead: bool) -> None:
        times.dead, times.counts = dead, True
        await anyio.sleep(options.seconds)
        times.counts = False

    for _ in range(options.rounds):
        while any(one.shard_of() != shard for shard, one in enumerate(callers)):
            await anyio.sleep(0.1)  # until those who left are at home again
        await anyio.sleep(2)
        await measure(dead=False)
        await anyio.to_thread.run_sync(setup.nodes[-1].kill)
        await measure(dead=True)
        await anyio.to_thread.run_sync(setup.nodes[-1].start)


async def measure_dead(running: Running, options: Any) -> None:
    """Call from each shard while a master dies and comes back, and print how long that took."""
    setup, shards = running.setup, running.way.shards
    times = Times()
    callers = [
        RedisStreamsTransport(
            setup.url, stream=STREAM, shards=shards, use_consumer_group=True, session_id=name
        )
        for name in homes(shards)
    ]
    async with AsyncExitStack() as stack:
        channels = []
        for transport in callers:
            await stack.enter_async_context(transport)
            channels.append(await stack.enter_async_context(RPCChannel(transport, timeout=10)))
            await channels[-1].get_api().echo(1)  # until workers are there
        async with anyio.create_task_group() as tasks:
            for shard, channel in enumerate(channels):
                own = setup.owner(name_of_shard(STREAM, shard)) is setup.nodes[-1]
                go_on = partial(times.go_on, channel.get_api(), options.rate, own=own)
                tasks.start_soon(go_on)
            await kill_masters(setup, callers, times, options)
            tasks.cancel_scope.cancel()
    print(f"{'ms':34} {'calls':>7} {'median':>8} {'p99':>8} {'longest':>8}")
    for title, seen in (("the others", times.others), ("at home in the dead one", times.own)):
        for dead, found in seen.items():
            cuts = [quantiles(found, n=100)[n] for n in (49, 98)]
            numbers = "".join(f"{one * 1000:9.1f}" for one in (*cuts, max(found)))
            print(f"{title}, {'one dead' if dead else 'all alive':10} {len(found):>7}{numbers}")
    ratio = quantiles(times.others[True], n=100)[98] / quantiles(times.others[False], n=100)[98]
    print(f"p99 of the others: {ratio:.2f} x; {times.failed} calls failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", action="store_true", help="be one of the processes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3000, help="of each caller in each round")
    parser.add_argument("--dead", action="store_true", help="kill one of three masters")
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second of each caller")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each part, with --dead")
    options = parser.parse_args()
    if options.work:
        anyio.run(work, msgspec.json.decode(sys.stdin.readline(), type=Task))
        return
    if options.dead:
        with ExitStack() as stack:
            one = Running(Way("one of three dies", 4, 3), stack, callers=0, workers=2)
            anyio.run(measure_dead, one, options)
        return
    with ExitStack() as stack:
        running = [Running(way, stack) for way in WAYS]
        for number in range(options.rounds + 1):
            for one in running:
                one.run(options.calls, kept=number > 0)
    first: Any = None
    print(
        f"{'us per call':40} {'client':>7} {'worker':>7} {'servers':>8} {'total':>7} {'ratio':>6}"
    )
    for one in running:
        total = median(sum(told) for told in one.rounds)
        first = first or total
        parts = [median(told[n] for told in one.rounds) for n in range(3)]
        numbers = "".join(f"{value:9.0f}" for value in (*parts, total))
        print(f"{one.way.name:40}{numbers}{total / first:9.2f}")


if __name__ == "__main__":
    main()
