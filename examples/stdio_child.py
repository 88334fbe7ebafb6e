"""A child process that serves its parent over stdin and stdout; see stdio_parent.py."""

import anyio

from anyio_kkrpc import RPCChannel
from anyio_kkrpc.transports import stdio


class Api:
    def greet(self, name: str) -> str:
        print("prints go to stderr")
        return f"Hello, {name}!"


async def main() -> None:
    async with stdio() as transport, RPCChannel(transport, expose=Api()) as channel:
        await channel.serve_forever()  # until the parent closes stdin


anyio.run(main)
