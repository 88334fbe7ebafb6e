"""The client: a connection, its handshake, and servers that misbehave."""

from __future__ import annotations

import ssl
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trustme
from anyio.abc import SocketAttribute
from websockets.frames import Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from anyio_kkrpc import (
    RemoteError,
    RPCChannel,
    TransportClosedError,
    TransportConnectionError,
)
from anyio_kkrpc.websocket import Handshake, Refused, connect_websocket, endpoint
from tests.bounds import BOUND, CALL_BOUND

from .serving import serving
from .test_endpoint import Api

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def calling(url: str, **options: Any) -> AsyncIterator[Any]:
    async with (
        connect_websocket(url, **options) as transport,
        RPCChannel(transport, timeout=CALL_BOUND) as channel,
    ):
        yield channel


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codec": "cbor"},
        {"dialect": "kkrpc-2"},
        {"dialect": "kkrpc-0"},
        {"dialect": "kkrpc-0", "superjson": False},
    ],
    ids=str,
)
async def test_calls(options: dict[str, Any]) -> None:
    """In each way of speaking, over a real connection."""
    async with serving(endpoint(Api())) as url, calling(url + "/rpc?a=1", **options) as channel:
        api = channel.get_api()
        assert await api.add(1, 2) == 3
        with pytest.raises(RemoteError, match="no"):
            await api.fail()
        steps: list[int] = []
        assert await api.steps(3, steps.append) == "done"
        assert len([item async for item in api.count(50)]) == 50
        large = "ü" * 300_000
        assert len(await api.echo(large)) == len(large)
    if "dialect" not in options:
        async with serving(endpoint(Api())) as url, calling(url, **options) as channel:
            assert await channel.get_api().add(a=1, b=2) == 3


async def test_tls() -> None:
    """With the certificate checked; TLS may end without its own farewell."""
    authority = trustme.CA()
    server, client = (
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH),
        ssl.create_default_context(),
    )
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    async with serving(endpoint(Api()), context=server) as url:
        async with calling(url, ssl_context=client) as channel:
            assert await channel.get_api().add(1, 2) == 3
        with pytest.raises(TransportConnectionError, match="certificate"):
            async with calling(url):
                pytest.fail("the certificate isn't trusted")


async def test_headers() -> None:
    """They, the user in the URL and the origin get to the server."""
    seen: list[Handshake] = []

    async def authenticate(handshake: Handshake) -> None:
        seen.append(handshake)
        if "x-token" not in handshake.headers:
            raise Refused("no token", status=401)

    app = endpoint(Api(), authenticate=authenticate, origins=["https://a.example"])
    async with serving(app) as url:
        address = url.replace("ws://", "ws://ada:pw@")
        async with calling(address, headers={"X-Token": "t"}, origin="https://a.example"):
            pass
        assert seen[0].headers["authorization"] == "Basic YWRhOnB3"
        for refused, options in (
            ("401 Unauthorized: no token", {}),
            ("403 Forbidden: pages of https://b.example", {"origin": "https://b.example"}),
        ):
            with pytest.raises(TransportConnectionError, match=refused):
                async with calling(url, **options):
                    pytest.fail("refused")


async def test_compression() -> None:
    async with serving(endpoint(Api()), compress=True) as url:
        async with calling(url, compress=True) as channel:
            assert await channel.get_api().echo("x" * 100_000) == "x" * 100_000


async def test_server_that_leaves() -> None:
    """A call that waits fails: the server has closed the connection as it meant to."""
    api = Api()
    app = endpoint(api)
    async with serving(app) as url, calling(url) as channel, anyio.create_task_group() as tasks:

        async def leave() -> None:
            await api.waiting.wait()
            await app.aclose()

        tasks.start_soon(leave)
        with pytest.raises(TransportClosedError, match="the other side has closed"):
            await channel.get_api().wait()
        await channel.serve_forever()


async def test_leaving_tells_the_server() -> None:
    """With the closing handshake: it isn't a failure there."""
    app = endpoint(Api())
    async with serving(app) as url:
        async with calling(url) as channel:
            assert await channel.get_api().add(1, 2) == 3
        with anyio.fail_after(BOUND):
            while app.statistics().connections:
                await anyio.sleep(0.001)
        assert app.statistics().failed == 0


# Servers made by hand


@asynccontextmanager
async def by_hand(*actions: Any) -> AsyncIterator[tuple[str, list[Any]]]:
    """Accept one connection, and do to it what is said: bytes are sent as they are, after the
    handshake functions are given its protocol. Give the URL, and the frames that came.
    """
    frames: list[Any] = []

    async def serve_one(stream: Any) -> None:
        protocol = ServerProtocol(max_size=None)
        async with stream:
            while not (events := protocol.events_received()):
                protocol.receive_data(await stream.receive())
            request = events[0]
            assert isinstance(request, Request)
            if actions[:1] == ("silence",):
                await anyio.sleep_forever()
            if isinstance(actions[0], bytes):
                await stream.send(actions[0])
                return
            response = protocol.accept(request)
            if "Sec-WebSocket-Protocol" in request.headers and actions[0] != "no protocol":
                response.headers["Sec-WebSocket-Protocol"] = request.headers[
                    "Sec-WebSocket-Protocol"
                ]
            protocol.send_response(response)
            for action in actions:
                if callable(action):
                    action(protocol)
            for data in protocol.data_to_send():
                await stream.send(data)
            if actions[-1] == "cut":
                return
            try:
                while True:
                    protocol.receive_data(await stream.receive())
                    frames.extend(protocol.events_received())
                    for data in protocol.data_to_send():
                        if not data:
                            return
                        if actions[-1] != "deaf":
                            await stream.send(data)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve_one)
            yield f"ws://127.0.0.1:{port}", frames
            tasks.cancel_scope.cancel()


async def end_of(url: str, **options: Any) -> Exception:
    """Connect, wait for the end, and return why it came."""
    async with calling(url, **options) as channel:
        with anyio.fail_after(BOUND):
            try:
                await channel.serve_forever()
            except TransportConnectionError as exc:
                return exc
            with pytest.raises(TransportClosedError) as caught:
                await channel.get_api().x()
            return caught.value


def closing(code: int | None, reason: str = "") -> Any:
    return lambda protocol: protocol.send_close(code, reason)


@pytest.mark.parametrize("code", [1000, 1001, None, 1012])
async def test_codes_of_a_clean_end(code: int | None) -> None:
    async with by_hand(closing(code)) as (url, _):
        assert isinstance(await end_of(url), TransportClosedError)


@pytest.mark.parametrize("code", [1011, 1008, 4401])
async def test_codes_of_errors(code: int) -> None:
    """Code and reason are in the error."""
    async with by_hand(closing(code, "oops\n")) as (url, _):
        error = await end_of(url)
        assert isinstance(error, TransportConnectionError)
        assert f"{code}: oops\\n" in str(error)


async def test_connection_that_is_cut() -> None:
    async with by_hand("cut") as (url, _):
        error = await end_of(url)
        assert isinstance(error, TransportConnectionError)
        assert "without a farewell" in str(error)


def fragments(count: int, size: int) -> Any:
    """Send one message in parts, which together may be too large."""

    def send(protocol: ServerProtocol) -> None:
        protocol.send_text(b"x" * size, fin=False)
        for _ in range(count - 2):
            protocol.send_continuation(b"x" * size, fin=False)
        protocol.send_continuation(b"x" * size, fin=True)

    return send


def frame_of(head: int, payload: bytes) -> Any:
    return lambda protocol: protocol.writes.append(bytes([head, len(payload)]) + payload)


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (lambda protocol: protocol.send_text(b"x" * 1001), 1009),
        (fragments(11, 100), 1009),
        (frame_of(0x83, b""), 1002),  # an opcode that doesn't exist
        (frame_of(0x80, b""), 1002),  # the rest of nothing
        (frame_of(0xC1, b"x"), 1002),  # an extension that wasn't agreed on
        (frame_of(0x88, b"\x00\x01"), 1002),  # a code that can't be
    ],
    ids=["large", "fragments", "opcode", "continuation", "extension", "code"],
)
async def test_hostile_servers(action: Any, code: int) -> None:
    """The connection ends with an error here, and the server is told why."""
    async with by_hand(action) as (url, frames):
        assert isinstance(await end_of(url, max_message_size=1000), TransportConnectionError)
        with anyio.fail_after(BOUND):
            while not frames:
                await anyio.sleep(0.001)
        assert frames[-1].opcode is Opcode.CLOSE
        assert int.from_bytes(frames[-1].data[:2], "big") == code


async def test_decompression_bomb() -> None:
    """It isn't inflated beyond the bound."""
    packer = zlib.compressobj(wbits=-15)
    bomb = packer.compress(b"x" * (1 << 26)) + packer.flush(zlib.Z_SYNC_FLUSH)
    head = bytes([0xC1, 126]) + len(bomb).to_bytes(2, "big")
    if len(bomb) > 65535:
        head = bytes([0xC1, 127]) + len(bomb).to_bytes(8, "big")

    sent = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        connection = send.__self__
        connection.protocol.writes.append(head + bomb)
        await connection.flush()
        sent.set()
        while (await receive())["type"] != "websocket.disconnect":
            pass

    async with serving(app, compress=True) as url:
        error = await end_of(url, compress=True, max_message_size=1 << 20, dialect="kkrpc-2")
        assert isinstance(error, TransportConnectionError)
        assert "exceeds" in str(error)
        assert sent.is_set()


async def test_empty_fragments_are_not_kept() -> None:
    """Any number of them may come before a message, and in it."""

    def send(protocol: ServerProtocol) -> None:
        protocol.send_text(b"", fin=False)
        for _ in range(1000):
            protocol.send_continuation(b"", fin=False)
        protocol.send_continuation(b"nonsense", fin=True)
        protocol.send_close(4000)

    async with by_hand(send) as (url, _):
        assert "4000" in str(await end_of(url))


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        (
            (b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",),
            "refused.*302 Found",
        ),
        ((b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\na\nb",), r"500 .*: a\\nb"),
        ((b"nonsense\r\n\r\n",), "can't speak WebSocket"),
        ((b"HTTP/1.1 101 Switching Protocols\r\n\r\n",), "can't speak WebSocket"),
        ((b"",), "can't speak WebSocket|can't be connected to"),
        (("no protocol",), "doesn't speak anyio-kkrpc.json"),
    ],
)
async def test_refusals(actions: tuple[Any, ...], said: str) -> None:
    """What the server says is in the error, quoted."""
    async with by_hand(*actions) as (url, _):
        with pytest.raises(TransportConnectionError, match=said):
            async with connect_websocket(url):
                pytest.fail("there is no WebSocket")


async def test_nobody_there() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
    with pytest.raises(TransportConnectionError, match="can't be connected to"):
        async with connect_websocket(f"ws://127.0.0.1:{port}"):
            pytest.fail("nobody is there")


async def test_server_that_says_nothing() -> None:
    async with by_hand("silence") as (url, _):
        with pytest.raises(TransportConnectionError, match="within 0.05 seconds"):
            async with connect_websocket(url, connect_timeout=0.05):
                pytest.fail("there is no WebSocket")
        with anyio.move_on_after(0.05) as scope:
            async with connect_websocket(url):
                pytest.fail("there is no WebSocket")
        assert scope.cancelled_caught


async def test_pings_are_answered_and_sent() -> None:
    """A server that is there answers them by itself; one that doesn't is given up."""

    def ping(protocol: ServerProtocol) -> None:
        protocol.send_ping(b"abc")

    async with by_hand(ping) as (url, frames):
        async with calling(url, ping_interval=0.01, ping_timeout=CALL_BOUND):
            with anyio.fail_after(BOUND):
                while (kinds := [f.opcode for f in frames]).count(Opcode.PING) < 3 or (
                    Opcode.PONG not in kinds
                ):
                    await anyio.sleep(0.001)
        assert [bytes(f.data) for f in frames if f.opcode is Opcode.PONG] == [b"abc"]
    async with by_hand("deaf") as (url, _):
        error = await end_of(url, ping_interval=0.01, ping_timeout=0.01)
        assert "no answer to a ping within 0.01 seconds" in str(error)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"url": "http://a"}, "url"),
        ({"url": "ws://a:x"}, "url"),
        ({"url": "ws://a", "ssl_context": ssl.create_default_context()}, "ssl_context"),
        ({"url": "ws://a", "connect_timeout": 0}, "connect_timeout"),
        ({"url": "ws://a", "compress": 1}, "compress"),
        ({"url": "ws://a", "headers": {"a": "b\r\nc: d"}}, "headers"),
        ({"url": "ws://a", "ping_interval": -1}, "ping_interval"),
        ({"url": "ws://a", "nope": 1}, "nope"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_options(options: dict[str, Any], error: str) -> None:
    """What is wrong is said before anything is connected."""
    with pytest.raises((ValueError, TypeError), match=error):
        async with connect_websocket(**options):
            pytest.fail("connected")
