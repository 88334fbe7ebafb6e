"""Readers that are killed: ``python -m tests.redis.keyed.readers BACKEND URL STREAM ITEMS ROUNDS AT_A_TIME``.

Each round forks so many processes, each of which reads on where one was killed in the round before.
All are killed in the middle of the stream; the last round reads to the end. Prints how many were
killed, and fails if an item didn't come once and in order.
"""

from __future__ import annotations

import os
import random
import signal
import sys

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel


async def read(url: str, stream: str, after: str | None, out: int) -> None:
    async with (
        RedisStreamsTransport(url, stream=stream, use_consumer_group=True) as transport,
        RPCChannel(transport) as channel,
    ):
        async for item in channel.attach("k").items(after=after):
            os.write(out, f"{item.number} {item.value} {item.position}\n".encode())


def fork(backend: str, url: str, stream: str, after: str | None) -> tuple[int, int]:
    """Return the id of a process that reads, and where it tells what."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        options = {"use_uvloop": True} if backend == "uvloop" else {}
        backend = "asyncio" if backend == "uvloop" else backend
        anyio.run(read, url, stream, after, writing, backend=backend, backend_options=options)
    finally:
        os._exit(0)


def main(backend: str, url: str, stream: str, items: int, rounds: int, at_a_time: int) -> None:
    numbers, positions, killed = [0] * at_a_time, [""] * at_a_time, 0
    for left in range(rounds, -1, -1):
        children = [fork(backend, url, stream, after or None) for after in positions]
        for index, (process, reading) in enumerate(children):
            wanted = random.randint(1, 2 * items // (3 * rounds)) if left else items
            with open(reading) as told:
                for _ in range(wanted):
                    line = told.readline()
                    if not line:
                        break
                    number, value, positions[index] = line.split()
                    numbers[index] += 1
                    assert int(number) == int(value) == numbers[index], (line, numbers[index])
                os.kill(process, signal.SIGKILL)
            killed += left > 0
            os.waitpid(process, 0)
    assert numbers == [items] * at_a_time, numbers
    print(killed)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))  # type: ignore[call-arg, arg-type]
