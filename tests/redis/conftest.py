"""Fake peers, servers with passwords and TLS, and an address, for tests of the connection."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import redis
import trustme
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._resp import Connection
from anyio_kkrpc.testing._server import RedisServer, ServerError

NOWHERE = Address.parse("redis://user:s3cret@nowhere:6379/0")


class FakeStream(ByteStream):
    """A byte stream without a network: shows each write, and receives exactly the given pieces.

    :ivar written: the data of each finished write
    :ivar gate: writes wait for it if it isn't set
    :ivar broken: whether writes fail
    """

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.gate = anyio.Event()
        self.gate.set()
        self.sending = anyio.Event()
        self.closed = self.broken = False
        self._pieces: deque[bytes] = deque()
        self._news = anyio.Event()

    def feed(self, *pieces: bytes) -> None:
        """Let the other side send pieces; an empty one is its end."""
        self._pieces.extend(pieces)
        self._news.set()

    def stall(self) -> None:
        """Let writes wait until the gate is set."""
        self.gate = anyio.Event()

    def send_nowait(self, data: bytes) -> int:
        """Write at once, unless writes wait."""
        if self.closed:
            raise anyio.ClosedResourceError
        if self.broken:
            raise anyio.BrokenResourceError
        if not self.gate.is_set():
            return 0
        self.written.append(bytes(data))
        return len(data)

    async def send(self, item: bytes) -> None:
        self.sending.set()
        await self.gate.wait()
        if self.closed:
            raise anyio.ClosedResourceError
        self.written.append(bytes(item))

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while not self._pieces and not self.closed:
            await self._news.wait()
            self._news = anyio.Event()
        await anyio.lowlevel.checkpoint()
        if self.closed:
            raise anyio.ClosedResourceError
        piece = self._pieces.popleft()
        if not piece:
            raise anyio.EndOfStream
        assert len(piece) <= max_bytes
        return piece

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed = True
        self._news.set()
        self.gate.set()
        await anyio.lowlevel.checkpoint()


def fake_connection() -> tuple[Connection, FakeStream]:
    """Return a connection to nobody, and the stream that it uses."""
    stream = FakeStream()
    return Connection(stream, NOWHERE), stream


@asynccontextmanager
async def fake_peer(
    handler: Callable[[SocketStream], Awaitable[object]], host: str = "127.0.0.1"
) -> AsyncIterator[Address]:
    """Serve each TCP connection by ``handler``, and give the address."""

    async def serve(stream: SocketStream) -> None:
        async with stream:
            try:
                await handler(stream)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    async with await anyio.create_tcp_listener(local_host=host) as listener:
        port = listener.extra(SocketAttribute.local_port)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, serve)
            yield Address(host=host, port=port)
            group.cancel_scope.cancel()


@asynccontextmanager
async def running(connection: Connection) -> AsyncIterator[Connection]:
    """Run a connection for pipelined use, and close it afterwards."""
    async with connection, anyio.create_task_group() as group:
        await group.start(connection.run)
        yield connection
        await connection.aclose()


def pieces(data: bytes, rng: random.Random) -> list[bytes]:
    """Cut data into random pieces."""
    cuts = sorted(rng.choices(range(1, len(data)), k=min(5, len(data) - 1))) if data else []
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@pytest.fixture
def address(redis_server: RedisServer) -> Address:
    """Address of the shared server."""
    return Address.parse(redis_server.url)


@pytest.fixture(scope="module")
def locked_server(server_executable: str) -> Iterator[RedisServer]:
    """A server with the password ``s3cret`` and the users alice (may all), and bob and carol, who
    may not use CLIENT and PING.
    """
    with RedisServer(server_executable, password="s3cret") as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL SETUSER alice on >al1ce! ~* +@all")
            client.execute_command("ACL SETUSER bob on >b0b ~* +@all -client")
            client.execute_command("ACL SETUSER carol on nopass ~* +@all -ping -select")
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Files with a certificate for 127.0.0.1 and localhost, its key, and its CA."""
    folder: Path = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1", "localhost")
    names = tuple(str(folder / name) for name in ("cert.pem", "key.pem", "ca.pem"))
    issued.cert_chain_pems[0].write_to_path(names[0])
    issued.private_key_pem.write_to_path(names[1])
    ca.cert_pem.write_to_path(names[2])
    return names[0], names[1], names[2]


def start_tls(executable: str, certificates: tuple[str, str, str], *args: str) -> RedisServer:
    server = RedisServer(executable, tls=certificates, args=args)
    try:
        server.start()
    except ServerError as exc:
        if "built without TLS" not in str(exc):
            raise
        pytest.skip(f"{executable} was built without TLS")
    return server


@pytest.fixture(scope="module")
def tls_server(server_executable: str, certificates: tuple[str, str, str]) -> Iterator[RedisServer]:
    """A server that also speaks TLS; skips the programs that can't."""
    server = start_tls(server_executable, certificates)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def strict_tls_server(
    server_executable: str, certificates: tuple[str, str, str]
) -> Iterator[RedisServer]:
    """The same, but it wants certificates of its clients."""
    server = start_tls(server_executable, certificates, "--tls-auth-clients", "yes")
    yield server
    server.stop()
