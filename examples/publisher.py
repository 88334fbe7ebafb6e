"""A publisher: calls all subscribers, with and without waiting for the first answer.

python examples/publisher.py [redis://localhost:6379]
"""

import sys

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, with_call_options

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-news") as transport,
        RPCChannel(transport, timeout=5) as channel,
    ):
        api = channel.get_api()
        print(await api.headline("answered by the first subscriber"))
        await with_call_options(api, reply=False).headline("answered by nobody")


anyio.run(main)
