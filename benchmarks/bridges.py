"""What a lone call costs over a WebSocket, and through a relay, beside Redis.

``python -m benchmarks.bridges``: in one process, on asyncio, with uvicorn and a Redis of its own,
one call after the other. CPU is that of the process, which is client, relay and worker at once;
the time also has the server's, and depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import uvicorn

from anyio_kkrpc import ByteStreamTransport, RedisStreamsTransport, RPCChannel
from anyio_kkrpc.relay import forward, relay
from anyio_kkrpc.testing import RedisServer
from anyio_kkrpc.transports import connect_tcp, serve
from anyio_kkrpc.websocket import connect_websocket, endpoint

WARM_UP = 200


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b


@asynccontextmanager
async def web_server(app: Any) -> AsyncIterator[str]:
    """Run uvicorn in this process; give the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False)
        server = uvicorn.Server(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener])
            while not server.started:
                await anyio.sleep(0.01)
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True


async def measure(name: str, api: Any, count: int) -> None:
    """Make calls one after the other, and print what one takes."""
    for _ in range(WARM_UP):
        await api.add(1, 2)
    took = []
    cpu = time.process_time()
    for _ in range(count):
        before = time.perf_counter()
        await api.add(1, 2)
        took.append(time.perf_counter() - before)
    cpu = (time.process_time() - cpu) / count
    print(f"{name:40} {statistics.median(took) * 1e6:8.0f} us {cpu * 1e6:8.0f} us of CPU")


async def over_tcp(stack: AsyncExitStack, count: int) -> None:
    async def handle(transport: ByteStreamTransport) -> None:
        async with RPCChannel(transport, expose=Api()) as channel:
            await channel.serve_forever()

    listener = await stack.enter_async_context(
        await anyio.create_tcp_listener(local_host="127.0.0.1")
    )
    tasks = await stack.enter_async_context(anyio.create_task_group())
    stack.callback(tasks.cancel_scope.cancel)
    tasks.start_soon(serve, listener, handle)
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    transport = await stack.enter_async_context(connect_tcp("127.0.0.1", port))
    channel = await stack.enter_async_context(RPCChannel(transport))
    await measure("TCP", channel.get_api(), count)


async def over_websocket(stack: AsyncExitStack, app: Any, name: str, count: int) -> None:
    url = await stack.enter_async_context(web_server(app))
    transport = await stack.enter_async_context(connect_websocket(url))
    channel = await stack.enter_async_context(RPCChannel(transport))
    await measure(name, channel.get_api(), count)


async def over_redis(stack: AsyncExitStack, url: str, count: int) -> None:
    """A worker, by itself, behind a page's endpoint, and behind another stream."""

    async def joined(stream: str) -> RedisStreamsTransport:
        return await stack.enter_async_context(
            RedisStreamsTransport(url, stream=stream, use_consumer_group=True)
        )

    async def channel(transport: Any, **options: Any) -> RPCChannel:
        return await stack.enter_async_context(RPCChannel(transport, **options))

    await channel(await joined("inner"), expose=Api())
    client = await channel(await joined("inner"))
    await measure("Redis", client.get_api(), count)
    async with AsyncExitStack() as inner:
        app = endpoint(forward(client, allow=["add"]))
        await over_websocket(inner, app, "WebSocket, relay, Redis", count)
    a, b = await joined("outer"), await joined("inner")
    await stack.enter_async_context(relay(a, b, allow=["add"]))
    outer = await channel(await joined("outer"))
    await measure("Redis, relay, Redis", outer.get_api(), count)


async def main(count: int) -> None:
    """Measure each once."""
    async with AsyncExitStack() as stack:
        await over_tcp(stack, count)
    async with AsyncExitStack() as stack:
        await over_websocket(stack, endpoint(Api()), "WebSocket", count)
    with RedisServer() as server:
        async with AsyncExitStack() as stack:
            await over_redis(stack, server.url, count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    anyio.run(main, parser.parse_args().calls)
