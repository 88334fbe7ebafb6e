"""The worker behind fastapi_app.py: answers as a language model would, token by token.

python examples/fastapi_worker.py [redis://localhost:6379]
"""

import sys
from collections.abc import AsyncIterator

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


class Chat:
    async def tokens(self, prompt: str) -> AsyncIterator[str]:
        """Stream the answer. When the reader leaves, this is closed where it stands."""
        words = f"You said: {prompt}\nThat is all I know.".split(" ")
        sent = 0
        try:
            for word in words:
                await anyio.sleep(0.05)
                yield f"{word} "
                sent += 1
        finally:
            print(f"{sent} of {len(words)} tokens", flush=True)

    async def answer(self, prompt: str) -> str:
        return "".join([token async for token in self.tokens(prompt)])


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-chat", use_consumer_group=True) as transport,
        RPCChannel(transport, expose=Chat()) as channel,
    ):
        print("working", flush=True)
        await channel.serve_forever()


anyio.run(main)
