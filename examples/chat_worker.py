"""The worker behind chat_app.py: goes on with an answer when nobody reads it, and where another
worker was killed.

python examples/chat_worker.py [redis://localhost:6379]
"""

import sys
from collections.abc import AsyncIterator

import anyio

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, current_call

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"


class Chat:
    async def answer(self, prompt: str) -> AsyncIterator[str]:
        last = await current_call().resume()  # None, unless this is a second attempt
        words = f"You said: {prompt}\nThat is all I know.".split(" ")
        for word in words[0 if last is None else last.number :]:
            await anyio.sleep(0.05)
            yield f"{word} "


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-chats", use_consumer_group=True) as transport,
        RPCChannel(transport, expose=Chat()) as channel,
    ):
        print("working", flush=True)
        await channel.serve_forever()


anyio.run(main)
