"""A chat that survives a reload, a second browser, and the end of this process in the middle of an
answer. Start chat_worker.py first.

pip install fastapi uvicorn
REDIS_URL=redis://localhost:6379 uvicorn --app-dir examples chat_app:app
"""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.requests import HTTPConnection

import anyio_kkrpc as rpc
from anyio_kkrpc.asgi import CallEvents, key_of

URL = os.environ.get("REDIS_URL", "redis://localhost:6379")


class Chat(Protocol):
    async def answer(self, prompt: str) -> AsyncIterator[str]: ...


def user_of(scope: Any) -> str | None:
    """Your login tells who this is; here a cookie does, which the page sets."""
    return HTTPConnection(scope).cookies.get("user")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    async with (
        rpc.RedisStreamsTransport(
            URL, stream="example-chats", use_consumer_group=True, honor_destroy_signal=False
        ) as transport,
        rpc.RPCChannel(transport) as channel,
    ):
        # GET /chats/NAME reads the answer, from any position. It never asks for one.
        app.mount("/chats", CallEvents(channel, user_of))
        yield {"channel": channel, "chat": channel.get_api(Chat)}


app = FastAPI(lifespan=lifespan)


@app.put("/chats/{name}")
async def ask(name: str, prompt: str, request: Request) -> Response:
    """The page makes up the name, so it can ask again when it doesn't know whether this came."""
    user = user_of(request.scope)
    if user is None:
        return Response(status_code=401)
    channel, chat = request.state.channel, request.state.chat
    try:
        await channel.start(chat.answer(prompt), key=key_of(user, name), keep=3600)
    except rpc.KeyConflictError:
        return Response(status_code=409)  # another prompt has that name
    return Response(status_code=202)


@app.get("/")
async def page(request: Request) -> FileResponse:
    response = FileResponse(Path(__file__).with_name("chat_page.html"))
    user = user_of(request.scope) or secrets.token_urlsafe()
    response.set_cookie("user", user, httponly=True, samesite="strict")
    return response
