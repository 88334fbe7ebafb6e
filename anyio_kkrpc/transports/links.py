"""Byte stream transports over TCP, TLS, Unix sockets, and the stdio of processes."""

from __future__ import annotations

import logging
import os
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    EndOfStream,
    move_on_after,
    notify_closing,
    wait_readable,
    wait_writable,
)
from anyio.abc import AnyByteStream, ByteStream, Listener, Process
from anyio.lowlevel import checkpoint
from anyio.streams.stapled import StapledByteStream

from .._exceptions import RPCError
from .bytestream import ByteStreamTransport

__all__ = ("connect_tcp", "connect_unix", "open_process", "serve", "stdio")

logger: logging.Logger = logging.getLogger("anyio_kkrpc")

# Seconds that a child process has to end by itself, and then after SIGTERM.
EXIT_TIMEOUT = 5.0
_READ_SIZE = 64 * 1024


@asynccontextmanager
async def connect_tcp(
    host: str, port: int, *, ssl_context: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[ByteStreamTransport]:
    """Connect to a server over TCP, with TLS if a context is given.

    :param options: those of `ByteStreamTransport`
    :raises OSError: if nobody listens there
    """
    if ssl_context is None:
        stream: AnyByteStream = await anyio.connect_tcp(host, port)
    else:
        stream = await anyio.connect_tcp(host, port, ssl_context=ssl_context)
    async with ByteStreamTransport(stream, **options) as transport:
        yield transport


@asynccontextmanager
async def connect_unix(path: str, **options: Any) -> AsyncIterator[ByteStreamTransport]:
    """Connect to a server over a Unix socket.

    :param options: those of `ByteStreamTransport`
    :raises OSError: if nobody listens there
    """
    async with ByteStreamTransport(await anyio.connect_unix(path), **options) as transport:
        yield transport


async def serve(
    listener: Listener[Any],
    handler: Callable[[ByteStreamTransport], Awaitable[Any]],
    **options: Any,
) -> None:
    """Run ``handler`` with an entered transport for each connection, until cancelled.

    A handler that fails is logged; it ends its own connection only.

    :param listener: from `anyio.create_tcp_listener`, `anyio.create_unix_listener` or a
        `~anyio.streams.tls.TLSListener`
    :param options: those of `ByteStreamTransport`
    """

    async def serve_one(stream: AnyByteStream) -> None:
        try:
            async with ByteStreamTransport(stream, **options) as transport:
                await handler(transport)
        except RPCError as exc:
            logger.info("a connection ended: %s", exc)
        except Exception:
            logger.exception("the handler of a connection failed")

    await listener.serve(serve_one)


@asynccontextmanager
async def open_process(
    command: str | Sequence[str], **options: Any
) -> AsyncIterator[ByteStreamTransport]:
    """Start a child process and talk to it over its stdin and stdout; its stderr is this one's.

    On leaving, its stdin is closed; if it doesn't end within 5 seconds it gets SIGTERM, and after
    another 5 seconds SIGKILL.

    :param options: those of `ByteStreamTransport`
    :raises OSError: if it can't be started
    """
    process = await anyio.open_process(command, stderr=None)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        stream = StapledByteStream(process.stdin, process.stdout)
        async with ByteStreamTransport(stream, **options) as transport:
            yield transport
    finally:
        await _end_process(process)


async def _end_process(process: Process) -> None:
    for stop in (None, process.terminate, process.kill):
        try:
            if stop is not None:
                stop()
        except ProcessLookupError:
            pass
        with move_on_after(EXIT_TIMEOUT, shield=True) as scope:
            await process.wait()
        if not scope.cancelled_caught:
            break
    with move_on_after(EXIT_TIMEOUT, shield=True):
        await process.aclose()


@asynccontextmanager
async def stdio(**options: Any) -> AsyncIterator[ByteStreamTransport]:
    """Talk to the parent process over this process' stdin and stdout.

    Meanwhile ``sys.stdout`` is ``sys.stderr``, because a `print` between the frames would damage
    them.

    :param options: those of `ByteStreamTransport`
    """
    sys.stdout.flush()
    stdout, sys.stdout = sys.stdout, sys.stderr
    # Copies, so that closing them leaves the process' own alone.
    stream = _Pipes(os.dup(stdout.fileno()), os.dup(sys.stdin.fileno()))
    try:
        async with ByteStreamTransport(stream, **options) as transport:
            yield transport
    finally:
        sys.stdout = stdout
        stream.close()


class _Pipes(ByteStream):
    """Two pipes, used without blocking the event loop and without threads."""

    def __init__(self, output: int, input_: int) -> None:
        self._output = output
        self._input = input_
        self._blocking = [(fd, os.get_blocking(fd)) for fd in (output, input_)]
        for fd in (output, input_):
            os.set_blocking(fd, False)
        self._closed = False

    async def receive(self, max_bytes: int = _READ_SIZE) -> bytes:
        await checkpoint()
        while not self._closed:
            try:
                data = os.read(self._input, max_bytes)
            except BlockingIOError:
                await wait_readable(self._input)
                continue
            except OSError as exc:
                raise BrokenResourceError from exc
            if not data:
                raise EndOfStream
            return data
        raise ClosedResourceError

    async def send(self, item: bytes) -> None:
        await checkpoint()
        view = memoryview(item)
        while view:
            if self._closed:
                raise ClosedResourceError
            try:
                view = view[os.write(self._output, view) :]
            except BlockingIOError:
                await wait_writable(self._output)
            except OSError as exc:
                raise BrokenResourceError from exc

    async def send_eof(self) -> None:
        self.close()
        await checkpoint()

    async def aclose(self) -> None:
        self.close()
        await checkpoint()

    def close(self) -> None:
        """Close both pipes, and set them to what they were, for those who share them."""
        if self._closed:
            return
        self._closed = True
        for fd, blocking in self._blocking:
            notify_closing(fd)
            os.set_blocking(fd, blocking)
            os.close(fd)
