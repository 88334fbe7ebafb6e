"""What comes from a socket. On asyncio, the event loop is told to look at it once for all reads.

AnyIO's `wait_readable` has the loop begin and end to look each time, which on uvloop takes a dozen
system calls. On trio it takes one.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.selector_events import BaseSelectorEventLoop
from typing import Protocol

from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
    notify_closing,
)
from anyio.lowlevel import checkpoint, current_token

from ..._runtime._clock import readable

__all__ = ("READ_SIZE", "Incoming", "incoming_of")

# Bytes of one read. More is no faster for replies of megabytes (measured with 5 MB).
READ_SIZE = 64 * 1024
# Seconds from a read within which an error behind what it took is seen, where no loop tells it.
_LOOK_AFTER = 0.05


class Incoming(Protocol):
    """What comes from a socket.

    :ivar count: how often bytes came
    """

    count: int

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        """Return what has come, as `anyio.abc.ByteReceiveStream.receive` does.

        If it is cancelled, nothing is lost.
        """
        ...

    def has_unread(self) -> bool:
        """Whether something has come that nobody has received."""
        ...

    def close(self) -> None:
        """Fail whoever receives. To be called before the socket is closed."""
        ...


def incoming_of(sock: socket.socket) -> Incoming:
    """Return what comes from a socket that doesn't block, as suits the event loop."""
    loop = current_token().native_token
    windows = getattr(asyncio, "ProactorEventLoop", ())  # it can't look at sockets
    if isinstance(loop, asyncio.AbstractEventLoop) and not isinstance(loop, windows):
        return _Watched(sock, loop)
    return _Asked(sock)


class _Asked:
    """Has the event loop look at the socket whenever somebody receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._wait_readable = readable()
        self._closed = False
        # Whether the last read filled its buffer, so that there is likely more.
        self._more = False
        self.count = 0

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        while True:
            if self._closed:
                raise ClosedResourceError
            if self._more:
                self._more = False
                await checkpoint()
            else:
                await self._wait_readable(self._socket)
            if self._closed:
                raise ClosedResourceError
            try:
                data = self._socket.recv(max_bytes)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise BrokenResourceError from exc
            if not data:
                raise EndOfStream
            self.count += 1
            self._more = len(data) == max_bytes
            return data

    def has_unread(self) -> bool:
        return _peek(self._socket)

    def close(self) -> None:
        self._closed = True
        notify_closing(self._socket)


class _Watched:
    """Has the event loop look at the socket from the first time on that somebody receives.

    What comes while nobody receives is read once: then the loop looks no more until somebody does.
    So this holds `READ_SIZE` bytes at most, and a peer that writes more has to wait.
    """

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = sock
        self._number = sock.fileno()
        self._loop = loop
        # libuv, and so uvloop, looks no more after an error, though there may be data to read.
        self._stops_at_errors = not isinstance(loop, BaseSelectorEventLoop)
        self._watches = self._ended = self._closed = False
        self._data = b""
        self._error: OSError | None = None
        # What will look for an error, one for all reads that come until then.
        self._look: asyncio.TimerHandle | None = None
        self._receiver: asyncio.Future[None] | None = None
        self.count = 0

    async def receive(self, max_bytes: int = READ_SIZE) -> bytes:
        if self._receiver is not None:
            raise BusyResourceError("reading from")
        if self._data or self._ended:
            await checkpoint()
        while not (self._data or self._ended):
            if self._error is not None:
                self._readable()  # what came before it
                continue
            if not self._watches:
                self._loop.add_reader(self._number, self._readable)
                self._watches = True
            # A task that is cancelled as it is woken takes nothing along: the data stay here.
            self._receiver = self._loop.create_future()
            try:
                await self._receiver
            finally:
                self._receiver = None
        if self._closed:
            raise ClosedResourceError
        data = self._data
        if not data:
            if self._error is not None:
                raise BrokenResourceError from self._error
            raise EndOfStream
        self._data = data[max_bytes:]
        return data[:max_bytes]

    def _readable(self) -> None:
        if self._data:
            self._stop_watching()
            return
        try:
            self._data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            if self._error is None:
                return
        except OSError as exc:
            self._error = exc.with_traceback(None)  # not the frame that has this
        if not self._data:
            self._ended = True
            self._stop_watching()
        else:
            self.count += 1
            if self._stops_at_errors and self._look is None:
                self._look = self._loop.call_later(_LOOK_AFTER, self._look_for_error)
        receiver = self._receiver  # as `_wake` does, without the call: this is done for each read
        if receiver is not None and not receiver.done():
            receiver.set_result(None)

    def _look_for_error(self) -> None:
        self._look = None
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number and not self._ended:
            self._error = OSError(number, os.strerror(number))
            self._stop_watching()
            self._wake()

    def has_unread(self) -> bool:
        return bool(self._data) or (not self._ended and _peek(self._socket))

    def close(self) -> None:
        self._closed = self._ended = True
        self._stop_watching()
        if self._look is not None:
            self._look.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    def _stop_watching(self) -> None:
        if self._watches:
            self._watches = False
            self._loop.remove_reader(self._number)


def _peek(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False
