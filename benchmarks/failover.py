"""What calls in flight see of a failover: ``python -m benchmarks.failover``.

A client has 64 calls in flight, of 20 ms each, and two workers; then something happens to the
servers, which are real and on the loopback interface. One line is printed for each event: medians
of several runs.

- ``unanswered``: calls that ended in an error or not at all, over all runs;
- ``longest``: seconds of the longest call;
- ``twice``: requests that ran more than once;
- ``again``: accepted requests that the next server lacked, and that were sent again;
- ``event``: seconds that the event took, where somebody made it;
- ``calls``: how many there were.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import anyio
import anyio.to_thread

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, RPCError
from anyio_kkrpc.testing._server import find_server
from tests.topologies import ClusterSetup, Node, SentinelSetup

STREAM = "failover"
HANDLER = 0.02
# Milliseconds after which a Cluster, or sentinels, take a node for down.
NODE_TIMEOUT = 1500
DOWN_AFTER = 1000
# Seconds for which writes are refused.
REFUSED = 3.0
# Seconds for which replicas get nothing.
LAG = 0.3


class Run(NamedTuple):
    """What one run showed; see above."""

    calls: int
    unanswered: int
    longest: float
    twice: int
    again: int
    event: float


class Load:
    """Calls, and what became of them.

    :param in_flight: how many at a time
    :param some: how many are answered before the event, and after it, until the run is over
    :param at_once: how many of them each worker runs at a time
    :ivar answered: how many had a result
    :ivar runs: how often each ran
    :ivar failed: the errors of those that failed
    :ivar longest: seconds of the longest call since the event began
    """

    def __init__(self, in_flight: int = 64, some: int = 500, at_once: int = 100) -> None:
        self._in_flight, self._some, self._at_once = in_flight, some, at_once
        self.answered = 0
        self.runs: Counter[int] = Counter()
        self.failed: list[RPCError] = []
        self.longest = 0.0
        self._number = 0
        self._ending = False

    async def work(self, number: int) -> int:
        self.runs[number] += 1
        await anyio.sleep(HANDLER)
        return number

    async def lane(self, api: Any) -> None:
        while not self._ending:
            self._number += 1
            number, started = self._number, anyio.current_time()
            try:
                if await api.work(number) != number:
                    raise AssertionError("the answer to another call")
                self.answered += 1
            except RPCError as exc:
                self.failed.append(exc)
            self.longest = max(self.longest, anyio.current_time() - started)

    async def more(self) -> None:
        """Wait until some more are answered."""
        end = self.answered + self._some
        while self.answered < end:
            await anyio.sleep(0.02)

    async def run(self, url: str, *events: Callable[[], object]) -> Run:
        """Make calls, have the events happen one after the other, and tell what that was like."""
        options = {"stream": STREAM, "use_consumer_group": True}
        async with (
            RedisStreamsTransport(url, **options) as first,
            RedisStreamsTransport(url, **options) as second,
            RedisStreamsTransport(url, **options) as using,
            RPCChannel(first, expose=self, max_concurrency=self._at_once),
            RPCChannel(second, expose=self, max_concurrency=self._at_once),
            RPCChannel(using) as client,
            anyio.create_task_group() as group,
        ):
            api = client.get_api()
            for _ in range(self._in_flight):
                group.start_soon(self.lane, api)
            await self.more()
            self.longest = 0.0
            began = time.monotonic()
            for event in events:
                await anyio.to_thread.run_sync(event)
                took = time.monotonic() - began
                await self.more()
            self._ending = True
        twice = sum(1 for count in self.runs.values() if count > 1)
        again = using.statistics().sent_again
        return Run(self._number, len(self.failed), self.longest, twice, again, took)


# What happens


def kill(setup: ClusterSetup | SentinelSetup) -> None:
    """Kill the master, and wait until there is another one."""
    master = _master(setup)
    master.kill()
    _wait_other(setup, master)


def freeze(setup: ClusterSetup | SentinelSetup) -> None:
    """Stop the process of the master, and wait until there is another one."""
    master = _master(setup)
    master.freeze()
    _wait_other(setup, master)


def lose(setup: ClusterSetup | SentinelSetup) -> None:
    """Kill the master once its replicas lack what it has accepted for a while."""
    master = _master(setup)
    replicas = setup.replicas() if isinstance(setup, SentinelSetup) else [setup.replica_of(master)]
    with ExitStack() as stack:
        for replica in replicas:
            stack.enter_context(replica.freezing())  # so that none connects again
        master.run("CLIENT", "KILL", "TYPE", "replica")
        time.sleep(LAG)
        master.kill()
    _wait_other(setup, master)


def refuse(setup: ClusterSetup | SentinelSetup) -> None:
    """Have the master take no writes for a while."""
    master = _master(setup)
    master.run("CONFIG", "SET", "min-replicas-to-write", 9)
    time.sleep(REFUSED)
    master.run("CONFIG", "SET", "min-replicas-to-write", 0)


def fail_over(setup: ClusterSetup | SentinelSetup) -> None:
    """Have a replica promoted."""
    if isinstance(setup, ClusterSetup):
        setup.failover(STREAM)
    else:
        setup.failover()


def take_over(setup: ClusterSetup) -> None:
    """Have a replica promote itself."""
    setup.failover(STREAM, "TAKEOVER")


def move(setup: ClusterSetup) -> None:
    """Move the slot key by key, with pauses."""
    setup.move(STREAM, setup.stranger(STREAM), pause=0.1)


def move_at_once(setup: ClusterSetup) -> None:
    """Move the slot in one step, where the server can (Valkey 9, Redis 8.4)."""
    if not setup.move_atomically(STREAM, setup.stranger(STREAM)):
        print("  it can't")


def _master(setup: ClusterSetup | SentinelSetup) -> Node:
    return setup.owner(STREAM) if isinstance(setup, ClusterSetup) else setup.master()


def _wait_other(setup: ClusterSetup | SentinelSetup, master: Node) -> None:
    if isinstance(setup, ClusterSetup):
        setup.wait_owner(STREAM, master)
    else:
        setup.wait_master(master)


EVENTS: dict[str, dict[str, Callable[[Any], object]]] = {
    "cluster": {
        "failover": fail_over,
        "takeover": take_over,
        "killed": kill,
        "frozen": freeze,
        "lost": lose,
        "moved": move,
        "moved at once": move_at_once,
        "noreplicas": refuse,
    },
    "sentinel": {
        "failover": fail_over,
        "killed": kill,
        "frozen": freeze,
        "lost": lose,
        "noreplicas": refuse,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology", choices=EVENTS)
    parser.add_argument("--event", action="append", help="only these")
    parser.add_argument("--server", choices=("redis", "valkey"))
    parser.add_argument("--executable", help="path of a server program, of any version")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    executable = options.executable or find_server(options.server)
    setup = (
        ClusterSetup(executable, node_timeout=NODE_TIMEOUT)
        if options.topology == "cluster"
        else SentinelSetup(executable, down_after=DOWN_AFTER)
    )
    with setup:
        for name, event in EVENTS[options.topology].items():
            if options.event and name not in options.event:
                continue
            runs = []
            for _ in range(options.runs):
                # What is lost and runs is answered all the same: some are to wait in the stream.
                load = Load(at_once=8) if event is lose else Load()
                happens = partial(event, setup)
                runs.append(anyio.run(load.run, setup.url, happens, backend=options.backend))
                for exc in load.failed[:3]:
                    print(f"  {type(exc).__name__}: {exc}")
                setup.heal()
            print(
                f"{options.topology} {name}: unanswered={sum(run.unanswered for run in runs)} "
                f"longest={statistics.median(run.longest for run in runs):.2f} "
                f"(at most {max(run.longest for run in runs):.2f}) "
                f"twice={statistics.median(run.twice for run in runs):g} "
                f"again={statistics.median(run.again for run in runs):g} "
                f"event={statistics.median(run.event for run in runs):.2f} "
                f"calls={statistics.median(run.calls for run in runs):g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
