"""The server's end of a WebSocket, as ASGI gives it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias, final

from anyio import Lock

from ._socket import NO_CODE, Socket, end_of

__all__ = ("AsgiSocket",)

logger: logging.Logger = logging.getLogger("anyio_kkrpc")

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


@final
class AsgiSocket(Socket):
    """A WebSocket that an ASGI application has accepted."""

    def __init__(self, receive: Receive, send: Send) -> None:
        super().__init__()
        self._receive = receive
        self._send = send
        self._open = True
        # The reader answers pings while the writer writes.
        self._lock = Lock(fast_acquire=True)

    async def receive(self) -> tuple[bytes, bool]:
        while True:
            message = await self._receive()
            if message["type"] == "websocket.receive":
                self.hear()
                text = message.get("text")
                if text is None:
                    return bytes(message.get("bytes") or b""), False
                return text.encode(errors="surrogatepass"), True
            if message["type"] == "websocket.disconnect":
                self._open = False
                raise end_of(message.get("code", NO_CODE), message.get("reason") or "")

    async def send(self, message: bytes, text: bool) -> None:
        event: Message = {"type": "websocket.send"}
        if text:
            event["text"] = message.decode()
        else:
            event["bytes"] = message
        async with self._lock:
            await self._send(event)

    async def close(self, code: int, reason: str) -> None:
        if not self._open:
            return
        self._open = False
        try:
            await self._send({"type": "websocket.close", "code": code, "reason": reason})
        except Exception as exc:  # each server has its own for a browser that is gone
            logger.debug("a WebSocket was closed with an error: %r", exc)


async def refuse(
    scope: Scope, send: Send, status: int, reason: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """Answer a handshake by an HTTP status; servers that can't make it 403."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008, "reason": reason[:100]})
        return
    await respond(send, "websocket.http", status, reason, headers)


async def respond(
    send: Send, kind: str, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """Answer by a line of plain text."""
    body = text.encode()
    own = [("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(body)))]
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in (*own, *headers)]
    await send({"type": f"{kind}.response.start", "status": status, "headers": encoded})
    await send({"type": f"{kind}.response.body", "body": body})
