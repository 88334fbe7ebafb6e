"""Shows the progress of a job in the browser, over a WebSocket. Start worker.py first.

pip install fastapi uvicorn websockets
REDIS_URL=redis://localhost:6379 uvicorn --app-dir examples websocket_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio
from fastapi import FastAPI, WebSocket

import anyio_kkrpc as rpc

URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


class Jobs(Protocol):
    async def resize(self, count: int, on_progress: rpc.Callback[[int, int]]) -> str: ...


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    transport = rpc.RedisStreamsTransport(
        URL, stream="example-jobs", use_consumer_group=True, honor_destroy_signal=False
    )
    async with transport, rpc.RPCChannel(transport) as channel:
        yield {"jobs": channel.get_api(Jobs)}


app = FastAPI(lifespan=lifespan)


@app.websocket("/resize")
async def resize(socket: WebSocket, count: int) -> None:
    jobs: Jobs = socket.state.jobs
    await socket.accept()

    async def show(done: int, of: int) -> None:
        await socket.send_json({"done": done, "of": of})

    async def leave_with_the_browser() -> None:
        async for _ in socket.iter_text():
            pass
        group.cancel_scope.cancel()  # and with the call the worker's handler

    async with anyio.create_task_group() as group:
        group.start_soon(leave_with_the_browser)
        try:
            await socket.send_json({"result": await jobs.resize(count, show)})
            await socket.close()
        except rpc.RPCError as exc:
            await socket.close(1011, str(exc)[:120])  # as long as a reason may be
        group.cancel_scope.cancel()
