"""A subscriber: every subscriber gets every call. Start it, then publisher.py.

python examples/subscriber.py [redis://localhost:6379]
"""

import sys

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


class News:
    def headline(self, text: str) -> str:
        print(f"heard: {text}", flush=True)
        return "thank you"


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-news") as transport,
        RPCChannel(transport, expose=News()) as channel,
    ):
        print("listening", flush=True)
        await channel.serve_forever()  # until a peer signals the end, or Ctrl-C


anyio.run(main)
