"""As much of HTTP/1.1 as a probe and a scraper need: GET, one request for each connection.

A library for three short texts would bring a server's worth of dependencies. What is asked is
bounded in size and time, and so is the number of those who ask at a time; nothing that they send
or leave out ends it, or keeps the next one from being answered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    create_task_group,
    create_tcp_listener,
    move_on_after,
    sleep,
)
from anyio.abc import ByteStream, SocketAttribute, SocketListener
from msgspec import Struct

# Bytes of the request line and the headers; seconds for them to come, for the answer to be found,
# and for it to be taken; how many may ask at a time.
MOST_BYTES = 8192
REQUEST_TIMEOUT = 2.0
ANSWER_TIMEOUT = SEND_TIMEOUT = 5.0
MOST_CONNECTIONS = 32
# Seconds until the next attempt when the system can't take a connection: no file descriptor, say.
_PAUSE = 0.1
LOOPBACK = "127.0.0.1"

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Answer(Struct, frozen=True):
    """What is told.

    :ivar status: of HTTP
    :ivar text: lines
    """

    status: int
    text: str
    type: str = "text/plain; charset=utf-8"


Respond = Callable[[str], Awaitable[Answer]]
"""Answers a path."""


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; without a host it is the loopback interface.

    :raises ValueError: if it is none
    """
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"needs HOST:PORT, with an IPv6 address in brackets, not {text!r:.80}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536):
        raise ValueError(f"needs HOST:PORT, not {text!r:.80}")
    return host or LOOPBACK, int(port)


async def bind(host: str, port: int) -> list[SocketListener]:
    """Return what listens there: a name may stand for more than one address.

    :raises OSError: if nothing can listen there
    """
    found = (await create_tcp_listener(local_host=host, local_port=port)).listeners
    return [listener for listener in found if isinstance(listener, SocketListener)]


def url_of(listener: SocketListener) -> str:
    """Return where it listens."""
    address: Any = listener.extra(SocketAttribute.local_address)
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(listeners: list[SocketListener], respond: Respond) -> None:
    """Answer until it is cancelled."""
    room = _Room()
    async with create_task_group() as group:

        async def accept(listener: SocketListener) -> None:
            while True:
                try:
                    stream = await listener.accept()
                except OSError:
                    await sleep(_PAUSE)
                    continue
                exchange = _Exchange(stream, respond)
                room.let_in(exchange)
                group.start_soon(room.run, exchange, name="anyio_kkrpc http request")

        for listener in listeners:
            group.start_soon(accept, listener, name="anyio_kkrpc http")


class _Room:
    """Has so many exchanges at a time; for one more, another one goes.

    That is the one that waits longest for its peer, to say what it wants or to take the answer, so
    that those who only connect keep no probe from its answer. If none does, it is the oldest.
    """

    def __init__(self) -> None:
        self._inside: list[_Exchange] = []

    def let_in(self, exchange: _Exchange) -> None:
        """Make room for an exchange that is about to run."""
        if len(self._inside) >= MOST_CONNECTIONS:
            idle = (one for one in self._inside if one.is_idle)
            leaving = next(idle, self._inside[0])
            leaving.scope.cancel()
            self._inside.remove(leaving)
        self._inside.append(exchange)

    async def run(self, exchange: _Exchange) -> None:
        """Run it to its end."""
        try:
            await exchange.run()
        finally:
            if exchange in self._inside:
                self._inside.remove(exchange)


class _Exchange:
    """A connection, its request and its answer.

    :ivar scope: ends it when it is cancelled
    :ivar is_idle: whether it waits for its peer
    """

    def __init__(self, stream: ByteStream, respond: Respond) -> None:
        self._stream = stream
        self._respond = respond
        self.scope = CancelScope()
        self.is_idle = True

    async def run(self) -> None:
        """Read the request, and answer it. What becomes of the connection ends nothing else."""
        try:
            async with self._stream:
                with self.scope:
                    await self._answer()
        except (BrokenResourceError, ClosedResourceError, OSError):
            pass

    async def _answer(self) -> None:
        method, answer = "GET", Answer(408, "no request came in time\n")
        with move_on_after(REQUEST_TIMEOUT):
            head = await _receive_head(self._stream)
            if head is None:
                return
            method, answer = _read(head)
        if answer.status == 200:
            self.is_idle = False
            answer = await _ask(self._respond, answer.text)
            self.is_idle = True
        body = answer.text.encode()
        lines = (
            f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}",
            f"Content-Type: {answer.type}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "Connection: close",
            *(("Allow: GET, HEAD",) if answer.status == 405 else ()),
        )
        header = "\r\n".join(lines).encode() + b"\r\n\r\n"
        with move_on_after(SEND_TIMEOUT):
            await self._stream.send(header if method == "HEAD" else header + body)


async def _receive_head(stream: ByteStream) -> bytes | None:
    """Return request line and headers, or as much as is too much; ``None`` if there is none."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) <= MOST_BYTES:
        try:
            head += await stream.receive(MOST_BYTES)
        except EndOfStream:
            return None
    return head


def _read(head: bytes) -> tuple[str, Answer]:
    """Return method and path of a request; what is wrong with it, if it isn't answered."""
    if len(head) > MOST_BYTES:
        return "GET", Answer(431, f"more than {MOST_BYTES} bytes of headers\n")
    words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
        return "GET", Answer(400, "this is no request of HTTP/1\n")
    method, target, _ = words
    if method not in ("GET", "HEAD"):
        return "GET", Answer(405, "only GET and HEAD\n")
    return method, Answer(200, target.partition("?")[0])


async def _ask(respond: Respond, path: str) -> Answer:
    try:
        with move_on_after(ANSWER_TIMEOUT):
            return await respond(path)
    except Exception as exc:  # whoever asks must not end the service
        return Answer(500, f"{type(exc).__name__}: {exc}\n")
    return Answer(503, "there was no answer in time\n")
