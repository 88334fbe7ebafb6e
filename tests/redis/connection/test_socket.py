"""Sockets that write at once: AnyIO's rules for byte streams, and connecting to several addresses."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute

from anyio_kkrpc.redis._connection import _socket
from anyio_kkrpc.redis._connection._address import describe
from anyio_kkrpc.redis._connection._socket import PlainSocket, connect_tcp, connect_unix
from anyio_kkrpc.testing._server import free_port
from tests.bounds import BOUND

pytestmark = pytest.mark.anyio

LIMIT = BOUND


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(LIMIT)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    async def getaddrinfo(*args: Any, **kwargs: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr(_socket, "getaddrinfo", getaddrinfo)


async def test_large(pair: tuple[socket.socket, socket.socket]) -> None:
    """Megabytes go both ways at once, though the socket takes them in parts."""
    stream, other = PlainSocket(pair[0]), PlainSocket(pair[1])
    data = random.Random(1).randbytes(5_000_000)
    got: dict[str, bytes] = {}

    async def read(name: str, stream: PlainSocket) -> None:
        chunks: list[bytes] = []
        while sum(map(len, chunks)) < len(data):
            chunks.append(await stream.receive())
        got[name] = b"".join(chunks)

    with anyio.fail_after(LIMIT):
        async with stream, other, anyio.create_task_group() as group:
            group.start_soon(read, "ours", stream)
            group.start_soon(read, "theirs", other)
            group.start_soon(stream.send, data)
            group.start_soon(other.send, data)
    assert got == {"ours": data, "theirs": data}


async def test_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    """What fits is written without awaiting; then nothing more, until the other side reads."""
    async with PlainSocket(pair[0]) as stream:
        assert stream.send_nowait(b"abc") == 3
        assert pair[1].recv(10) == b"abc"
        written = 0
        while sent := stream.send_nowait(b"x" * 100_000):
            written += sent
        assert written > 0
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as group:
                group.start_soon(stream.send, b"last")
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(BusyResourceError):
                    stream.send_nowait(b"no")
                while written:
                    written -= len(pair[1].recv(written))
        assert pair[1].recv(10) == b"last"


async def test_full_reads_yield(pair: tuple[socket.socket, socket.socket]) -> None:
    """A read that fills its buffer is followed by one that doesn't wait, but can be cancelled."""
    async with PlainSocket(pair[0]) as stream:
        pair[1].sendall(b"abcdef")
        assert await stream.receive(4) == b"abcd"
        with anyio.CancelScope() as scope:
            scope.cancel()
            await stream.receive(4)
        assert scope.cancelled_caught
        assert await stream.receive(4) == b"ef"
        pair[1].sendall(b"full")
        assert await stream.receive(4) == b"full"
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as group:

                async def read() -> None:
                    assert await stream.receive(4) == b"more"

                group.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                pair[1].sendall(b"more")


async def test_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    async with PlainSocket(pair[0]) as stream:
        await stream.send_eof()
        assert pair[1].recv(10) == b""
        pair[1].sendall(b"last")
        pair[1].close()
        assert await stream.receive() == b"last"
        with pytest.raises(EndOfStream):
            await stream.receive()
        with pytest.raises(BrokenResourceError):
            stream.send_nowait(b"x")


async def test_reset(listener: socket.socket) -> None:
    """A connection that is torn down is broken, not ended."""
    async with await connect_tcp("127.0.0.1", listener.getsockname()[1]) as stream:
        with listener.accept()[0] as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with anyio.fail_after(LIMIT), pytest.raises(BrokenResourceError) as caught:
            await stream.receive()
        assert isinstance(caught.value.__cause__, OSError)


async def test_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    """Closing wakes who reads and who writes, and fails all that comes later."""
    stream = PlainSocket(pair[0])
    failed = []

    async def read() -> None:
        with pytest.raises(ClosedResourceError):
            await stream.receive()
        failed.append("read")

    async def write() -> None:
        with pytest.raises(ClosedResourceError):
            await stream.send(b"x" * 10_000_000)
        failed.append("write")

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            group.start_soon(write)
            await anyio.wait_all_tasks_blocked()
            await stream.aclose()
            await stream.aclose()
    assert sorted(failed) == ["read", "write"]
    with pytest.raises(ClosedResourceError):
        stream.send_nowait(b"x")
    with pytest.raises(ClosedResourceError):
        await stream.receive()
    with pytest.raises(ClosedResourceError):
        await stream.send_eof()
    assert stream.extra(SocketAttribute.raw_socket).fileno() == -1


async def test_unix(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(OSError, match="No such file"):
        await connect_unix(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        async with await connect_unix(str(path)) as stream:
            with listener.accept()[0] as peer:
                await stream.send(b"a")
                assert peer.recv(1) == b"a"


async def test_second_address(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that refuses is followed by the next one at once."""
    port = listener.getsockname()[1]
    resolves_to(monkeypatch, ("127.0.0.1", free_port()), ("127.0.0.1", port))
    async with await connect_tcp("somewhere", 1) as stream:
        raw = stream.extra(SocketAttribute.raw_socket)
        assert raw.getpeername() == ("127.0.0.1", port)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_silent_address(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that doesn't answer holds up the next one only for a moment."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than its queue holds: the next to connect hears nothing
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        resolves_to(monkeypatch, full.getsockname(), listener.getsockname())
        with anyio.fail_after(LIMIT):
            async with await connect_tcp("somewhere", 1) as stream:
                raw = stream.extra(SocketAttribute.raw_socket)
                assert raw.getpeername() == listener.getsockname()


async def test_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """If all fail, the error tells why."""
    resolves_to(monkeypatch, ("127.0.0.1", free_port()), ("127.0.0.1", free_port()))
    with pytest.raises(OSError, match="all connection attempts failed") as caught:
        await connect_tcp("somewhere", 1)
    assert describe(caught.value) == "Connection refused"
