"""TLS: whose certificate is expected, and files that are exchanged while peers are connected."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import pytest
import redis
import trustme
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSListener, TLSStream

from anyio_kkrpc import RedisStreamsTransport, TransportConnectionError
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._login import open_connection
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._connection._tls import Tls
from anyio_kkrpc.testing import RedisServer
from anyio_kkrpc.testing._server import free_port
from tests.bounds import BOUND, CALL_BOUND
from tests.topologies import Node

from ..conftest import start_tls

pytestmark = pytest.mark.anyio
AUTHORITY = trustme.CA()


class Files:
    """Files of one kind of certificates, in a folder."""

    def __init__(self, folder: Path, authority: trustme.CA, *names: str) -> None:
        folder.mkdir()
        self.folder = folder
        issued = authority.issue_cert(*names)
        self.cert, self.key, self.ca = (folder / name for name in ("cert", "key", "ca"))
        issued.cert_chain_pems[0].write_to_path(str(self.cert))
        issued.private_key_pem.write_to_path(str(self.key))
        authority.cert_pem.write_to_path(str(self.ca))

    @property
    def all(self) -> tuple[str, str, str]:
        return str(self.cert), str(self.key), str(self.ca)

    @property
    def query(self) -> str:
        return f"ssl_ca_certs={self.ca}&ssl_certfile={self.cert}&ssl_keyfile={self.key}"

    def copy(self, folder: Path) -> Files:
        shutil.copytree(self.folder, folder)
        copied = Files.__new__(Files)
        copied.folder = folder
        copied.cert, copied.key, copied.ca = (folder / name for name in ("cert", "key", "ca"))
        return copied


async def ping(address: Address) -> object:
    async with await open_connection(address, timeout=BOUND) as connection:
        return await connection.execute("PING")


async def refused(address: Address) -> TransportConnectionError:
    with pytest.raises(TransportConnectionError) as caught:
        await open_connection(address, timeout=BOUND)
    return caught.value


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# Whose certificate is expected


@asynccontextmanager
async def listening(names: list[str | None], *certified: str) -> AsyncIterator[int]:
    """Speak TLS on a port as a host of these names; note the name that each client asks for."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    AUTHORITY.issue_cert(*certified).configure_cert(context)

    def note(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> None:
        names.append(name)

    context.sni_callback = note

    async def serve(stream: TLSStream) -> None:
        async with stream:
            try:
                while True:
                    data = await stream.receive()
                    await stream.send(b"+PONG\r\n" * data.count(b"PING"))
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = plain.extra(SocketAttribute.local_port)
    async with TLSListener(plain, context, standard_compatible=False) as listener:
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, serve)
            yield port
            group.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("host", "option", "certified", "asked"),
    [
        ("localhost", "", "localhost", "localhost"),
        ("127.0.0.1", "", "127.0.0.1", None),
        ("127.0.0.1", "redis.example", "redis.example", "redis.example"),
        ("127.0.0.1", "one.redis.example", "*.redis.example", "one.redis.example"),
        ("localhost", "redis.example", "localhost", "redis.example"),
        ("localhost", "127.0.0.9", "127.0.0.9", None),
        ("127.0.0.1", "", "localhost", None),
    ],
)
@pytest.mark.parametrize("context", [False, True])
async def test_name(
    host: str, option: str, certified: str, asked: str | None, context: bool, tmp_path: Path
) -> None:
    """The name that is asked for and expected is the host's, or another one for all servers."""
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca"))
    own = ssl.create_default_context(cafile=tmp_path / "ca") if context else None
    query = [f"ssl_server_hostname={option}"] if option else []
    query += [] if context else [f"ssl_ca_certs={tmp_path}/ca"]
    names: list[str | None] = []
    async with listening(names, certified) as port:
        url = f"rediss://{host}:{port}?{'&'.join(query)}"
        address = Address.parse(url, ssl_context=own)
        if certified in (option or host, "*.redis.example"):
            assert await ping(address) == b"PONG"
        else:
            error = await refused(address)
            assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
            assert "ssl_server_hostname" in str(error)
    assert names == [asked]


def test_name_with_a_dot() -> None:
    """A dot at the end of a host name is for its look-up only."""
    assert Tls().name_of("redis.example.") == "redis.example"


# Files that are exchanged


@pytest.mark.one_server
async def test_read_when_changed(tmp_path: Path) -> None:
    """Files are read once, however many connections are made at once, and again when they change."""
    files = Files(tmp_path / "one", AUTHORITY, "localhost")
    tls = Address.parse(f"rediss://localhost?{files.query}").tls
    assert tls is not None
    found: list[ssl.SSLContext] = []

    async def look() -> None:
        found.append(await tls.context())

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(look)
    assert Address.parse(f"rediss://localhost?{files.query}").tls == tls
    for path in files.all:
        await look()
        os.utime(path, (1, 1))
    await look()
    assert [found[0] is one for one in found] == [True, True, True, True, False, False, False]
    assert len(set(found)) == 4


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """Write what doesn't belong to the other file."""
    issued = AUTHORITY.issue_cert("localhost")
    pem = issued.private_key_pem if path.name == "key" else issued.cert_chain_pems[0]
    pem.write_to_path(str(path))


@pytest.fixture
def old(tmp_path: Path) -> Files:
    return Files(tmp_path / "old", trustme.CA(), "127.0.0.1", "localhost")


@contextmanager
def serving(executable: str, files: Files, *arguments: str) -> Iterator[RedisServer]:
    """Run a server that wants certificates of its clients."""
    server = start_tls(executable, files.all, "--tls-auth-clients", "yes", *arguments)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def strict_server(server_executable: str, old: Files) -> Iterator[RedisServer]:
    """A server that has the old certificates itself."""
    with serving(server_executable, old) as server:
        yield server


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        *((name, spoil) for name in ("cert", "key", "ca") for spoil in (half, empty, Path.unlink)),
        ("cert", foreign),
        ("key", foreign),
    ],
)
async def test_half_written(
    tls_server: RedisServer,
    certificates: tuple[str, str, str],
    tmp_path: Path,
    name: str,
    spoil: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While a file can't be used, connections are made with what was read before; it is said once."""
    paths = {
        part: Path(shutil.copy(path, tmp_path / part))
        for part, path in zip(("cert", "key", "ca"), certificates, strict=True)
    }
    url = tls_server.tls_url.partition("?")[0]
    query = "ssl_ca_certs={ca}&ssl_certfile={cert}&ssl_keyfile={key}".format_map(paths)
    address = Address.parse(f"{url}?{query}")
    assert await ping(address) == b"PONG"
    good = paths[name].read_bytes()
    for _ in range(2):
        caplog.clear()
        spoil(paths[name])
        for _ in range(3):
            assert await ping(address) == b"PONG"
        (line,) = warnings(caplog)
        assert line.startswith("ssl_ca_certs" if name == "ca" else "ssl_")
        assert line.endswith("TLS goes on with what was read before")
        assert "cannot connect" in str(await refused(Address.parse(f"{url}?{query}")))
        paths[name].write_bytes(good)
        assert await ping(address) == b"PONG"
        assert len(warnings(caplog)) == 2


async def test_renewed(
    strict_server: RedisServer, old: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Certificates of another CA, on both sides, reach a peer whose URL stays as it is."""
    new = Files(tmp_path / "new", trustme.CA(), "127.0.0.1", "localhost")
    own = old.copy(tmp_path / "own")
    address = Address.parse(f"{strict_server.tls_url.partition('?')[0]}?{own.query}")
    with redis.Redis.from_url(strict_server.url) as admin:
        async with await open_connection(address) as connection:
            cert, key, ca = new.all
            admin.execute_command(
                *("CONFIG", "SET", "tls-cert-file", cert),
                *("tls-key-file", key, "tls-ca-cert-file", ca),
            )
            await refused(address)
            for path in new.all:
                assert await connection.execute("PING") == b"PONG"
                await refused(address)
                shutil.copy(path, own.folder)
            assert await ping(address) == b"PONG"
            assert await connection.execute("PING") == b"PONG"
    (first, second) = warnings(caplog)
    assert "no certificate in" in first
    assert "can be read again" in second


# Servers that are found


@pytest.mark.parametrize("url", ["rediss+sentinel://s1,s2/name", "rediss+cluster://n1,n2"])
def test_name_of_what_is_found(url: str) -> None:
    """One name is expected wherever sentinels or nodes lead to, and of themselves; one has the files."""
    target = Target.parse(f"{url}?ssl_server_hostname=redis.example&ssl_ca_certs=/ca")
    for address in (target.at("10.0.0.1", 6379), *target.seeds):
        assert address.tls is target.node.tls is not None
        assert address.tls.name_of(str(address.host)) == "redis.example"
    for address in Target.parse(url).seeds:
        assert address.tls is not None
        assert address.tls.name_of(str(address.host)) == address.host


async def test_cluster(server_executable: str, tmp_path: Path) -> None:
    """A node of a Cluster whose certificate is for another name than its address."""
    files = Files(tmp_path / "own", AUTHORITY, "redis.example")
    with serving(server_executable, files, "--cluster-enabled", "yes") as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            with anyio.fail_after(BOUND):
                while b"cluster_state:ok" not in admin.execute_command("CLUSTER", "INFO"):
                    await anyio.sleep(0.01)
        where = server.tls_url.partition("?")[0].replace("rediss://", "rediss+cluster://")
        with pytest.raises(TransportConnectionError, match="certificate"):
            async with RedisStreamsTransport(f"{where}?{files.query}", connect_timeout=0.5):
                pass
        url = f"{where}?{files.query}&ssl_server_hostname=redis.example"
        async with RedisStreamsTransport(url, connect_timeout=BOUND) as transport:
            assert (await transport.get_stream_info()).length == 0


async def test_sentinel(server_executable: str, tmp_path: Path) -> None:
    """Sentinel and servers that speak TLS with each other, want certificates, and tell host names:
    each name is expected in the certificates, and the peer goes after the master.
    """
    files = Files(tmp_path / "own", AUTHORITY, "localhost")
    announced = ("--tls-replication", "yes", "--replica-announce-ip", "localhost")
    with (
        serving(server_executable, files, *announced) as first,
        serving(server_executable, files, *announced) as second,
        redis.Redis.from_url(first.url) as master,
        redis.Redis.from_url(second.url) as replica,
    ):
        ports = {server: urlsplit(server.tls_url).port for server in (first, second)}
        for server, client in ((first, master), (second, replica)):
            client.config_set("replica-announce-port", str(ports[server]))
            client.config_set("repl-diskless-sync-delay", 0)
        replica.replicaof("localhost", ports[first])
        sentinel, port = encrypted_sentinel(server_executable, files, ports[first])
        try:
            await until(lambda: replica.info("replication")["master_link_status"] == "up")
            await until(lambda: bool(sentinel.run("SENTINEL", "REPLICAS", "mymaster")))
            url = f"rediss+sentinel://localhost:{port}/mymaster?{files.query}"
            options = {"stream": "jobs", "connect_timeout": BOUND}
            async with RedisStreamsTransport(url, **options) as transport:
                assert transport.server_address == ("localhost", ports[first])
                await until(lambda: promotes(sentinel))
                await until(lambda: transport.server_address == ("localhost", ports[second]))
                assert (await transport.get_stream_info()).length == 0
        finally:
            sentinel.kill()


def promotes(sentinel: Node) -> bool:
    """Whether a sentinel begins a failover."""
    try:
        return bool(sentinel.run("SENTINEL", "FAILOVER", "mymaster"))
    except redis.ResponseError:  # it hasn't heard enough of the replica yet
        return False


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(CALL_BOUND):
        while not condition():
            await anyio.sleep(0.05)


def encrypted_sentinel(executable: str, files: Files, port: int | None) -> tuple[Node, int]:
    """Start a sentinel for the master at a port that speaks TLS; return it, and its own such port."""
    folder, own = files.folder / "sentinel", free_port()
    folder.mkdir()
    lines = [
        "bind 127.0.0.1",
        "sentinel resolve-hostnames yes",
        "sentinel announce-hostnames yes",
        "sentinel announce-ip localhost",
        f"sentinel monitor mymaster localhost {port} 1",
        f"tls-port {own}",
        f"tls-cert-file {files.cert}",
        f"tls-key-file {files.key}",
        f"tls-ca-cert-file {files.ca}",
        "tls-replication yes",
    ]
    path = folder / "sentinel.conf"
    path.write_text("\n".join(lines) + "\n")
    node = Node(executable, folder, free_port(), (str(path), "--sentinel"))
    node.start()
    with suppress(redis.ResponseError):  # before Redis 7.0
        # A busy machine is no reason to do nothing for thirty seconds.
        node.run("SENTINEL", "DEBUG", "TILT-TRIGGER", 60000)
    return node, own
