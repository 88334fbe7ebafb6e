"""What idle workers cost the server: ``python -m benchmarks.idle --workers 1000``.

So many workers of one group wait for requests that don't come. Printed are the commands that the
server carries out in a second, by name, and the part of a processor that they take it.

With ``--pending`` another worker, of which nothing is heard, has taken so many requests just
before, so that there is something to look through for what is due: ``--pending 100000 --workers 400
--claim-idle 60 --seconds 30``. What scripts call is counted in their time, and by name, too.
"""

from __future__ import annotations

import argparse
import math
from contextlib import AsyncExitStack

import anyio
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer

# Workers that enter at once, so that none of them is late because of the others.
AT_ONCE = 20
STREAM, GROUP = "idle", "kkrpc-group"
# Requests that are added and taken at once.
PAGE = 1000


class Api:
    def echo(self, value: int) -> int:
        return value


def take(redis_client: redis.Redis, pending: int) -> None:
    """Have a worker of the group take so many requests, so that no other one can."""
    for _ in range(0, pending, PAGE):
        with redis_client.pipeline(transaction=True) as pipeline:
            for _ in range(PAGE):
                pipeline.xadd(STREAM, {"data": "{}"})
            pipeline.xreadgroup(GROUP, "silent", {STREAM: ">"}, count=PAGE)
            pipeline.execute()


async def measure(
    url: str, workers: int, claim_idle: float, seconds: float, pending: int = 0
) -> None:
    ready = anyio.Semaphore(AT_ONCE)
    serving, over = 0, anyio.Event()

    async def serve() -> None:
        nonlocal serving
        async with AsyncExitStack() as stack:
            async with ready:
                transport = RedisStreamsTransport(
                    url, stream=STREAM, use_consumer_group=True, consumer_group=GROUP,
                    claim_idle=claim_idle, connect_timeout=60,
                )  # fmt: skip
                await stack.enter_async_context(transport)
                await stack.enter_async_context(RPCChannel(transport, expose=Api(), timeout=None))
                serving += 1
            await over.wait()

    with redis.Redis.from_url(url) as witness:
        async with anyio.create_task_group() as group:
            for _ in range(workers):
                group.start_soon(serve)
            while serving < workers:
                await anyio.sleep(0.1)
            if pending:
                await anyio.to_thread.run_sync(take, witness, pending)
            else:
                await anyio.sleep(2 * claim_idle)  # the first looks are over
            witness.config_resetstat()
            began = anyio.current_time()
            await anyio.sleep(seconds)
            took = anyio.current_time() - began
            stats = witness.info("commandstats")
            # Without those of scripts: who is idle writes one command at a time.
            sent = witness.info("stats")["total_reads_processed"]
            over.set()
    rates = {name.removeprefix("cmdstat_"): one["calls"] / took for name, one in stats.items()}
    busy = sum(one["usec"] for one in stats.values()) / 1e6 / took
    print(
        f"{workers} idle workers, {pending} pending, claim_idle {claim_idle:g} s, "
        f"over {math.ceil(took)} s: "
        + ", ".join(f"{name} {rate:.0f}/s" for name, rate in sorted(rates.items()) if rate >= 0.5)
        + f"; sent {sent / took:.0f}/s, "
        f"{100 * busy:.1f} % of a processor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--claim-idle", type=float, nargs="+", default=[30.0, 15.0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pending", type=int, default=0, help="default: none")
    options = parser.parse_args()
    with RedisServer(args=("--maxclients", "10000")) as server:
        for claim_idle in options.claim_idle:
            what = (server.url, options.workers, claim_idle, options.seconds, options.pending)
            anyio.run(measure, *what)


if __name__ == "__main__":
    main()
