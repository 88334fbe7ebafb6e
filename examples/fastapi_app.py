"""A web app that calls workers and streams tokens to the browser. Start fastapi_worker.py first.

pip install fastapi uvicorn
REDIS_URL=redis://localhost:6379 uvicorn --app-dir examples fastapi_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse

import anyio_kkrpc as rpc
from anyio_kkrpc.sse import Events

URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
UNAVAILABLE = {rpc.OverloadedError: 503, rpc.TransportConnectionError: 503}
STATUS: dict[type[rpc.RPCError], int] = {rpc.RPCTimeoutError: 504, **UNAVAILABLE}


class Chat(Protocol):
    async def answer(self, prompt: str) -> str: ...

    async def tokens(self, prompt: str) -> rpc.RemoteStream[str]: ...


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    transport = rpc.RedisStreamsTransport(
        URL,
        stream="example-chat",
        use_consumer_group=True,
        max_backlog=10,  # more waiting calls are refused: OverloadedError
        honor_destroy_signal=False,  # that is for the workers
    )
    async with transport, rpc.RPCChannel(transport) as channel:
        yield {"chat": channel.get_api(Chat)}


async def chat_of(request: Request) -> Any:
    return request.state.chat


app = FastAPI(lifespan=lifespan)
Workers = Annotated[Chat, Depends(chat_of)]


@app.exception_handler(rpc.RPCError)
async def failed(request: Request, exc: rpc.RPCError) -> JSONResponse:
    return JSONResponse({"detail": str(exc)}, STATUS.get(type(exc), 502))  # else the worker failed


@app.get("/answer")
async def answer(prompt: str, chat: Workers, timeout: Annotated[float, Query(gt=0)] = 30) -> str:
    return await rpc.with_call_options(chat, timeout=timeout).answer(prompt)


@app.get("/chat")
async def stream(prompt: str, chat: Workers) -> Events:
    return Events(await chat.tokens(prompt))  # a refusal comes before the response: 503 or 504


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("fastapi_page.html"))
