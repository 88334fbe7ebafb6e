"""The same under trio, with a time limit for several calls at once. Start worker.py first.

python examples/trio_program.py [redis://localhost:6379]
"""

import sys

import trio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-jobs", use_consumer_group=True) as transport,
        RPCChannel(transport) as channel,
    ):
        api = channel.get_api()
        results: dict[int, list[int]] = {}

        async def factorize(number: int) -> None:
            results[number] = await api.math.factorize(number)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for number in (12, 97, 1001):
                    nursery.start_soon(factorize, number)
        for number, factors in sorted(results.items()):
            print(number, "=", *factors)


trio.run(main)
