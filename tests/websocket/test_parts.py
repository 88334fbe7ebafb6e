"""Parts of WebSockets alone, and two transports over a socket without a network."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from anyio_kkrpc import RPCChannel, TransportClosedError
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.kit import Messages
from anyio_kkrpc.testing import check_transport
from anyio_kkrpc.websocket._asgi import AsgiSocket, refuse
from anyio_kkrpc.websocket._asking import ANSWER, Asking
from anyio_kkrpc.websocket._handshake import Handshake, choose, handshake_of, known_protocols
from anyio_kkrpc.websocket._socket import Socket, end_of, short
from anyio_kkrpc.websocket._transport import WebSocketTransport
from tests.bounds import BOUND, CALL_BOUND

from .serving import scope_of

pytestmark = pytest.mark.anyio


class MemorySocket(Socket):
    """One end of a socket in one process."""

    def __init__(self, out: ObjectSendStream[Any], into: ObjectReceiveStream[Any]) -> None:
        super().__init__()
        self._out, self._into = out, into
        self.code: int | None = None
        self.received = 0

    async def receive(self) -> tuple[bytes, bool]:
        try:
            message = await self._into.receive()
        except (EndOfStream, anyio.ClosedResourceError):
            raise EndOfStream from None
        self.hear()
        self.received += 1
        return message  # type: ignore[no-any-return]

    async def send(self, message: bytes, text: bool) -> None:
        await self._out.send((message, text))

    async def close(self, code: int, reason: str) -> None:
        self.code = self.code or code
        await self._out.aclose()


@asynccontextmanager
async def sockets() -> AsyncIterator[tuple[MemorySocket, MemorySocket]]:
    there = anyio.create_memory_object_stream[Any](10)
    back = anyio.create_memory_object_stream[Any](10)
    async with there[0], there[1], back[0], back[1]:
        yield MemorySocket(there[0], back[1]), MemorySocket(back[0], there[1])


@asynccontextmanager
async def transports(
    **options: Any,
) -> AsyncIterator[tuple[WebSocketTransport, WebSocketTransport]]:
    async with (
        sockets() as (a, b),
        WebSocketTransport(a, **options) as one,
        WebSocketTransport(b, **options) as two,
    ):
        yield one, two


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_contract(codec: str) -> None:
    """That of all transports."""
    await check_transport(lambda: transports(codec=codec))


async def test_signs_of_life_of_two_peers() -> None:
    """Neither gives the other up while both are there, though nothing is said."""
    async with transports(ping_interval=0.01, ping_timeout=CALL_BOUND) as (one, two):
        async with RPCChannel(one) as client, RPCChannel(two, expose={"f": lambda: 1}) as server:
            with anyio.fail_after(BOUND):
                while min(one._socket.received, two._socket.received) < 5:
                    await anyio.sleep(0.001)
            assert await client.get_api().f() == 1
            assert server.statistics().ignored == client.statistics().ignored == 0


async def test_close_with_a_code() -> None:
    """The first one counts."""
    async with sockets() as (a, b), WebSocketTransport(b):
        async with WebSocketTransport(a) as one:
            await one.aclose(4000, "x" * 200)
            await one.aclose()
            with pytest.raises(TransportClosedError):
                await one.receive()
        assert a.code == 4000


async def test_cancelled_while_closing() -> None:
    """It is closed all the same."""
    async with sockets() as (a, _):
        with anyio.CancelScope() as scope:
            async with WebSocketTransport(a):
                scope.cancel()
        assert a.code == 1000


def messages(dialect: str) -> Messages:
    async def nothing(*_: Any) -> None:
        return None

    return Messages(nothing, nothing, dialect=dialect)


def test_parts_of_frames() -> None:
    """Lines are parted, and put together, where a peer may be of kkrpc 0.x; nothing else is."""
    whole = b'{"a":1}'
    for dialect in ("kkrpc-2", "kkrpc-0"):
        asking = Asking(messages(dialect))
        assert asking.parts(whole) == asking.parts(whole + b"\n") == [whole]
        assert asking.parts(whole + b"\n\n" + whole + b"\n") == [whole, whole]
        assert asking.parts(b'{\n"a": 1\n}\n') == [b'{\n"a": 1\n}\n']
        assert asking.parts(whole[:3]) == []
        assert asking.unread == 3
        assert asking.parts(whole[3:] + b"\n") == [whole]
        assert asking.unread == 0
        assert asking.parts(whole[:3]) == []
        assert asking.parts(whole) == [whole], "what was begun is not ended any more"
        assert asking.parts(b"nonsense") == [b"nonsense"]
    native = Asking(messages("native"))
    assert native.parts(b'{"a"\n') == [b'{"a"\n']


def test_ends_of_lines() -> None:
    """Until a peer has said something it may be of either generation."""
    for dialect, before, after in (
        ("native", b"", b""),
        ("kkrpc-0", b"\n", b"\n"),
        ("kkrpc-2", b"\n", b""),
    ):
        own = messages(dialect)
        assert Asking(own).end_of_line == before
        own.received += 1
        assert Asking(own).end_of_line == after


def test_answers_to_questions() -> None:
    """They go no further; what only looks like one does, unless there was a question."""
    asking = Asking(messages("kkrpc-0"))
    answer = b"{" + ANSWER + b"}"
    assert asking.parts(answer) == [answer]
    assert asking.questions()[1] is False
    assert asking.parts(answer) == []
    assert asking.parts(answer) == [answer]
    assert asking.questions()[1] is True, "it has answered once"
    large = b"{" + ANSWER + b',"a":"' + b"x" * 5000 + b'"}'
    assert asking.parts(large) == [large]


def test_ends() -> None:
    for code in (1000, 1001, 1005, 1012):
        assert isinstance(end_of(code, ""), EndOfStream)
    error = end_of(1011, "oops")
    assert isinstance(error, BrokenResourceError)
    assert str(error) == "the other side has closed the WebSocket with 1011: oops"
    assert short("€" * 100) == "€" * 41


async def test_refusal_without_the_extension() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await refuse({"extensions": None}, send, 401, "no")
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "no"}]


async def test_servers_that_fail_to_close() -> None:
    """Each has an error of its own for a browser that is gone; it goes no further, and no second
    time.
    """
    calls = 0

    async def send(message: Any) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("gone")

    async def receive() -> Any:
        return {"type": "websocket.disconnect"}

    asgi = AsgiSocket(receive, send)
    await asgi.close(1000, "")
    await asgi.close(1000, "")
    assert calls == 1
    with pytest.raises(EndOfStream):
        await AsgiSocket(receive, send).receive()


def test_handshakes() -> None:
    """What an ASGI scope tells, however little that is."""
    headers = {"cookie": "a=1; b=x y; bad", "x": "1"}
    told = handshake_of(scope_of("/p", headers, query_string=b"q=%20"))
    assert (told.path, told.query, told.client, told.origin) == ("/p", "q=%20", "192.0.2.1", None)
    assert told.cookies == {"a": "1", "b": "x y"}
    assert handshake_of({"type": "websocket", "client": None}) == Handshake(
        "", "", {}, None, None, (), {"type": "websocket", "client": None}
    )
    twice = [(b"Cookie", b"a=1"), (b"cookie", b'b="2"')]
    assert handshake_of({"headers": twice}).cookies == {"a": "1", "b": "2"}


def test_choices() -> None:
    """This library's own sub-protocols come first, in the order in which they are offered."""
    own = known_protocols(get_codec("json"))
    assert set(own) == {"anyio-kkrpc.json", "anyio-kkrpc.cbor"}
    chosen = choose(["x", "anyio-kkrpc.cbor"], own, ["x"], "kkrpc-2", get_codec("json"))
    assert (chosen[0], chosen[1], chosen[2].name) == ("anyio-kkrpc.cbor", "native", "cbor")
    chosen = choose(["x"], own, ["x"], "kkrpc-2", get_codec("cbor"))
    assert (chosen[0], chosen[1], chosen[2].name) == ("x", "kkrpc-2", "json")
    chosen = choose([], own, ["x"], "native", get_codec("cbor"))
    assert (chosen[0], chosen[1], chosen[2].name) == (None, "native", "cbor")


async def test_numbers_of_messages() -> None:
    """Transports see how much came and made no sense."""
    own = messages("kkrpc-2")
    own.take(b"{")
    own.take(json.dumps({"t": "r", "id": "1"}).encode())
    assert (own.received, own.invalid) == (1, 1)
    assert own.dialect == "kkrpc-2"
    request = {"id": "1", "method": "f", "args": [], "type": "request"}
    own.take(json.dumps(request).encode())
    assert own.dialect == "kkrpc-0"
