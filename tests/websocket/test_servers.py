"""The endpoint under servers that people use, mounted as they mount it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import hypercorn.config
import hypercorn.trio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute

from anyio_kkrpc import TransportClosedError, TransportConnectionError
from anyio_kkrpc.websocket import Endpoint, endpoint
from tests.bounds import BOUND

from .test_client import calling
from .test_endpoint import Api

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def with_uvicorn(app: Any, listener: socket.socket) -> AsyncIterator[Any]:
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    async with anyio.create_task_group() as tasks:

        async def stop() -> None:
            server.should_exit = True

        tasks.start_soon(server.serve, [listener])
        with anyio.fail_after(BOUND):
            while not server.started:
                await anyio.sleep(0.005)
        try:
            yield stop
        finally:
            await stop()


@asynccontextmanager
async def with_hypercorn(app: Any, listener: socket.socket) -> AsyncIterator[Any]:
    config, stopping = hypercorn.config.Config(), anyio.Event()
    config.bind = [f"fd://{listener.detach()}"]
    config.graceful_timeout = 0.1

    async def serve(*, task_status: Any) -> None:
        # It fails with what each connection was cancelled by.
        await hypercorn.trio.serve(
            app, config, shutdown_trigger=stopping.wait, task_status=task_status
        )

    async with anyio.create_task_group() as tasks:

        async def stop() -> None:
            stopping.set()

        await tasks.start(serve)
        try:
            yield stop
        finally:
            await stop()


def mounted(own: Endpoint) -> Starlette:
    return Starlette(routes=[Mount("/rpc", own), WebSocketRoute("/ws", own)])


@pytest.fixture
def run(anyio_backend_name: str) -> Any:
    """Return the server for the loop under test: one for asyncio, one for trio."""
    return with_uvicorn if anyio_backend_name == "asyncio" else with_hypercorn


async def test_mounted(run: Any) -> None:
    """Calls, callbacks and streams; the server's end is a clean end for the client."""
    api = Api()
    own = endpoint(api, max_message_size=1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        async with run(mounted(own), listener) as stop:
            for options in ({"codec": "cbor"}, {"dialect": "kkrpc-2"}, {"dialect": "kkrpc-0"}):
                async with calling(f"ws://127.0.0.1:{port}/ws", **options) as channel:
                    assert await channel.get_api().add(1, 2) == 3
            async with calling(f"ws://127.0.0.1:{port}/rpc/") as channel:
                steps: list[int] = []
                assert await channel.get_api().steps(3, steps.append) == "done"
                assert len([item async for item in channel.get_api().count(5)]) == 5
                async with anyio.create_task_group() as tasks:

                    async def leave() -> None:
                        await api.waiting.wait()
                        await stop()

                    tasks.start_soon(leave)
                    with pytest.raises((TransportClosedError, TransportConnectionError)):
                        await channel.get_api().wait()
    assert own.statistics().connections == 0
    assert api.cancelled.is_set()


async def test_refusals(run: Any) -> None:
    """The status gets to the client; a page of another host is refused."""
    own = endpoint(Api(), max_connections=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        async with run(own, listener):
            with pytest.raises(TransportConnectionError, match="403.*https://evil.example"):
                async with calling(url, origin="https://evil.example"):
                    pytest.fail("refused")
            async with calling(url):
                with pytest.raises(TransportConnectionError, match="503.*too many"):
                    async with calling(url):
                        pytest.fail("refused")
