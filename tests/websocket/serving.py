"""ASGI servers for tests: one that hands over events by itself, and one with real sockets."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Any
from urllib.parse import unquote

import anyio
from anyio import EndOfStream, create_memory_object_stream
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.tls import TLSListener
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from tests.bounds import BOUND

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]
HEADERS = {"host": "shop.example"}


class Page:
    """The other side of an ASGI application's WebSocket, without a network."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope
        self._to_app, self._for_app = create_memory_object_stream[Message](inf)
        self._to_page, self._for_page = create_memory_object_stream[Message](inf)
        self.blocked: anyio.Event | None = None

    async def receive(self) -> Message:
        """What the application awaits."""
        return await self._for_app.receive()

    async def send(self, message: Message) -> None:
        """What the application calls."""
        if self.blocked is not None:
            await self.blocked.wait()
        await anyio.lowlevel.checkpoint()
        self._to_page.send_nowait(message)

    def tell(self, **message: Any) -> None:
        """Have an event happen to the application."""
        self._to_app.send_nowait(message)

    def say(self, message: str | bytes) -> None:
        """Send a message to the application."""
        kind = "text" if isinstance(message, str) else "bytes"
        self.tell(type="websocket.receive", **{kind: message})

    async def next_event(self) -> Message:
        """Return what the application sent next."""
        with anyio.fail_after(BOUND):
            return await self._for_page.receive()

    async def hear(self) -> Any:
        """Return the next message."""
        event = await self.next_event()
        assert event["type"] == "websocket.send", event
        return event["text"] if event.get("text") is not None else event["bytes"]

    async def hear_the_end(self) -> int:
        """Return the code with which the application closes, whatever it says before."""
        while (event := await self.next_event())["type"] != "websocket.close":
            pass
        return int(event["code"])

    def close(self) -> None:
        for stream in (self._to_app, self._for_app, self._to_page, self._for_page):
            stream.close()


def scope_of(
    path: str = "/",
    headers: dict[str, str] | None = None,
    subprotocols: Sequence[str] = (),
    **others: Any,
) -> dict[str, Any]:
    """Return an ASGI scope as servers make it."""
    pairs = {**HEADERS, **(headers or {})}.items()
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in pairs],
        "client": ("192.0.2.1", 1234),
        "server": ("shop.example", 80),
        "subprotocols": list(subprotocols),
        "extensions": {"websocket.http.response": {}},
        **others,
    }


@asynccontextmanager
async def asking(app: App, **scope: Any) -> AsyncIterator[Page]:
    """Ask an application to accept a WebSocket; at the end it is gone, and the application ends."""
    page = Page(scope_of(**scope))
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, page.scope, page.receive, page.send)
            page.tell(type="websocket.connect")
            yield page
            page.tell(type="websocket.disconnect", code=1001)
    finally:
        page.close()


@asynccontextmanager
async def opened(app: App, **scope: Any) -> AsyncIterator[Page]:
    """Open a WebSocket to an application."""
    async with asking(app, **scope) as page:
        event = await page.next_event()
        assert event["type"] == "websocket.accept", event
        yield page


# With sockets


class Connection:
    """A WebSocket of an ASGI application on a real connection, on any event loop."""

    def __init__(self, app: App, stream: ByteStream, compress: bool) -> None:
        self._app = app
        self._stream = stream
        extensions = [ServerPerMessageDeflateFactory()] if compress else None
        self.protocol = ServerProtocol(extensions=extensions, max_size=None)
        self._to_app, self._for_app = create_memory_object_stream[Message](inf)
        self._lock = anyio.Lock()
        self._request: Request | None = None
        self._parts: list[bytes] = []
        self._is_text = True

    async def run(self) -> None:
        async with (
            self._stream,
            self._to_app,
            self._for_app,
            anyio.create_task_group() as tasks,
        ):
            try:
                await self._read(tasks)
            except (EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.protocol.receive_eof()
            self._to_app.send_nowait({"type": "websocket.disconnect", "code": 1006})

    async def _read(self, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            self.protocol.receive_data(await self._stream.receive())
            for event in self.protocol.events_received():
                if isinstance(event, Request):
                    self._request = event
                    tasks.start_soon(self._run_app, self._scope(event), tasks)
                    self._to_app.send_nowait({"type": "websocket.connect"})
                else:
                    self._take(event)
            await self.flush()

    async def _run_app(self, scope: dict[str, Any], tasks: anyio.abc.TaskGroup) -> None:
        await self._app(scope, self._for_app.receive, self.send)
        tasks.cancel_scope.cancel()

    def _scope(self, request: Request) -> dict[str, Any]:
        path, _, query = request.path.partition("?")
        offered = [
            one.strip()
            for line in request.headers.get_all("Sec-WebSocket-Protocol")
            for one in line.split(",")
        ]
        headers = [(n.lower().encode(), v.encode()) for n, v in request.headers.raw_items()]
        return {
            **scope_of(unquote(path), subprotocols=offered),
            "headers": headers,
            "query_string": query.encode(),
        }

    def _take(self, frame: Any) -> None:
        if frame.opcode is Opcode.CLOSE:
            close = self.protocol.close_rcvd
            assert close is not None
            self._to_app.send_nowait(
                {"type": "websocket.disconnect", "code": close.code, "reason": close.reason}
            )
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        if frame.opcode is not Opcode.CONT:
            self._is_text, self._parts = frame.opcode is Opcode.TEXT, []
        self._parts.append(bytes(frame.data))
        if frame.fin:
            data = b"".join(self._parts)
            content = {"text": data.decode()} if self._is_text else {"bytes": data}
            self._to_app.send_nowait({"type": "websocket.receive", **content})

    async def send(self, message: Message) -> None:
        kind, protocol = message["type"], self.protocol
        if kind == "websocket.accept":
            assert self._request is not None
            response = protocol.accept(self._request)
            if message.get("subprotocol"):
                response.headers["Sec-WebSocket-Protocol"] = message["subprotocol"]
            protocol.send_response(response)
        elif kind == "websocket.send" and message.get("text") is not None:
            protocol.send_text(message["text"].encode())
        elif kind == "websocket.send":
            protocol.send_binary(message["bytes"])
        elif kind == "websocket.close":
            protocol.send_close(message["code"], message.get("reason") or "")
        elif kind == "websocket.http.response.start":
            self._status = message["status"]
        elif kind == "websocket.http.response.body":
            protocol.send_response(protocol.reject(self._status, message["body"].decode()))
        await self.flush()

    async def flush(self) -> None:
        async with self._lock:
            for data in self.protocol.data_to_send():
                if data:
                    await self._stream.send(data)
                else:
                    await self._stream.aclose()


@asynccontextmanager
async def serving(
    app: App, *, context: ssl.SSLContext | None = None, compress: bool = False
) -> AsyncIterator[str]:
    """Serve an application on loopback; give the beginning of its URL."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as tcp:
        port = tcp.extra(SocketAttribute.local_port)
        listener = tcp if context is None else TLSListener(tcp, context, standard_compatible=False)
        async with anyio.create_task_group() as tasks:

            async def serve_one(stream: Any) -> None:
                await Connection(app, stream, compress).run()

            tasks.start_soon(listener.serve, serve_one)
            yield f"ws://127.0.0.1:{port}" if context is None else f"wss://localhost:{port}"
            tasks.cancel_scope.cancel()
