"""What streams of calls with keys cost, side by side: ``python -m benchmarks.kept_streams``.

Prints the time of a resume in round trips of a PING on the same open connection, items a second and
CPU seconds of all sides against those of a plain stream, and bytes in Redis per item and result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from statistics import median
from typing import Any

import anyio
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, with_call_options
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.testing._server import RedisServer

STREAM = "kept-streams"
ITEM, RESULT = "x" * 20, "x" * 98  # as JSON 22 and 100 bytes


class Api:
    """What is measured."""

    async def items(self, count: int) -> AsyncIterator[str]:
        """Yield so many at once."""
        for _ in range(count):
            yield ITEM

    async def paced(self, count: int) -> AsyncIterator[str]:
        """Yield so many, each in an entry of its own."""
        for _ in range(count):
            yield ITEM
            await anyio.sleep(0.0005)

    async def result(self) -> str:
        """Return a result."""
        return RESULT


def transport(url: str) -> RedisStreamsTransport:
    """Return a peer's."""
    return RedisStreamsTransport(url, stream=STREAM, use_consumer_group=True)


async def resume(channel: RPCChannel, link: Any, rounds: int) -> None:
    """Read one item from the middle of a stream, and PING, in turns."""
    call = await channel.start(channel.get_api().paced(2000), key="resume")
    positions = [item.position async for item in call.items()]
    took: dict[str, list[float]] = {"ping": [], "resume": []}
    for number in range(rounds):
        start = time.perf_counter()
        await link.request(b"PING")
        took["ping"].append(time.perf_counter() - start)
        start = time.perf_counter()
        async with aclosing(call.items(after=positions[number % 1900])) as items:
            await items.__anext__()
        took["resume"].append(time.perf_counter() - start)
    ping, again = (median(took[name]) for name in ("ping", "resume"))
    print(f"resume p50 {again * 1e6:.0f} us, ping {ping * 1e6:.0f} us: {again / ping:.2f} x")


async def rates(channel: RPCChannel, client: redis.Redis, count: int, rounds: int) -> None:
    """Read streams, plain ones and kept ones in turns."""
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "kept": []}

    def cpu() -> float:
        info: Any = client.info("cpu")
        return time.process_time() + float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    for number in range(rounds):
        for kind, found in times.items():
            start, used = time.perf_counter(), cpu()
            if kind == "plain":
                got = [item async for item in channel.get_api().items(count)]
            else:
                call = await channel.start(channel.get_api().items(count), key=f"rate-{number}")
                got = [item async for item in call.items()]
            found.append((time.perf_counter() - start, cpu() - used))
            assert len(got) == count
    plain, kept = ([median(one) for one in zip(*found, strict=True)] for found in times.values())
    print(
        f"items a second: plain {count / plain[0]:.0f}, kept {count / kept[0]:.0f}: "
        f"{plain[0] / kept[0]:.2f} x by the clock, {plain[1] / kept[1]:.2f} x by CPU"
    )


async def memory(channel: RPCChannel, client: redis.Redis, count: int) -> None:
    """Ask how many bytes are kept."""
    keys = Keys.of(STREAM)
    for name in ("items", "paced"):
        call = await channel.start(getattr(channel.get_api(), name)(count), key=name)
        await call.result()
        usage: Any = client.memory_usage(keys.items(name.encode()), samples=0)
        print(f"bytes per item of 22 bytes, {name}: {usage / count:.0f}")
    await with_call_options(channel.get_api(), key="result").result()
    print(f"bytes per result of 100 bytes: {client.memory_usage(keys.call(b'result'))}")


async def main(rounds: int, count: int) -> None:
    """Measure."""
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        async with (
            transport(server.url) as a,
            transport(server.url) as b,
            RPCChannel(a, expose=Api()),
            RPCChannel(b) as channel,
        ):
            await resume(channel, b._lane.link, rounds)
            await rates(channel, client, count, 9)
            await memory(channel, client, 2000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--items", type=int, default=4000)
    options = parser.parse_args()
    anyio.run(main, options.rounds, options.items)
