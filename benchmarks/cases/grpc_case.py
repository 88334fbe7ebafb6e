"""grpcio's asyncio interface, without a broker: one unary method, bytes in and out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from . import Client, Place

NEEDS = ("grpc",)
BACKENDS = ("asyncio", "uvloop")
KINDS = ("",)
DIRECT = True


async def serve(place: Place, ready: Callable[[], None]) -> None:
    import grpc

    async def echo(request: bytes, context: object) -> bytes:
        return request

    handler = grpc.method_handlers_generic_handler(
        "bench", {"echo": grpc.unary_unary_rpc_method_handler(echo)}
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{place.port}")
    await server.start()
    ready()
    await server.wait_for_termination()


@asynccontextmanager
async def connect(place: Place) -> AsyncIterator[Client]:
    import grpc

    async with grpc.aio.insecure_channel(f"127.0.0.1:{place.port}") as channel:
        echo = channel.unary_unary("/bench/echo")

        async def call(text: str) -> bytes:
            return await echo(text.encode())

        yield Client(call)
