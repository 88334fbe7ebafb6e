"""TCP, TLS, Unix sockets, child processes and stdio."""

from __future__ import annotations

import os
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSListener

from anyio_kkrpc import (
    ByteStreamTransport,
    RemoteError,
    RPCChannel,
    TransportClosedError,
    TransportConnectionError,
)
from anyio_kkrpc.transports import connect_tcp, connect_unix, open_process, serve
from tests.bounds import BOUND, CALL_BOUND

pytestmark = pytest.mark.anyio

CHILD = """
import sys
import anyio
from anyio_kkrpc import RPCChannel
from anyio_kkrpc.transports import stdio

class Api:
    def add(self, a: int, b: int) -> int:
        print("this goes to stderr, not between the frames")
        return a + b
    def pid(self) -> int:
        import os
        return os.getpid()
    async def fetch(self) -> str:
        return await channel.get_api().secret()
    async def progress(self, n: int, step) -> None:
        for number in range(n):
            await step(number)
    async def echo(self, value):
        return value

async def main():
    global channel
    async with stdio(codec=sys.argv[2]) as transport, RPCChannel(transport, expose=Api()) as channel:
        await channel.serve_forever()
    print("back to stdout")

anyio.run(main, backend=sys.argv[1])
"""


class Api:
    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self) -> None:
        raise ValueError("no")


async def serve_api(transport: ByteStreamTransport) -> None:
    async with RPCChannel(transport, expose=Api()) as channel:
        await channel.serve_forever()


async def use(transport: ByteStreamTransport) -> None:
    async with RPCChannel(transport, timeout=CALL_BOUND) as channel:
        assert await channel.get_api().add(1, 2) == 3
        with pytest.raises(RemoteError):
            await channel.get_api().fail()


async def test_tcp() -> None:
    """A server of several connections; the end of one leaves the others alone."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, serve_api)
            async with connect_tcp("127.0.0.1", port) as one:
                async with connect_tcp("127.0.0.1", port) as two:
                    await use(two)
                await use(one)
            group.cancel_scope.cancel()


async def test_failing_handler_ends_its_own_connection(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that raises is logged, and the server goes on."""
    breaks = [True]

    async def handler(transport: ByteStreamTransport) -> None:
        if breaks:
            breaks.clear()
            raise RuntimeError("handler broke")
        await serve_api(transport)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, handler)
            async with connect_tcp("127.0.0.1", port) as one, RPCChannel(one) as channel:
                with anyio.fail_after(BOUND):
                    await channel.serve_forever()
            assert "handler broke" in caplog.text
            async with connect_tcp("127.0.0.1", port) as two:
                await use(two)
            group.cancel_scope.cancel()


async def test_tls() -> None:
    """The same over TLS, with the certificate checked."""
    authority = trustme.CA()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as tcp:
        port = tcp.extra(SocketAttribute.local_port)
        listener = TLSListener(tcp, server_context, standard_compatible=False)
        async with anyio.create_task_group() as group:
            group.start_soon(serve, listener, serve_api)
            async with connect_tcp("localhost", port, ssl_context=client_context) as transport:
                await use(transport)
            with pytest.raises(ssl.SSLError):
                async with connect_tcp("localhost", port, ssl_context=ssl.create_default_context()):
                    pytest.fail("the certificate isn't trusted")
            group.cancel_scope.cancel()


async def test_unix_socket(tmp_path: Path) -> None:
    """The same over a Unix socket, in CBOR."""
    path = str(tmp_path / "s")
    async with await anyio.create_unix_listener(path) as listener:
        async with anyio.create_task_group() as group:

            async def run() -> None:
                await serve(listener, serve_api, codec="cbor")

            group.start_soon(run)
            async with connect_unix(path, codec="cbor") as transport:
                await use(transport)
            group.cancel_scope.cancel()


async def test_nobody_listens() -> None:
    """A refused connection is the OSError that it is."""
    with pytest.raises(OSError):
        async with connect_tcp("127.0.0.1", 1):
            pytest.fail("nobody listens")


def child(tmp_path: Path, backend: Any, codec: str) -> list[str]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return [sys.executable, str(script), backend[0], codec]


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_child_process(tmp_path: Path, anyio_backend: Any, codec: str) -> None:
    """Calls to and from a child process, which ends by itself when its stdin closes."""

    class Parent:
        def secret(self) -> str:
            return "of the parent"

    async with open_process(child(tmp_path, anyio_backend, codec), codec=codec) as transport:
        async with RPCChannel(transport, expose=Parent(), timeout=CALL_BOUND) as channel:
            api = channel.get_api()
            assert await api.add(1, 2) == 3
            assert await api.fetch() == "of the parent"
            seen: list[int] = []
            await api.progress(5, seen.append)
            assert seen == list(range(5))
            large = "x" * 3_000_000
            assert await api.echo(large) == large
            pid = await api.pid()
            os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_child_process_that_dies(tmp_path: Path, anyio_backend: Any) -> None:
    """When the child is killed, waiting calls fail at once."""
    async with open_process(child(tmp_path, anyio_backend, "json")) as transport:
        async with RPCChannel(transport, timeout=CALL_BOUND) as channel:
            pid = await channel.get_api().pid()
            os.kill(pid, signal.SIGKILL)
            # By what is noticed first: the end of what it wrote, or that nobody reads.
            ended = (TransportClosedError, TransportConnectionError)
            with anyio.fail_after(BOUND), pytest.raises(ended):
                while True:
                    await channel.get_api().add(1, 1)


async def test_child_process_that_ignores_the_end() -> None:
    """A child that goes on after its stdin was closed is told to end."""
    program = 'import time; print(\'{"t":"bye"}\', flush=True); time.sleep(1000)'
    from anyio_kkrpc.transports import links

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "EXIT_TIMEOUT", 0.2)
        async with open_process([sys.executable, "-c", program]) as transport:
            with anyio.fail_after(BOUND):
                await transport.receive()
