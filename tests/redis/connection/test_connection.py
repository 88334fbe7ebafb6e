"""The connection alone: RESP over AnyIO, against real servers and against fake peers."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import socket
import ssl
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import hiredis
import pytest
import redis
import trustme
from anyio import wait_all_tasks_blocked
from anyio.abc import SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint
from anyio.streams.stapled import StapledByteStream
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.credentials import UsernamePasswordCredentialProvider

from anyio_kkrpc._exceptions import TransportClosedError, TransportConnectionError
from anyio_kkrpc.redis._connection._address import Address
from anyio_kkrpc.redis._connection._command import pack
from anyio_kkrpc.redis._connection._errors import Meaning, RedisError, ResponseError, meaning_of
from anyio_kkrpc.redis._connection._login import open_connection
from anyio_kkrpc.redis._connection._resp import HIGH_WATER, Connection
from anyio_kkrpc.testing._server import RedisServer, free_port
from tests.bounds import BOUND
from tests.faults.proxy import proxy
from tests.redis.conftest import NOWHERE, FakeStream, fake_connection, fake_peer, pieces, running

pytestmark = pytest.mark.anyio

# Seconds within which what should come has to come.
LIMIT = BOUND
PHRASE = "Redis Streams connection error"


async def refused(address: Address, **options: Any) -> TransportConnectionError:
    """Return the error of a connect that has to fail."""
    with anyio.fail_after(LIMIT):
        with pytest.raises(TransportConnectionError) as caught:
            await open_connection(address, **options)
    error = caught.value
    assert str(error).startswith(f"{PHRASE}: cannot connect to {address} (")
    assert "Check " in str(error)
    assert "s3cret" not in str(error)
    assert error.__cause__ is not None
    return error


async def settled(condition: Callable[[], bool]) -> None:
    """Let other tasks go on until the condition holds."""
    with anyio.fail_after(LIMIT):
        while not condition():
            await anyio.sleep(0.005)


def encrypted(key: bytes) -> bytes:
    """Return a private key as one that needs a password."""
    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"s3cret"),
    )


class TestOpening:
    async def test_tcp(self, address: Address) -> None:
        """A TCP connection takes commands, and sends small ones without delay."""
        async with await open_connection(address) as connection:
            assert await connection.execute("PING") == b"PONG"
            raw = connection._stream.extra(SocketAttribute.raw_socket)
            assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not connection.closed

    async def test_unix_socket(self, redis_server: RedisServer) -> None:
        """A Unix socket does as well."""
        address = Address.parse(redis_server.unix_url)
        async with await open_connection(address) as connection:
            assert await connection.execute("PING") == b"PONG"

    async def test_tls(self, tls_server: RedisServer) -> None:
        """A connection by rediss:// is encrypted, and works in both ways of use."""
        address = Address.parse(tls_server.tls_url)
        async with await open_connection(address) as connection:
            assert await connection.execute("ECHO", b"x" * 100_000) == b"x" * 100_000
            async with running(connection):
                assert await connection.request("ECHO", b"y" * 3_000_000) == b"y" * 3_000_000

    async def test_tls_context(
        self, tls_server: RedisServer, certificates: tuple[str, str, str]
    ) -> None:
        """The user's own TLS context is used in place of the ssl_ options."""
        url = tls_server.tls_url.partition("?")[0]
        context = ssl.create_default_context(cafile=certificates[2])
        async with await open_connection(Address.parse(url, ssl_context=context)) as connection:
            assert await connection.execute("PING") == b"PONG"

    async def test_tls_client_certificate(
        self, tls_server: RedisServer, certificates: tuple[str, str, str]
    ) -> None:
        """A client certificate that the URL names is used."""
        certificate, key, _ = certificates
        url = f"{tls_server.tls_url}&ssl_certfile={certificate}&ssl_keyfile={key}"
        async with await open_connection(Address.parse(url)) as connection:
            assert await connection.execute("PING") == b"PONG"

    async def test_unknown_certificate(self, tls_server: RedisServer) -> None:
        """A certificate of an unknown CA is refused by default, and taken if told so."""
        url = tls_server.tls_url.partition("?")[0]
        error = await refused(Address.parse(url))
        assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
        assert "ssl_ca_certs" in str(error)
        unchecked = Address.parse(f"{url}?ssl_cert_reqs=none")
        async with await open_connection(unchecked) as connection:
            assert await connection.execute("PING") == b"PONG"

    async def test_certificate_of_another_host(self, tls_server: RedisServer) -> None:
        """A certificate for another host name is refused by default, and taken if told so."""
        url = tls_server.tls_url.replace("127.0.0.1", "127.0.0.2")
        # The server isn't at 127.0.0.2, so a peer there passes everything on.
        port = int(tls_server.tls_url.rpartition(":")[2].partition("?")[0])

        async def relay(near: SocketStream) -> None:
            async def copy(source: SocketStream, target: SocketStream) -> None:
                async for data in source:
                    await target.send(data)

            async with await anyio.connect_tcp("127.0.0.1", port) as far:
                async with anyio.create_task_group() as group:
                    group.start_soon(copy, far, near)
                    await copy(near, far)
                    group.cancel_scope.cancel()

        async with fake_peer(relay, host="127.0.0.2") as there:
            url = url.replace(str(port), str(there.port))
            error = await refused(Address.parse(url))
            assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
            unchecked = Address.parse(f"{url}&ssl_check_hostname=False")
            async with await open_connection(unchecked) as connection:
                assert await connection.execute("PING") == b"PONG"

    async def test_tls_to_plain_port(
        self, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TLS to a port without it fails soon, and the text says what to check."""
        monkeypatch.setattr("anyio_kkrpc.redis._connection._address._DOUBT_AFTER", 0.01)
        url = redis_server.url.replace("redis://", "rediss://")
        error = await refused(Address.parse(url), timeout=1000)
        assert "begins with redis://" in str(error)
        assert "firewall" not in str(error)

    async def test_slow_handshake(
        self, tls_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that speaks TLS may take longer than it takes to doubt that."""
        monkeypatch.setattr("anyio_kkrpc.redis._connection._address._DOUBT_AFTER", 0.01)
        opened = []
        async with proxy(tls_server.tls_url) as middle:

            async def connect() -> None:
                address = Address.parse(middle.url)
                async with await open_connection(address, timeout=LIMIT) as connection:
                    opened.append(await connection.execute("PING"))

            async with anyio.create_task_group() as group:
                middle.freeze()
                group.start_soon(connect)
                await settled(lambda: middle.connections == 2)
                middle.thaw()
        assert opened == [b"PONG"]

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"ssl_ca_certs": "missing"}, "ssl_ca_certs: No such file or directory: '{}missing'"),
            ({"ssl_ca_certs": ""}, "ssl_ca_certs: Is a directory: '{}'"),
            ({"ssl_ca_certs": "rubbish"}, "ssl_ca_certs: no certificates in '{}rubbish'"),
            ({"ssl_certfile": "missing"}, "ssl_certfile: No such file or directory: '{}missing'"),
            (
                {"ssl_certfile": "cert", "ssl_keyfile": "missing"},
                "ssl_keyfile: No such file or directory: '{}missing'",
            ),
            ({"ssl_certfile": "cert"}, "no certificate in '{}cert' ("),
            (
                {"ssl_certfile": "cert", "ssl_keyfile": "other"},
                "no certificate in '{0}cert' with the key in '{0}other'",
            ),
            (
                {"ssl_certfile": "cert", "ssl_keyfile": "secret"},
                "ssl_keyfile: the key is encrypted",
            ),
        ],
    )
    async def test_files(
        self,
        certificates: tuple[str, str, str],
        tmp_path: Path,
        options: dict[str, str],
        named: str,
    ) -> None:
        """A file that is missing, or isn't what it should be, is named with its option."""
        shutil.copy(certificates[0], tmp_path / "cert")
        (tmp_path / "rubbish").write_text("rubbish")
        other = trustme.CA().issue_cert("localhost").private_key_pem.bytes()
        (tmp_path / "other").write_bytes(other)
        (tmp_path / "secret").write_bytes(encrypted(other))
        query = "&".join(f"{name}={tmp_path}/{file}" for name, file in options.items())
        error = await refused(Address.parse(f"rediss://127.0.0.1:{free_port()}?{query}"))
        assert named.format(f"{tmp_path}/") in str(error)
        assert "Check the files that the ssl_ options in the url name" in str(error)

    async def test_client_certificate_is_asked_for(
        self, strict_tls_server: RedisServer, certificates: tuple[str, str, str], tmp_path: Path
    ) -> None:
        """A server that asks for a certificate is told as such; so is one that refuses ours."""
        url = strict_tls_server.tls_url
        error = await refused(Address.parse(url))
        assert "ssl_certfile and ssl_keyfile in the url: the server asks for a" in str(error)
        context = ssl.create_default_context(cafile=certificates[2])
        error = await refused(Address.parse(url.partition("?")[0], ssl_context=context))
        assert "Check ssl_context: the server asks for a certificate" in str(error)
        own = trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem
        own.write_to_path(str(tmp_path / "own"))
        error = await refused(Address.parse(f"{url}&ssl_certfile={tmp_path}/own"))
        assert "the server doesn't accept the certificate" in str(error)
        good = f"{url}&ssl_certfile={certificates[0]}&ssl_keyfile={certificates[1]}"
        async with await open_connection(Address.parse(good)) as connection:
            assert await connection.execute("PING") == b"PONG"

    async def test_too_many_clients(self, server_executable: str) -> None:
        """A server that takes no more clients says so at once, whatever the log-in asks."""
        with (
            RedisServer(server_executable, unix_socket=True) as server,
            redis.Redis.from_url(server.url) as witness,
        ):
            witness.config_set("maxclients", 1)
            for url in (f"redis://:s3cret@127.0.0.1:{server.port}/1", server.unix_url):
                error = await refused(Address.parse(url), client_name="me", timeout=1000)
                assert "max number of clients reached" in str(error)
                assert "Check maxclients of the server" in str(error)

    async def test_plain_to_tls_port(self, tls_server: RedisServer) -> None:
        """A connection without TLS to a port with it fails, and the text says what to check."""
        url = tls_server.tls_url.partition("?")[0].replace("rediss://", "redis://")
        error = await refused(Address.parse(url), timeout=0.5)
        assert "begins with rediss://" in str(error)

    @pytest.mark.parametrize("login", [":s3cret", "default:s3cret", "alice:al1ce!"])
    async def test_login(self, locked_server: RedisServer, login: str) -> None:
        """A password alone, or a user of the access control list, logs in."""
        url = f"redis://{login}@127.0.0.1:{locked_server.port}"
        async with await open_connection(Address.parse(url)) as connection:
            expected = login.partition(":")[0] or "default"
            assert (await connection.execute("ACL", "WHOAMI")).decode() == expected

    async def test_login_by_provider(self, locked_server: RedisServer) -> None:
        """A credential provider's answer logs in; if it is wrong, the text says whose it is."""
        url = f"redis://127.0.0.1:{locked_server.port}"
        right = UsernamePasswordCredentialProvider("alice", "al1ce!")
        address = Address.parse(url, credential_provider=right)
        async with await open_connection(address) as connection:
            assert await connection.execute("ACL", "WHOAMI") == b"alice"
        wrong = UsernamePasswordCredentialProvider("alice", "s3cret")
        error = await refused(Address.parse(url, credential_provider=wrong))
        assert "credential_provider" in str(error)

    async def test_failing_provider(self, redis_server: RedisServer) -> None:
        """A credential provider that raises makes the connect fail from its error."""

        class Provider(UsernamePasswordCredentialProvider):
            def get_credentials(self) -> Any:
                raise LookupError("no ticket")

        address = Address.parse(redis_server.url, credential_provider=Provider())
        error = await refused(address)
        assert isinstance(error.__cause__, LookupError)
        assert "no ticket" in str(error)

    @pytest.mark.parametrize("login", [":wr0ng", "alice:wr0ng", "nobody:wr0ng"])
    async def test_wrong_password(self, locked_server: RedisServer, login: str) -> None:
        """A wrong user or password is told as such, and not shown."""
        url = f"redis://{login}@127.0.0.1:{locked_server.port}/1"
        error = await refused(Address.parse(url), client_name="x")
        assert meaning_of(error) is Meaning.LOGIN
        assert "Check user and password" in str(error)
        assert "wr0ng" not in str(error)

    async def test_no_password(self, locked_server: RedisServer, redis_server: RedisServer) -> None:
        """A password that is missing, or that the server has none for, is told as such."""
        error = await refused(Address.parse(f"redis://127.0.0.1:{locked_server.port}"))
        assert "the url has none" in str(error)
        url = redis_server.url.replace("redis://", "redis://:s3cret@")
        error = await refused(Address.parse(url))
        assert "Check user and password" in str(error)

    async def test_database(
        self, redis_server: RedisServer, witness: redis.Redis, stream_name: str
    ) -> None:
        """The number in the URL selects the database; one that isn't there is told."""
        async with await open_connection(Address.parse(f"{redis_server.url}/3")) as connection:
            await connection.execute("SET", stream_name, "there")
        assert witness.get(stream_name) is None
        with redis.Redis.from_url(f"{redis_server.url}/3") as other:
            assert other.get(stream_name) == b"there"
            other.delete(stream_name)
        error = await refused(Address.parse(f"{redis_server.url}/999"))
        assert "the number of the database" in str(error)

    async def test_client_name(
        self, redis_server: RedisServer, witness: redis.Redis, stream_name: str
    ) -> None:
        """The connection's name is in CLIENT LIST; one in the URL has priority."""
        url = f"{redis_server.url}?client_name=url-{stream_name}"
        async with await open_connection(Address.parse(redis_server.url), client_name=stream_name):
            async with await open_connection(Address.parse(url), client_name="other"):
                names = {client["name"] for client in witness.client_list()}
        assert {stream_name, f"url-{stream_name}"} <= names
        assert "other" not in names

    @pytest.mark.parametrize("login", ["bob:b0b", "carol:"])
    async def test_few_rights(self, locked_server: RedisServer, login: str) -> None:
        """A user who may not use CLIENT or PING gets a connection all the same."""
        url = f"redis://{login}@127.0.0.1:{locked_server.port}"
        async with await open_connection(Address.parse(url), client_name="me") as connection:
            assert await connection.execute("ECHO", "a") == b"a"

    async def test_too_few_rights(self, locked_server: RedisServer) -> None:
        """A user who may not select the wanted database gets an error from the server's."""
        error = await refused(Address.parse(f"redis://carol@127.0.0.1:{locked_server.port}/1"))
        assert meaning_of(error) is Meaning.RIGHTS
        assert "what the user may do" in str(error)

    async def test_odd_client_name(self, address: Address) -> None:
        """A client name that the server refuses does not matter."""
        async with await open_connection(address, client_name="two words") as connection:
            assert await connection.execute("CLIENT", "GETNAME") in (None, b"")

    async def test_nobody_there(self, tmp_path: Any) -> None:
        """If nobody listens, the text says so, and what to check."""
        error = await refused(Address(host="127.0.0.1", port=free_port(), password="s3cret"))
        assert "(Connection refused)" in str(error)
        assert "server is running there, the port, the firewall" in str(error)
        error = await refused(Address(host="localhost", port=free_port()))
        assert "(Connection refused)" in str(error)
        error = await refused(Address.parse(f"unix://{tmp_path}/no.sock"))
        assert "(No such file or directory)" in str(error)
        assert "Unix socket" in str(error)

    async def test_unknown_host(self) -> None:
        """A host name that doesn't exist is told as such."""
        error = await refused(Address.parse("redis://no-such-host.invalid"))
        assert "Check the host name" in str(error)

    @pytest.mark.parametrize("by_url", [False, True])
    async def test_never_answers(self, by_url: bool) -> None:
        """A peer that accepts and never answers ends in the same error; the socket is closed."""
        gone = anyio.Event()

        async def handler(stream: SocketStream) -> None:
            async for _ in stream:
                pass
            gone.set()

        async with fake_peer(handler) as address:
            timeout = 0.1
            if by_url:
                url = f"redis://127.0.0.1:{address.port}?socket_connect_timeout=0.1"
                address, timeout = Address.parse(url), 1000.0
            error = await refused(address, timeout=timeout)
            assert "no answer within 0.1 seconds" in str(error)
            assert isinstance(error.__cause__, TimeoutError)
            with anyio.fail_after(LIMIT):
                await gone.wait()

    async def test_cancelled(self) -> None:
        """A connect that is cancelled closes the socket."""
        begun, gone = anyio.Event(), anyio.Event()

        async def handler(stream: SocketStream) -> None:
            await stream.receive()
            begun.set()
            async for _ in stream:
                pass
            gone.set()

        async with fake_peer(handler) as address:
            with anyio.fail_after(LIMIT):
                async with anyio.create_task_group() as group:
                    group.start_soon(open_connection, address)
                    await begun.wait()
                    group.cancel_scope.cancel()
                await gone.wait()

    @pytest.mark.parametrize(
        ("answer", "cause", "text"),
        [
            (b"", anyio.EndOfStream, "closed by the server"),
            (b"-LOADING Redis is loading the dataset in memory\r\n", RedisError, "loaded its data"),
            (b"-ERR max number of clients reached\r\n", RedisError, "maxclients"),
            (b"HTTP/1.1 400 Bad Request\r\n", hiredis.ProtocolError, "Protocol error"),
            (b"+PONG\r\n+PONG\r\n", hiredis.ProtocolError, "nobody asked for"),
        ],
    )
    async def test_odd_answer(self, answer: bytes, cause: type[Exception], text: str) -> None:
        """Whatever the peer answers to the log-in ends in the same error, from its cause."""

        async def handler(stream: SocketStream) -> None:
            await stream.receive()
            if answer:
                await stream.send(answer)
                await stream.receive()

        async with fake_peer(handler) as address:
            error = await refused(address)
        assert type(error.__cause__) is cause
        assert text in str(error)

    async def test_one_write(self) -> None:
        """AUTH, SELECT, CLIENT SETNAME and PING leave in one write."""
        received = []

        async def handler(stream: SocketStream) -> None:
            received.append(await stream.receive())
            await stream.send(b"+OK\r\n+OK\r\n-ERR unknown command\r\n+PONG\r\n")
            await stream.receive()

        async with fake_peer(handler) as address:
            address = Address(host="127.0.0.1", port=address.port, db=2, username="u", password="p")
            async with await open_connection(address, client_name="me"):
                pass
        commands = [("AUTH", "u", "p"), ("SELECT", "2"), ("CLIENT", "SETNAME", "me"), ("PING",)]
        assert received == [b"".join(map(hiredis.pack_command, commands))]


class TestExclusive:
    async def test_replies(self, address: Address, stream_name: str) -> None:
        """Replies are what the server sent: bytes, numbers, lists and nothing."""
        async with await open_connection(address) as connection:
            execute = connection.execute
            assert await execute("SET", stream_name, "\u4e2d") == b"OK"
            assert await execute(b"GET", stream_name.encode()) == "\u4e2d".encode()
            assert await execute("GET", f"{stream_name}-other") is None
            assert await execute("LRANGE", f"{stream_name}-list", 0, -1) == []
            assert await execute("DEL", stream_name) == 1
            assert await execute("INCRBYFLOAT", stream_name, 1.5) == b"1.5"
            await execute("DEL", stream_name)

    async def test_error_reply(self, address: Address, stream_name: str) -> None:
        """An error reply is raised, and the connection stays good."""
        async with await open_connection(address) as connection:
            await connection.execute("SET", stream_name, "a")
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                await connection.execute("XLEN", stream_name)
            with pytest.raises(ResponseError, match="NOSCRIPT"):
                await connection.execute("EVALSHA", "0" * 40, 0)
            await connection.execute("DEL", stream_name)

    @pytest.mark.parametrize(
        ("reply", "kind"),
        [
            (b"-ERR unknown command", ResponseError),
            (b"-ERR max number of clients reached", RedisError),
            (b"-ERR invalid password", RedisError),
            (b"-NOAUTH Authentication required.", RedisError),
            (b"-WRONGPASS invalid username-password pair", RedisError),
            (b"-NOPERM this user has no permissions", ResponseError),
            (b"-LOADING Redis is loading", RedisError),
            (b"-READONLY You can't write against a read only replica.", ResponseError),
            (b"-OOM command not allowed", ResponseError),
            (b"-EXECABORT Transaction discarded", ResponseError),
            (b"-NOGROUP No such key", ResponseError),
            (b"-BUSYGROUP exists \xff", ResponseError),
        ],
    )
    async def test_error_classes(self, reply: bytes, kind: type[Exception]) -> None:
        """What is about the command is told from what is about connection or login."""
        connection, stream = fake_connection()
        stream.feed(reply + b"\r\n")
        with pytest.raises(kind) as caught:
            await connection.execute("X")
        assert type(caught.value) is kind
        assert connection.error is None

    async def test_many(self, address: Address, stream_name: str) -> None:
        """Many commands leave in one write; error replies are among the replies, in their place."""
        async with await open_connection(address) as connection:
            replies = await connection.execute_many(
                [("SET", stream_name, 1), ("XLEN", stream_name), ("INCR", stream_name)]
            )
            assert replies[0] == b"OK"
            assert isinstance(replies[1], ResponseError)
            assert replies[2] == 2
            assert await connection.execute_many([]) == []
            assert await connection.execute("DEL", stream_name) == 1

    async def test_cancelled(
        self, address: Address, witness: redis.Redis, stream_name: str
    ) -> None:
        """A command that is cancelled closes the connection at once; later ones fail."""
        connection = await open_connection(address, client_name=stream_name)
        async with anyio.create_task_group() as group:
            group.start_soon(connection.execute, "BLPOP", stream_name, 0)
            await settled(lambda: any("blpop" in c["cmd"] for c in clients(witness, stream_name)))
            group.cancel_scope.cancel()
        assert connection.closed
        with pytest.raises(TransportClosedError, match="a command was cancelled"):
            await connection.execute("PING")
        with pytest.raises(TransportClosedError):
            await connection.request("PING")
        await settled(lambda: not clients(witness, stream_name))

    async def test_late_reply(self) -> None:
        """The late reply to a cancelled command is given to nobody."""
        connection, stream = fake_connection()
        with anyio.move_on_after(0):
            await connection.execute("GET", "a")
        stream.feed(b"$1\r\na\r\n")
        with pytest.raises(TransportClosedError):
            await connection.execute("GET", "b")
        assert stream.closed

    async def test_broken_off(self) -> None:
        """If the peer goes away in the middle of a reply, that command and later ones say so."""
        connection, stream = fake_connection()
        stream.feed(b"$5\r\nab", b"")
        for _ in range(2):
            with pytest.raises(TransportConnectionError, match=rf"{PHRASE}: connection to .* lost"):
                await connection.execute("GET", "a")
        assert isinstance(connection.error, TransportConnectionError)
        assert isinstance(connection.error.__cause__, anyio.EndOfStream)
        assert "s3cret" not in str(connection.error)

    @pytest.mark.parametrize("garbage", [b"garbage\r\n", b"+OK\r\n+OK\r\n"])
    async def test_garbage(self, garbage: bytes) -> None:
        """What is no reply, or a reply too many, breaks the connection."""
        connection, stream = fake_connection()
        stream.feed(garbage)
        with pytest.raises(TransportConnectionError) as caught:
            await connection.execute("PING")
        assert isinstance(caught.value.__cause__, hiredis.ProtocolError)
        assert stream.closed

    async def test_one_at_a_time(self) -> None:
        """A second use at the same time is an error, and doesn't disturb the first."""
        connection, stream = fake_connection()
        replies = []

        async def first() -> None:
            replies.append(await connection.execute("GET", "a"))

        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await connection.execute("GET", "b")
            with pytest.raises(anyio.BusyResourceError):
                await connection.request("GET", "b")
            with pytest.raises(anyio.BusyResourceError):
                await connection.run()
            stream.feed(b"+a\r\n")
        assert replies == [b"a"]

    async def test_wrong_argument(self, address: Address) -> None:
        """An argument that can't be sent is a TypeError, and nothing was sent."""
        async with await open_connection(address) as connection:
            with pytest.raises(TypeError):
                await connection.execute("ECHO", object())  # type: ignore[arg-type]
            async with running(connection):
                with pytest.raises(TypeError):
                    await connection.request("ECHO", None)  # type: ignore[arg-type]
                assert await connection.request("ECHO", "a") == b"a"

    async def test_closed_meanwhile(self) -> None:
        """A blocking command ends when another task closes the connection."""
        connection, _ = fake_connection()
        async with anyio.create_task_group() as group:

            async def block() -> None:
                with pytest.raises(TransportClosedError):
                    await connection.execute("BLPOP", "a", 0)

            group.start_soon(block)
            await wait_all_tasks_blocked()
            await connection.aclose()

    async def test_large(self, address: Address, stream_name: str) -> None:
        """Values of 5 MB go both ways."""
        value = random.Random(1).randbytes(5_000_000)
        async with await open_connection(address) as connection:
            await connection.execute("SET", stream_name, value)
            assert await connection.execute("GET", stream_name) == value
            await connection.execute("DEL", stream_name)


def clients(witness: redis.Redis, name: str) -> list[dict[str, str]]:
    """Return the clients with a name, as CLIENT LIST has them."""
    return [client for client in witness.client_list() if client["name"] == name]


CANNED = (
    b"+OK\r\n:-42\r\n$5\r\nhello\r\n$-1\r\n$0\r\n\r\n*2\r\n$1\r\na\r\n*2\r\n:1\r\n$-1\r\n*0\r\n"
    b"-WRONGTYPE no\r\n*-1\r\n$4\r\n\r\n\r\n\r\n"
)
EXPECTED = [b"OK", -42, b"hello", None, b"", [b"a", [1, None]], [], "no", None, b"\r\n\r\n"]


def comparable(replies: list[Any]) -> list[Any]:
    return [str(r).removeprefix("WRONGTYPE ") if isinstance(r, Exception) else r for r in replies]


REPLIES = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=30),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


def encode(reply: Any) -> bytes:
    """Encode a value as a server does."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    return b"*%d\r\n%s" % (len(reply), b"".join(map(encode, reply)))


class TestPieces:
    async def test_every_cut(self) -> None:
        """Replies cut at any byte are the same, in both ways of use."""
        commands = [("PING",)] * len(EXPECTED)
        for cut in range(1, len(CANNED)):
            connection, stream = fake_connection()
            stream.feed(CANNED[:cut], CANNED[cut:])
            assert comparable(await connection.execute_many(commands)) == EXPECTED

            connection, stream = fake_connection()
            replies: list[Any] = []
            async with running(connection):
                connection.post(b"", len(EXPECTED) - 1, replies.append)
                stream.feed(CANNED[:cut], CANNED[cut:])
                replies.append(await connection.request("PING"))
            assert comparable(replies) == EXPECTED

    async def test_single_bytes(self) -> None:
        """Replies that come byte by byte are the same."""
        connection, stream = fake_connection()
        stream.feed(*(CANNED[i : i + 1] for i in range(len(CANNED))))
        replies = await connection.execute_many([("PING",)] * len(EXPECTED))
        assert comparable(replies) == EXPECTED

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(expected=st.lists(REPLIES, min_size=1, max_size=8), seed=st.integers(0, 2**32))
    async def test_any_replies(self, expected: list[Any], seed: int) -> None:
        """Any replies, cut anywhere, reach those who asked, in order."""
        rng = random.Random(seed)
        connection, stream = fake_connection()
        got: dict[int, Any] = {}

        async def ask(number: int) -> None:
            got[number] = await connection.request("GET", number)

        async with running(connection):
            async with anyio.create_task_group() as group:
                for number in range(len(expected)):
                    group.start_soon(ask, number)
                await settled(lambda: len(asked(stream)) == len(expected))
                order = asked(stream)
                stream.feed(*pieces(b"".join(encode(expected[n]) for n in order), rng))
        assert got == dict(enumerate(expected))


def asked(stream: FakeStream) -> list[int]:
    """Return the numbers that GET was sent with, in order."""
    parser = hiredis.Reader()
    parser.feed(b"".join(stream.written))
    numbers = []
    while (command := parser.gets()) is not False:
        numbers.append(int(command[1]))
    return numbers


class TestPipelined:
    async def test_order(self, address: Address) -> None:
        """Of 1,000 requests at once, each gets its own reply."""
        got: dict[int, Any] = {}
        async with running(await open_connection(address)) as connection:

            async def ask(number: int) -> None:
                got[number] = await connection.request("ECHO", number)

            with anyio.fail_after(LIMIT):
                async with anyio.create_task_group() as group:
                    for number in range(1000):
                        group.start_soon(ask, number)
        assert got == {number: b"%d" % number for number in range(1000)}

    async def test_before_run(self, address: Address) -> None:
        """Requests may be made before the reader has started."""
        async with await open_connection(address) as connection:
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(connection.request, "PING")
                await wait_all_tasks_blocked()
                group.start_soon(connection.run)
                assert await connection.request("ECHO", "a") == b"a"
                await connection.aclose()

    async def test_run_once(self) -> None:
        """A second reader, and exclusive use beside the reader, are errors."""
        connection, _ = fake_connection()
        async with running(connection):
            with pytest.raises(anyio.BusyResourceError):
                await connection.run()
            with pytest.raises(anyio.BusyResourceError):
                await connection.execute("PING")

    async def test_errors_between(self, address: Address, stream_name: str) -> None:
        """Error replies reach those who caused them, and nobody else."""
        outcomes: dict[int, Any] = {}
        async with running(await open_connection(address)) as connection:
            await connection.request("SET", stream_name, "a")

            async def ask(number: int) -> None:
                try:
                    if number % 3:
                        outcomes[number] = await connection.request("ECHO", number)
                    else:
                        await connection.request("XLEN", stream_name)
                except ResponseError as exc:
                    outcomes[number] = str(exc)[:9]

            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(ask, number)
            await connection.request("DEL", stream_name)
        assert outcomes == {n: b"%d" % n if n % 3 else "WRONGTYPE" for n in range(100)}

    async def test_post(self) -> None:
        """Each reply to posted commands is handed on, in order."""
        connection, stream = fake_connection()
        replies: list[Any] = []
        async with running(connection):
            connection.post(b"AB", 2, lambda reply: replies.append(("ab", reply)))
            connection.post(b"C", 1, lambda reply: replies.append(("c", reply)))
            await connection.flush()
            assert stream.written == [b"ABC"]
            stream.feed(b"+1\r\n-ERR 2\r\n+3\r\n")
            await settled(lambda: len(replies) == 3)
        assert [(name, str(reply)) for name, reply in replies] == [
            ("ab", "b'1'"),
            ("ab", "2"),
            ("c", "b'3'"),
        ]

    async def test_post_and_forget(self, caplog: pytest.LogCaptureFixture) -> None:
        """Errors that nobody waits for are logged and counted; other replies are dropped."""
        connection, stream = fake_connection()
        async with running(connection):
            connection.post(b"", 3)
            stream.feed(b"+OK\r\n-OOM command not allowed\r\n$-1\r\n")
            connection.post(b"", 1)
            await settled(lambda: connection.refused == 1)
        records = [record for record in caplog.records if record.name == "anyio_kkrpc"]
        assert [(r.levelno, "command not allowed" in r.getMessage()) for r in records] == [
            (logging.WARNING, True)
        ]
        assert "s3cret" not in caplog.text

    async def test_failing_callback(self, caplog: pytest.LogCaptureFixture) -> None:
        """What takes a reply and raises is logged, and its neighbours get their replies."""
        connection, stream = fake_connection()
        replies: list[Any] = []

        def fail(reply: Any) -> None:
            raise LookupError("bad luck")

        async with running(connection):
            connection.post(b"", 1, replies.append)
            connection.post(b"", 1, fail)
            connection.post(b"", 1, replies.append)
            stream.feed(b"+1\r\n+2\r\n+3\r\n")
            await settled(lambda: len(replies) == 2)
        assert replies == [b"1", b"3"]
        assert "bad luck" in caplog.text

    @pytest.mark.parametrize("garbage", [b"garbage\r\n", b"+1\r\n+2\r\n+3\r\n"])
    async def test_garbage(self, garbage: bytes) -> None:
        """What is no reply, or a reply too many, fails all that is pending, and the reader."""
        connection, stream = fake_connection()
        replies: list[Any] = []
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as group:

                async def run() -> None:
                    with pytest.raises(TransportConnectionError) as caught:
                        await connection.run()
                    assert isinstance(caught.value.__cause__, hiredis.ProtocolError)

                connection.post(b"", 2, replies.append)
                stream.feed(garbage)
                group.start_soon(run)
        assert len(replies) == 2
        assert stream.closed
        if garbage.startswith(b"g"):
            assert all(isinstance(reply, TransportConnectionError) for reply in replies)
            assert replies[0] is not replies[1]

    async def test_reply_during_flush(self) -> None:
        """A request whose reply comes before its write has ended is done once that has ended."""
        connection, stream = fake_connection()
        async with running(connection):
            stream.stall()
            replies = []

            async def ask() -> None:
                replies.append(await connection.request("SET", "a", b"x" * 3 * HIGH_WATER))

            async with anyio.create_task_group() as group:
                group.start_soon(ask)
                await stream.sending.wait()
                stream.feed(b"+a\r\n")
                await wait_all_tasks_blocked()
                assert replies == []
                stream.gate.set()
            assert replies == [b"a"]

    async def test_large(self, address: Address, stream_name: str) -> None:
        """Values of 5 MB go both ways, several at once, with small ones between."""
        values = [random.Random(n).randbytes(5_000_000 if n % 2 else 10) for n in range(6)]
        got: dict[int, Any] = {}
        async with running(await open_connection(address)) as connection:

            async def ask(number: int) -> None:
                got[number] = await connection.request("ECHO", values[number])

            with anyio.fail_after(LIMIT):
                async with anyio.create_task_group() as group:
                    for number in range(len(values)):
                        group.start_soon(ask, number)
        assert got == dict(enumerate(values))

    @pytest.mark.one_server
    async def test_large_without_a_copy(self, address: Address, stream_name: str) -> None:
        """What the socket doesn't take at once is written from where it is."""
        size = 15 * HIGH_WATER
        packed = pack(("SET", stream_name, bytes(size)))
        async with running(await open_connection(address)) as connection:
            answered = anyio.Event()
            tracemalloc.start()
            try:
                connection.post(packed, 1, lambda _: answered.set())
                with anyio.fail_after(LIMIT):
                    await connection.flush()
                    await answered.wait()
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert await connection.request("STRLEN", stream_name) == size
            await connection.request("DEL", stream_name)
        assert 0 < peak < HIGH_WATER / 2


class TestFlush:
    async def test_at_once(self) -> None:
        """A lone command is written when flush returns, with no other task involved."""
        connection, stream = fake_connection()
        connection.post(b"A")
        assert stream.written == []
        await connection.flush()
        assert stream.written == [b"A"]
        await connection.flush()
        assert stream.written == [b"A"]

    async def test_along(self) -> None:
        """What comes before an answer, or during a write, leaves in one piece after it; nobody
        waits for that, and nobody but the writer writes for others.
        """
        connection, stream = fake_connection()
        answers = 0

        def count(reply: object) -> None:
            nonlocal answers
            answers += 1

        async def post(*commands: bytes) -> None:
            for data in commands:
                connection.post(data, 1, count)
                await connection.flush()

        async with running(connection):
            await post(b"A", b"B", b"C")
            assert stream.written == [b"A"]
            await settled(lambda: len(stream.written) == 2)
            assert stream.written == [b"A", b"BC"]
            stream.feed(b"+a\r\n+b\r\n")
            await settled(lambda: answers == 2)
            stream.stall()
            await post(b"D")
            await stream.sending.wait()
            await post(b"E", b"F")
            assert stream.written == [b"A", b"BC"]
            stream.gate.set()
            await settled(lambda: len(stream.written) == 4)
            stream.feed(b"+c\r\n")
            await settled(lambda: answers == 3)
            await post(b"G")
            assert stream.written == [b"A", b"BC", b"D", b"EF", b"G"]

    async def test_without_at_once(self) -> None:
        """A stream that can't write at once, such as TLS, is written to by the writer."""
        stream = FakeStream()
        slow = StapledByteStream(stream, stream)
        connection = Connection(slow, NOWHERE)
        async with running(connection):
            stream.stall()

            async def answer() -> None:
                await stream.sending.wait()
                stream.gate.set()
                stream.feed(b"+a\r\n")

            async with anyio.create_task_group() as group:
                group.start_soon(answer)
                assert await connection.request("GET", "a") == b"a"
            assert len(stream.written) == 1

    async def test_yields(self) -> None:
        """A task that writes without end leaves the others their turn."""
        connection, _ = fake_connection()
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await checkpoint()

        async with running(connection), anyio.create_task_group() as group:
            group.start_soon(other)
            for _ in range(320):
                connection.post(b"A")
                await connection.flush()
            assert turns >= 5
            group.cancel_scope.cancel()

    async def test_high_water(self) -> None:
        """Above the high-water mark callers wait for room; if cancelled, they lose nothing."""
        connection, stream = fake_connection()
        big = b"B" * (HIGH_WATER + 1)
        async with running(connection):
            stream.stall()
            done = []

            async def write(data: bytes) -> None:
                connection.post(data)
                await connection.flush()
                done.append(data[:1])

            async with anyio.create_task_group() as group:
                group.start_soon(write, b"A")
                await stream.sending.wait()
                group.start_soon(write, big)
                await wait_all_tasks_blocked()
                with anyio.move_on_after(0) as scope:
                    await write(b"C")
                assert scope.cancelled_caught
                assert done == [b"A"]
                stream.gate.set()
            await settled(lambda: sum(map(len, stream.written)) == len(big) + 2)
        assert sorted(done) == [b"A", b"B"]
        assert b"".join(stream.written) == b"A" + big + b"C"

    async def test_chunks(self) -> None:
        """A large command is written in chunks; the first by the caller, all in order."""
        connection, stream = fake_connection()
        data = random.Random(2).randbytes(3 * HIGH_WATER + 5)
        async with running(connection):
            connection.post(b"head")
            connection.post(data)
            await connection.flush()
            connection.post(b"tail")
            await connection.flush()
            await settled(lambda: sum(map(len, stream.written)) == len(data) + 8)
        assert b"".join(stream.written) == b"head" + data + b"tail"
        assert max(map(len, stream.written)) == HIGH_WATER

    async def test_cancelled_write_is_whole(self) -> None:
        """Requests cancelled while the peer reads nothing leave whole commands behind."""
        commands: list[Any] = []

        def read_all(peer: socket.socket) -> None:
            parser = hiredis.Reader()
            while not commands or commands[-1][0] != b"END":
                parser.feed(peer.recv(1 << 20))
                while (command := parser.gets()) is not False:
                    commands.append(command)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = Address(host="127.0.0.1", port=listener.getsockname()[1])
            connection = Connection(await address.dial(), address)
            with listener.accept()[0] as peer, anyio.fail_after(LIMIT):
                peer.settimeout(LIMIT)
                async with running(connection), anyio.create_task_group() as group:
                    async with anyio.create_task_group() as victims:
                        for number in range(40):
                            value = b"%d" % (number % 10) * 300_000
                            victims.start_soon(connection.request, "SET", number, value)
                        await wait_all_tasks_blocked()
                        victims.cancel_scope.cancel()
                        # The one who writes can't leave before the peer reads.
                        group.start_soon(anyio.to_thread.run_sync, read_all, peer)
                    connection.post(hiredis.pack_command(("END",)))
                    await connection.flush()
                    assert not connection.closed
                assert len(commands) > 1
        assert commands.pop() == [b"END"]
        assert {int(key) for _, key, _ in commands} <= set(range(40))
        assert all(value == b"%d" % (int(key) % 10) * 300_000 for _, key, value in commands)

    async def test_native_cancellation(self, anyio_backend_name: str) -> None:
        """asyncio's own Task.cancel() in the middle of a write harms no other request."""
        if anyio_backend_name != "asyncio":
            pytest.skip("asyncio only")
        connection, stream = fake_connection()
        async with running(connection):
            stream.stall()
            first = asyncio.ensure_future(connection.request("GET", "a"))
            await stream.sending.wait()
            second = asyncio.ensure_future(connection.request("GET", "b"))
            await checkpoint()
            first.cancel()
            with anyio.fail_after(LIMIT):
                with pytest.raises(asyncio.CancelledError):
                    await first
                stream.gate.set()
                stream.feed(b"+a\r\n+b\r\n")
                assert await second == b"b"


async def suppressed_run(connection: Connection) -> None:
    try:
        await connection.run()
    except TransportConnectionError:
        pass


class TestAbandoned:
    async def test_survivors(self, address: Address) -> None:
        """Of 200 requests, some cancelled at any moment, each survivor gets its own reply."""
        rng = random.Random(3)
        got: dict[int, Any] = {}
        scopes: dict[int, anyio.CancelScope] = {}
        async with running(await open_connection(address)) as connection:

            async def ask(number: int) -> None:
                with anyio.CancelScope() as scope:
                    scopes[number] = scope
                    got[number] = await connection.request("ECHO", number)

            victims = rng.sample(range(200), 80)
            with anyio.fail_after(LIMIT):
                async with anyio.create_task_group() as group:
                    for number in range(200):
                        group.start_soon(ask, number)
                        if number % 7 == 0:
                            await checkpoint()
                        for victim in victims:
                            if victim in scopes and rng.random() < 0.05:
                                scopes[victim].cancel()
                    for victim in victims:
                        if victim in scopes:
                            scopes[victim].cancel()
                assert await connection.request("ECHO", "after") == b"after"
        assert all(reply == b"%d" % number for number, reply in got.items())
        assert set(range(200)) - set(victims) <= set(got)
        assert len(got) < 200

    async def test_cancelled_before(self) -> None:
        """A request in a cancelled scope is cancelled, and the connection stays good."""
        connection, stream = fake_connection()
        async with running(connection):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await connection.request("GET", "a")
            assert scope.cancelled_caught
            stream.feed(b"+a\r\n+b\r\n")
            assert await connection.request("GET", "b") == b"b"


class TestEnd:
    async def test_killed(self, address: Address, witness: redis.Redis, stream_name: str) -> None:
        """CLIENT KILL with 100 requests pending fails them all at once, each from the cause."""
        connection = await open_connection(address, client_name=stream_name)
        failed: list[TransportConnectionError] = []

        async def ask(*args: str) -> None:
            with pytest.raises(TransportConnectionError, match=f"{PHRASE}: connection to") as info:
                await connection.request(*args)
            failed.append(info.value)

        async def run() -> None:
            with pytest.raises(TransportConnectionError):
                await connection.run()

        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as group:
                group.start_soon(run)
                group.start_soon(ask, "BLPOP", stream_name, "0")
                await settled(
                    lambda: any("blpop" in c["cmd"] for c in clients(witness, stream_name))
                )
                for _ in range(99):
                    group.start_soon(ask, "PING")
                await settled(lambda: len(connection._expected) == 100)
                (client,) = clients(witness, stream_name)
                witness.client_kill_filter(_id=client["id"])
        assert len(failed) == 100
        assert all(error.__cause__ is not None for error in failed)
        assert len(set(map(id, failed))) == 100
        for use in (connection.request, connection.execute):
            with pytest.raises(TransportConnectionError, match="lost"):
                await use("PING")
        with pytest.raises(TransportConnectionError):
            connection.post(b"")

    async def test_server_dies(self, own_server: RedisServer) -> None:
        """A server that is killed while it hangs fails what is pending; a new one can be had."""
        address = Address.parse(own_server.url)
        connection = await open_connection(address)
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                with pytest.raises(TransportConnectionError):
                    await connection.request("PING")

            group.start_soon(suppressed_run, connection)
            await connection.request("PING")
            own_server.pause()
            for _ in range(10):
                group.start_soon(ask)
            await wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(own_server.kill)
        error = await refused(address)
        assert "Connection refused" in str(error)
        await anyio.to_thread.run_sync(own_server.restart)
        async with await open_connection(address) as again:
            assert await again.execute("PING") == b"PONG"

    async def test_aclose(self) -> None:
        """Closing fails what is pending, ends the reader without an error, and can be repeated."""
        connection, stream = fake_connection()
        failed = []

        async def ask() -> None:
            with pytest.raises(TransportClosedError) as caught:
                await connection.request("PING")
            failed.append(caught.value)

        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as group:
                group.start_soon(connection.run)
                for _ in range(10):
                    group.start_soon(ask)
                await wait_all_tasks_blocked()
                await connection.aclose()
                await connection.aclose()
        assert len(failed) == 10
        assert connection.closed
        assert stream.closed
        with pytest.raises(TransportClosedError):
            await connection.flush()
        assert "s3cret" not in str(connection.error)

    async def test_aclose_with_full_buffer(self) -> None:
        """Closing also wakes those who wait for room to write, and the writer."""
        connection, stream = fake_connection()
        stream.stall()
        failed = []

        async def write(size: int) -> None:
            connection.post(b"x" * size)
            with pytest.raises(TransportClosedError):
                await connection.flush()
            failed.append(size)

        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as group:
                group.start_soon(connection.run)
                group.start_soon(write, 3 * HIGH_WATER)
                group.start_soon(write, 2 * HIGH_WATER)
                await stream.sending.wait()
                await wait_all_tasks_blocked()
                await connection.aclose()
        assert sorted(failed) == [2 * HIGH_WATER, 3 * HIGH_WATER]

    async def test_aclose_when_cancelled(self) -> None:
        """Closing takes effect also if it is cancelled."""
        gone = anyio.Event()

        async def handler(stream: SocketStream) -> None:
            async for _ in stream:
                pass
            gone.set()

        async with fake_peer(handler) as address:
            connection = Connection(await address.dial(), address)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await connection.aclose()
            assert connection.closed
            with anyio.fail_after(LIMIT):
                await gone.wait()

    async def test_reader_cancelled(self) -> None:
        """Cancelling the reader fails what is pending and closes the socket."""
        connection, stream = fake_connection()
        replies: list[Any] = []
        async with anyio.create_task_group() as group:
            await group.start(connection.run)
            connection.post(b"", 2, replies.append)
            group.cancel_scope.cancel()
        assert [type(reply) for reply in replies] == [TransportClosedError] * 2
        assert stream.closed
        with pytest.raises(TransportClosedError, match="reader"):
            await connection.request("PING")

    async def test_writer_cancelled(self) -> None:
        """Cancelling it in the middle of a write closes it as well."""
        connection, stream = fake_connection()
        stream.stall()
        replies: list[Any] = []
        async with anyio.create_task_group() as group:
            await group.start(connection.run)
            connection.post(b"B", 1, replies.append)
            await connection.flush()
            await stream.sending.wait()
            group.cancel_scope.cancel()
        assert [type(reply) for reply in replies] == [TransportClosedError]
        assert stream.closed

    async def test_gone_at_once(self) -> None:
        """A write that the socket refuses at once breaks the connection for everyone."""
        connection, stream = fake_connection()
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as group:
                group.start_soon(suppressed_run, connection)
                await wait_all_tasks_blocked()
                stream.broken = True
                with pytest.raises(TransportConnectionError, match="lost"):
                    await connection.request("PING")
        assert stream.closed
