"""A worker's stream as Server-Sent Events, for Starlette and FastAPI. Needs the extra ``sse``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, final

try:
    from starlette.responses import StreamingResponse
    from starlette.types import Receive, Scope, Send
except ImportError as _error:
    raise ImportError(f"{_error.name} is missing: pip install 'anyio_kkrpc[sse]'") from _error

from ._driver._inflow import RemoteStream
from ._exceptions import RPCError
from .asgi import json_of

__all__ = ("Events",)


@final
class Events(StreamingResponse):
    """A response that sends each item of a stream as an event, as JSON.

    At the end comes an event ``done`` without data, after which the page is to close its
    ``EventSource``: that would connect again, and ask again. If the stream fails, the last event is
    ``failed``, with the error's text. When the browser goes away, the stream is left at once, and
    its source closed.

    :param stream: a stream that was opened: ``await api.tokens(prompt)``. What refuses it is raised
        there, before the response begins, and can still be a status.
    :param status_code: of HTTP
    :param headers: further ones
    """

    def __init__(
        self,
        stream: RemoteStream[Any],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(stream, RemoteStream):
            raise TypeError(f"stream: needs a RemoteStream, awaited, not {stream!r:.80}")
        self._stream, self._events = stream, _encode(stream)
        super().__init__(
            self._events,
            status_code,
            # Without these a proxy may keep events back.
            {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})},
            media_type="text/event-stream",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; called by the framework."""
        # When the browser goes away while a chunk is being sent, Starlette leaves the generator to
        # the garbage collector.
        async with self._stream, aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _encode(stream: RemoteStream[Any]) -> AsyncGenerator[bytes, None]:
    try:
        async for item in stream:
            yield b"data: %b\n\n" % json_of(item)
        yield b"event: done\ndata:\n\n"
    except (RPCError, TypeError) as exc:  # the latter of what can't be JSON
        yield b"event: failed\ndata: %b\n\n" % json_of(str(exc))
