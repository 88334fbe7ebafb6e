"""A plain socket as a byte stream that can also write at once, without awaiting.

`PlainSocket.send_nowait` is what AnyIO's own socket streams lack: with it a lone command costs no
cancel scope and no turn of the event loop, and no cancellation can tear it.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, final

from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    Event,
    TypedAttributeSet,
    create_task_group,
    move_on_after,
    notify_closing,
    typed_attribute,
    wait_writable,
)
from anyio.abc import ByteStream, SocketAttribute
from anyio.lowlevel import checkpoint

from ._incoming import incoming_of
from ._threads import in_thread

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup
if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ

# Seconds after which the next address is tried beside the one that doesn't answer (RFC 8305).
_NEXT_ATTEMPT = 0.25


class Traffic(NamedTuple):
    """What has passed a socket.

    :ivar received: how often bytes came
    :ivar gone: bytes that the other side has got, or, where the kernel doesn't tell, only it
    :ivar given: bytes that were to be sent, those that wait for it included
    :ivar asked: seconds since something was written for the first time after bytes had come
    :ivar answered: whether bytes have come since then
    """

    received: int
    gone: int
    given: int
    asked: float
    answered: bool


class SocketTraffic(TypedAttributeSet):
    """For those who know the socket only below TLS."""

    #: what has passed the socket
    traffic: Traffic = typed_attribute()


@final
class PlainSocket(ByteStream):
    """A connected TCP or Unix socket.

    :param sock: is made non-blocking, and closed with the stream
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._incoming = incoming_of(sock)
        self.receive = self._incoming.receive  # type: ignore[method-assign]  # without a call more
        self._sent = 0
        # Bytes that a `send` still has to write.
        self._rest = 0
        # When something was first written after so many reads.
        self._asked_at, self._reads = monotonic(), -1
        self._closed = False
        self._sending = False

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            SocketAttribute.raw_socket: lambda: self._socket,
            SocketTraffic.traffic: self._traffic,
        }

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Write as much as the socket takes now; return how many bytes that were, 0 if none.

        If the other side has closed, but left something to read, that may say why: the data goes
        nowhere then, and who reads comes to the end.

        :raises BrokenResourceError: if the connection is gone
        :raises ClosedResourceError: after `aclose`
        """
        if self._closed:
            raise ClosedResourceError
        if self._sending:
            raise BusyResourceError("writing to")
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if not self._incoming.has_unread():
                raise BrokenResourceError from exc
            return len(data)
        self._sent += sent
        if self._reads != self._incoming.count:
            self._reads, self._asked_at = self._incoming.count, monotonic()
        return sent

    async def send(self, item: bytes | memoryview) -> None:
        rest = memoryview(item)
        while rest := rest[self.send_nowait(rest) :]:
            self._sending, self._rest = True, len(rest)
            try:
                await wait_writable(self._socket)
            finally:
                self._sending, self._rest = False, 0

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self._incoming.receive(max_bytes)

    def _traffic(self) -> Traffic:
        gone = self._sent - _unacknowledged(self._socket)
        count = self._incoming.count
        asked = monotonic() - self._asked_at
        return Traffic(count, gone, self._sent + self._rest, asked, count != self._reads)

    async def send_eof(self) -> None:
        if self._closed:
            raise ClosedResourceError
        self._socket.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._incoming.close()
            notify_closing(self._socket)
            self._socket.close()
        await checkpoint()


async def connect_unix(path: str) -> PlainSocket:
    """Connect to a Unix socket.

    :raises OSError: if that fails
    """
    return PlainSocket(await _connect(socket.AF_UNIX, 0, path))


async def connect_tcp(host: str, port: int) -> PlainSocket:
    """Connect to the first address of a host that answers; the next one is tried soon beside it.

    :raises OSError: if all of them fail; its cause tells why
    """
    addresses = await getaddrinfo(host, port)
    errors: list[Exception] = []
    connected: list[socket.socket] = []

    async def attempt(family: int, protocol: int, address: Any, failed: Event) -> None:
        try:
            sock = await _connect(family, protocol, address)
        except OSError as exc:
            errors.append(exc)
            failed.set()
        else:
            connected.append(sock)
            group.cancel_scope.cancel()

    try:
        async with create_task_group() as group:
            for family, _, protocol, _, address in addresses:
                failed = Event()
                group.start_soon(attempt, family, protocol, address, failed)
                with move_on_after(_NEXT_ATTEMPT):
                    await failed.wait()
        if not connected:
            cause = errors[0] if len(errors) == 1 else ExceptionGroup("each attempt", errors)
            raise OSError("all connection attempts failed") from cause
        connected[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        for sock in connected:
            sock.close()
        raise
    for sock in connected[1:]:
        sock.close()
    return PlainSocket(connected[0])


async def getaddrinfo(host: str, port: int) -> list[tuple[Any, ...]]:
    """Look up a host; what `socket.getaddrinfo` returns.

    :raises socket.gaierror: if there is no such host
    """
    try:
        name = host.encode("ascii")
    except UnicodeEncodeError:
        import idna  # comes with AnyIO; Python's own codec knows the rules of 2003 only

        name = idna.encode(host, uts46=True)
    look_up = partial(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
    try:
        return look_up(flags=socket.AI_NUMERICHOST)  # an address needs no look-up, so no thread
    except socket.gaierror:
        return await in_thread(look_up)


def _unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes the kernel holds that the other side hasn't got, where it tells."""
    if sys.platform == "linux":
        try:
            return int.from_bytes(ioctl(sock, TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):  # closed
            return 0
    return 0


async def _connect(family: int, protocol: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        sock.setblocking(False)
        number = sock.connect_ex(address)
        if number in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            await wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock
