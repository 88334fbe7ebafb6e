"""A response of Server-Sent Events that carries a worker's stream; used by fastapi_app.py."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from anyio_kkrpc import RemoteStream, RPCError


class Events(StreamingResponse):
    def __init__(self, stream: RemoteStream[Any]) -> None:
        # Without these a proxy may keep events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(encode(stream), media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Here and not in the generator below: when the browser goes away while a chunk is being
        # sent, Starlette leaves the generator to the garbage collector.
        async with self._stream:
            await super().__call__(scope, receive, send)


async def encode(stream: RemoteStream[Any]) -> AsyncIterator[str]:
    try:
        async for item in stream:
            yield f"data: {json.dumps(item)}\n\n"
        yield "event: done\ndata:\n\n"  # else EventSource would connect again, and ask again
    except RPCError as exc:
        yield f"event: failed\ndata: {json.dumps(str(exc))}\n\n"
