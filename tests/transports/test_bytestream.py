"""The byte stream transport, with peers that misbehave."""

from __future__ import annotations

import logging
import socket
from typing import Any

import anyio
import msgspec
import pytest
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from anyio_kkrpc import (
    ByteStreamTransport,
    OverloadedError,
    RemoteError,
    RPCChannel,
    RPCTimeoutError,
    RPCValidationError,
    TransportClosedError,
    TransportConnectionError,
)
from anyio_kkrpc._protocol._records import Reply, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.transports._framing import LengthFraming
from tests.bounds import BOUND, CALL_BOUND

pytestmark = pytest.mark.anyio


async def sockets() -> tuple[SocketStream, SocketStream]:
    """Two connected TCP streams."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
        accepted: list[SocketStream] = []

        async def accept() -> None:
            accepted.append(await listener.listeners[0].accept())  # type: ignore[attr-defined]

        async with anyio.create_task_group() as group:
            group.start_soon(accept)
            stream = await anyio.connect_tcp("127.0.0.1", port)
        # On asyncio AnyIO reads an accepted socket without bound until somebody waited for data.
        async with anyio.create_task_group() as group:
            group.start_soon(accepted[0].receive)
            await anyio.wait_all_tasks_blocked()
            await stream.send(b"x")
        return stream, accepted[0]


async def receive_all(stream: ByteStream, wanted: int) -> bytes:
    """Read until so many newlines have come."""
    chunks: list[bytes] = []
    lines = 0
    with anyio.fail_after(BOUND):
        while lines < wanted:
            chunks.append(await stream.receive())
            lines += chunks[-1].count(b"\n")
    return b"".join(chunks)


def request(n: int, size: int = 0) -> Envelope:
    return Envelope(Request(str(n), "call", ["f"], a=["x" * size]))


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("codec", "xml", ValueError),
        ("max_message_size", 0, ValueError),
        ("max_message_size", 1 << 32, ValueError),
        ("max_message_size", "1", TypeError),
        ("max_queue_size", 0, ValueError),
        ("max_queue_bytes", -1, ValueError),
        ("overflow", "block", ValueError),
        ("overflow", "no", ValueError),
        ("write_timeout", 0, ValueError),
        ("write_timeout", "1", TypeError),
    ],
)
def test_wrong_options(option: str, value: Any, error: type[Exception]) -> None:
    """A wrong option fails in the constructor, and the error names it."""
    with pytest.raises(error, match=f"^{option}:" if option != "codec" else option):
        ByteStreamTransport(None, **{option: value})  # type: ignore[arg-type]


async def test_lines_are_those_of_kkrpc() -> None:
    """JSON goes as bare messages, one a line; what comes is read so too, cut at any place."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream) as transport:
        await transport.send(Envelope(Request("7", "call", ["math", "add"], a=[1, 2])))
        assert await receive_all(peer, 1) == (
            b'{"t":"q","id":"7","op":"call","p":["math","add"],"a":[1,2]}\n'
        )
        line = b'{"t":"q","id":"8","op":"get","p":["x"]}\r\n'
        async with anyio.create_task_group() as group:

            async def send() -> None:
                for byte in line:
                    await peer.send(bytes([byte]))

            group.start_soon(send)
            with anyio.fail_after(BOUND):
                assert (await transport.receive()).record == Request("8", "get", ["x"])
        statistics = transport.statistics()
        assert (statistics.sent, statistics.received) == (1, 1)


async def test_bad_frames_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """Rubbish and frames that are too large are counted and logged; the next one is read."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream, max_message_size=1000) as transport:
        await peer.send(b"rubbish\n" + b'{"t":"zap"}\n' + b"\xff\xfe\n" + b"x" * 5000 + b"\n")
        await peer.send(b'{"t":"q","id":"1","op":"get","p":[]}\n')
        with anyio.fail_after(BOUND):
            assert (await transport.receive()).record == Request("1", "get", [])
        statistics = transport.statistics()
        assert (statistics.invalid, statistics.oversized, statistics.received) == (3, 1, 1)
    assert "larger than max_message_size (1000 bytes)" in caplog.text


async def test_too_large_to_send() -> None:
    """A message above the limit fails at its sender, by name and size, and nothing is written."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream, max_message_size=1000) as transport:
        with pytest.raises(OverloadedError, match=r"exceeds max_message_size \(1000 bytes\)"):
            await transport.send(request(1, size=1000))
        await transport.send(request(2))
        assert (await receive_all(peer, 1)).startswith(b'{"t":"q","id":"2"')


async def test_default_limit_is_16_mebibytes() -> None:
    """The limit applies to the encoded record, and its default is 16 MiB."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream, codec="cbor") as transport:
        with pytest.raises(OverloadedError, match="16777216"):
            await transport.send(Envelope(Reply("1", bytes(16 * 1024 * 1024))))


async def test_cbor_frames() -> None:
    """CBOR goes with a length before it."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream, codec="cbor") as transport:
        await transport.send(Envelope(Reply("1", b"\n\x00")))
        with anyio.fail_after(BOUND):
            (frame,) = LengthFraming(100).feed(await peer.receive())
        import cbor2

        assert cbor2.loads(frame) == {"t": "r", "id": "1", "v": b"\n\x00"}


async def test_peer_that_closes() -> None:
    """The end of the stream, also in the middle of a frame, is the end; calls fail at once."""
    for last in (b"", b'{"t":"q","id"'):
        stream, peer = await sockets()
        async with ByteStreamTransport(stream) as transport, RPCChannel(transport) as channel:
            async with anyio.create_task_group() as group:

                async def call() -> None:
                    with pytest.raises(TransportClosedError, match="other side has closed"):
                        await channel.get_api().f()

                group.start_soon(call)
                await receive_all(peer, 1)
                if last:
                    await peer.send(last)
                await peer.aclose()
            with anyio.fail_after(BOUND):
                await channel.serve_forever()
            with pytest.raises(TransportClosedError):
                await transport.send(request(1))


async def test_connection_that_breaks() -> None:
    """A reset is a connection error with its cause, for whoever waits and whoever comes later."""
    stream, peer = await sockets()
    async with ByteStreamTransport(stream) as transport:
        raw = peer.extra(SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        async with anyio.create_task_group() as group:

            async def receive() -> None:
                with pytest.raises(TransportConnectionError) as caught:
                    await transport.receive()
                assert caught.value.__cause__ is not None

            group.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            await peer.aclose()
        with pytest.raises(TransportConnectionError):
            await transport.send(request(1))


async def test_slow_reader_pushes_back_and_tears_nothing() -> None:
    """While the peer doesn't read, senders wait; cancelled ones leave whole frames; then all that
    was sent arrives in order of sending."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream, write_timeout=CALL_BOUND) as transport:
        done = 0

        async def send(n: int) -> None:
            nonlocal done
            await transport.send(request(n, size=100_000))
            done += 1

        async with anyio.create_task_group() as group:
            for n in range(200):
                group.start_soon(send, n)
            for _ in range(50):
                await anyio.lowlevel.checkpoint()
            assert done < 200

            async def read() -> None:
                data = await receive_all(peer, 200)
                lines = data.splitlines()
                ids = [msgspec.json.decode(line)["id"] for line in lines]
                assert sorted(ids, key=int) == [str(n) for n in range(200)]

            group.start_soon(read)
        assert done == 200


async def test_cancelled_senders_tear_nothing() -> None:
    """Senders that are cancelled while the peer reads slowly leave whole frames only."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream, write_timeout=CALL_BOUND) as transport:
        data = bytearray()

        async def read() -> None:
            while b'"id":"last"' not in data[-100:]:
                data.extend(await peer.receive(50_000))

        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as outer:
                for n in range(30):
                    async with anyio.create_task_group() as group:
                        for _ in range(3):
                            group.start_soon(transport.send, request(n, size=300_000))
                        await anyio.lowlevel.checkpoint()
                        group.cancel_scope.cancel()
                        if n == 0:
                            outer.start_soon(read)
                await transport.send(Envelope(Request("last", "get", [])))
        lines = data.splitlines()
        assert len(lines) > 1
        for line in lines:
            msgspec.json.decode(line)


async def test_peer_that_never_reads() -> None:
    """After the write timeout the transport is broken, and says so."""
    stream, peer = await sockets()
    async with peer, ByteStreamTransport(stream, write_timeout=0.2) as transport:
        with anyio.fail_after(BOUND), pytest.raises(TransportConnectionError, match="lost"):
            while True:
                await transport.send(request(1, size=1_000_000))


async def test_peer_that_asks_and_never_reads() -> None:
    """What it is owed is bounded while it goes on asking, and then what is left is still told."""
    stream, peer = await sockets()
    ask = b'{"t":"sq","id":"%d","sid":"none","op":"return","v":"' + b"x" * 65536 + b'"}\n'
    async with (
        peer,
        ByteStreamTransport(stream, write_timeout=10 * BOUND) as transport,
        RPCChannel(transport, expose={"f": lambda: 1}) as channel,
    ):
        count = 0
        with anyio.fail_after(BOUND):
            while not channel.statistics().undelivered:
                await peer.send(ask % count)
                count += 1
        await peer.send(b'{"t":"q","id":"q","op":"call","p":["f"],"a":[]}\n')
        lines: list[bytes] = []
        rest = b""
        with anyio.fail_after(BOUND):
            while not any(b'"t":"r"' in line for line in lines):
                *more, rest = (rest + await peer.receive()).split(b"\n")
                lines += more
        told = [line for line in lines if b'"t":"sr"' in line]
        assert 0 < channel.statistics().undelivered < count
        await peer.send(b'{"t":"sq","id":"last","sid":"none","op":"pull"}\n')
        with anyio.fail_after(BOUND):
            while b"last" not in rest:
                rest += await peer.receive()
        told += [line for line in rest.split(b"\n") if b'"t":"sr"' in line]
        assert len(told) + channel.statistics().undelivered == count + 1


async def test_full_queue_answers_overloaded(caplog: pytest.LogCaptureFixture) -> None:
    """A request that finds no room is answered, and replies behind it are read."""
    stream, other = await sockets()
    started, gate = anyio.Event(), anyio.Event()

    class Slow:
        async def slow(self, n: int) -> int:
            started.set()
            await gate.wait()
            return n

    with caplog.at_level(logging.WARNING):
        async with (
            ByteStreamTransport(stream, max_queue_size=2) as mine,
            ByteStreamTransport(other) as theirs,
            RPCChannel(mine, expose=Slow(), max_concurrency=1),
            RPCChannel(theirs, timeout=CALL_BOUND) as client,
        ):
            results: dict[int, Any] = {}

            async def call(n: int) -> None:
                try:
                    results[n] = await client.get_api().slow(n)
                except OverloadedError as exc:
                    results[n] = exc

            async with anyio.create_task_group() as group:
                group.start_soon(call, 0)
                await started.wait()
                for n in range(1, 6):
                    group.start_soon(call, n)
                    with anyio.fail_after(BOUND):
                        while mine.statistics().received < n + 1:
                            await anyio.sleep(0.001)
                gate.set()
        assert [results[n] for n in range(3)] == [0, 1, 2]
        assert all(isinstance(results[n], OverloadedError) for n in (3, 4, 5))
    assert "Message queue full (2 messages), dropping newest message" in caplog.text


async def test_used_wrongly() -> None:
    """Not entered yet: sending says what to do."""
    stream, peer = await sockets()
    async with peer:
        transport = ByteStreamTransport(stream)
        with pytest.raises(RuntimeError, match="async with"):
            await transport.send(request(1))
        async with transport:
            pass
        with pytest.raises(RuntimeError, match="once"):
            async with transport:
                pytest.fail("entered again")


class Failures:
    """Raises what is too large for a message, in different ways."""

    def text(self) -> None:
        raise ValueError("begin " + "x" * 30_000)

    def wide_text(self) -> None:
        raise ValueError("begin " + "\u20ac" * 30_000)

    def escaped_text(self) -> None:
        raise ValueError("begin " + "\x01" * 30_000)

    def name(self) -> None:
        raise type("Long" * 10_000, (Exception,), {})("begin")

    def field(self) -> None:
        exc = ValueError("begin")
        exc.data = "x" * 30_000  # type: ignore[attr-defined]
        raise exc

    def causes(self) -> None:
        try:
            raise KeyError("x" * 30_000)
        except KeyError as exc:
            raise ValueError("begin") from exc

    def surrogates(self) -> None:
        raise ValueError("begin \ud800" + "x" * 30_000)

    def remote(self) -> None:
        raise RemoteError("ValueError", "begin \ud800" + "x" * 30_000, {"more": "x" * 30_000})

    def issues(self, *numbers: int) -> None: ...

    def result(self) -> str:
        return "x" * 30_000


@pytest.mark.parametrize("tracebacks", [False, True], ids=["plain", "tracebacks"])
@pytest.mark.parametrize("size", [400, 4_000, 16 << 20])
async def test_errors_that_are_too_large(size: int, tracebacks: bool) -> None:
    """Their name and the beginning of their text arrive, whatever it is that is too large."""
    stream, other = await sockets()
    async with (
        ByteStreamTransport(stream, max_message_size=size) as mine,
        ByteStreamTransport(other) as theirs,
        RPCChannel(mine, expose=Failures(), send_tracebacks=tracebacks),
        RPCChannel(theirs, timeout=30) as client,
    ):
        api = client.get_api()
        for name in (
            "text",
            "wide_text",
            "escaped_text",
            "field",
            "causes",
            "surrogates",
            "remote",
        ):
            with pytest.raises(RemoteError) as caught:
                await api[name]()
            assert caught.value.name == "ValueError"
            assert caught.value.message.startswith("begin"), name
        with pytest.raises(RemoteError, match="begin") as caught:
            await api.name()
        assert caught.value.name.startswith("Long")
        if size > 30_000:
            return
        with pytest.raises(RPCValidationError, match="numbers|Expected `int`") as invalid:
            await api.issues(*["x" * 50] * 5)
        assert invalid.value.method == "issues"
        with pytest.raises(RemoteError, match="exceeds max_message_size") as caught:
            await api.result()
        assert caught.value.name == "OverloadedError"


async def test_no_error_fits(caplog: pytest.LogCaptureFixture) -> None:
    """Not even the shortest answer can be sent: that is logged, and nothing else ends by it."""
    stream, other = await sockets()
    async with (
        ByteStreamTransport(stream, max_message_size=100) as mine,
        ByteStreamTransport(other) as theirs,
        RPCChannel(mine, expose=Failures()) as server,
        RPCChannel(theirs, timeout=0.3) as client,
    ):
        with pytest.raises(RPCTimeoutError):
            await client.get_api().text()
        assert not server.closed
        assert server.statistics().handlers == 0
    assert "an error could not be sent to its caller" in caplog.text
