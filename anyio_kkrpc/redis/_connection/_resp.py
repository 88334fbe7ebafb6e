"""RESP on an AnyIO byte stream: commands out, replies matched to them in order.

A connection is used in one of two ways.

*Exclusive*: one task at a time calls `Connection.execute`, which writes and reads in that task with
nobody between it and the socket. This is for blocking reads. A command that is cancelled or fails
half-way closes the connection, so that its late reply is never taken for another command's.

*Pipelined*: any number of tasks call `Connection.request`, or `Connection.post` and
`Connection.flush`, while `Connection.run` hands out the replies. Whoever is the first to have
something to write hands it to the socket at once, without awaiting. What comes up behind that, and
what the socket doesn't take, leaves with the writer of `run`, which is next. So a lone command
waits for nobody, many make large writes, and no cancellation tears a command. A request that is
cancelled is abandoned: its reply is dropped when it comes, and the connection stays good.

Who comes before anything has been read since the last write comes behind it: a lone command doesn't
have to wake the writer at all. Time doesn't tell this: on a busy machine a turn of the event loop
takes longer than any bound that a quick one would want.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from anyio import (
    TASK_STATUS_IGNORED,
    BrokenResourceError,
    BusyResourceError,
    CancelScope,
    EndOfStream,
    Event,
    aclose_forcefully,
    create_task_group,
)
from anyio.abc import AsyncResource, ByteStream, TaskStatus
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from hiredis import ProtocolError, Reader

from ..._exceptions import TransportClosedError, TransportConnectionError
from ..._runtime._fresh import fresh_copy
from ._address import Address, describe
from ._chunks import ALONE, rest_of, take_chunk
from ._command import Argument, pack
from ._errors import Parse, RedisError, named, parse_error
from ._incoming import READ_SIZE
from ._role import Role
from ._socket import SocketTraffic, Traffic

__all__ = ("Connection",)

logger = logging.getLogger("anyio_kkrpc")

OnReply: TypeAlias = Callable[[Any], None]

# Bytes that wait for a write under way before those who add more wait too.
HIGH_WATER = 1024 * 1024
_YIELD_EVERY = 32

_MORE: Any = object()
_LOST = (BrokenResourceError, EndOfStream)


class _Pending:
    """The reply that a request waits for."""

    __slots__ = ("event", "reply")

    def __init__(self) -> None:
        self.event = Event()
        self.reply: Any = _MORE

    def answer(self, reply: Any) -> None:
        self.reply = reply
        self.event.set()


class Connection(AsyncResource):
    """A connection to a Redis server. `.open_connection` makes one.

    :param parse: returns the exception for an error reply
    :ivar error: why the connection can't be used any more: `TransportClosedError` after `aclose` or
        a cancelled `execute`, `TransportConnectionError` with its cause if it broke, else ``None``
    :ivar received: bytes that were read by `execute` and `execute_many`
    :ivar refused: error replies to commands that nobody waits for; they are logged
    :ivar before_write: called before each write and each `request`, to `post` what is to go along
    :ivar late: called before the next write, to `post` what is to be written, and to unset this
    :ivar silence: seconds for which nothing may move while the server owes an answer, see `Watch`
    :ivar role: what the server was at the login, ``None`` if it wasn't asked or didn't tell
    """

    def __init__(
        self, stream: ByteStream, address: Address, silence: float = 5.0, parse: Parse = parse_error
    ) -> None:
        self.address = address
        self.error: TransportClosedError | TransportConnectionError | None = None
        self.received = self.refused = 0
        self.before_write: Callable[[], None] | None = None
        self.late: Callable[[], object] | None = None
        self.silence = silence
        self.role: Role | None = None
        self._stream = stream
        reader = Reader(replyError=parse, notEnoughData=_MORE, errors="replace")
        self._feed, self._gets, self._has_data = reader.feed, reader.gets, reader.has_data
        self._receive = stream.receive
        # Streams that can't write at once, such as TLS, leave it all to the writer.
        self._send_nowait: Callable[[bytes | memoryview], int] = getattr(
            stream, "send_nowait", lambda _: 0
        )
        self._flushes = 0
        # Whether something was read since the last write.
        self._answered = True
        self._executing = self._running = self._writing = False
        self._expected: deque[OnReply] = deque()
        self._outgoing: deque[bytes | memoryview] = deque()
        self._outgoing_size = 0
        self._handed_over = Event()
        self._room: Event | None = None
        self._broken_off = Event()

    @property
    def closed(self) -> bool:
        """Whether it can't be used any more."""
        return self.error is not None

    @property
    def owed(self) -> bool:
        """Whether the server owes an answer."""
        return self._executing or bool(self._expected)

    @property
    def traffic(self) -> Traffic:
        """What has come and left, and what is to leave, what waits here included."""
        received, gone, given, asked, answered = self._stream.extra(SocketTraffic.traffic)
        return Traffic(received, gone, given + self._outgoing_size, asked, answered)

    @property
    def has_room(self) -> bool:
        """Whether little enough waits to be written that more may be posted without waiting."""
        return self._outgoing_size <= HIGH_WATER

    # Exclusive use

    async def execute(self, *args: Argument) -> Any:
        """Send a command and return its reply. If it is cancelled, the connection is closed.

        :raises RedisError: the server's error reply; if it is about the command, its text names
            command and key
        :raises TransportConnectionError: if the connection breaks or is broken
        :raises TransportClosedError: if it is closed
        """
        (reply,) = await self._execute(pack(args), 1)
        if isinstance(reply, Exception):
            raise named(reply, args)
        return reply

    async def execute_many(self, commands: Iterable[tuple[Argument, ...]]) -> list[Any]:
        """Send commands in one write and return their replies; error replies are among them.

        If it is cancelled, the connection is closed.
        """
        packed = [pack(args) for args in commands]
        return await self._execute(b"".join(packed), len(packed))

    async def _execute(self, data: bytes, count: int) -> list[Any]:
        if self.error is not None:
            raise self._unusable()
        if self._executing or self._running:
            raise BusyResourceError("using")
        self._executing = True
        replies: list[Any] = []
        try:
            sent = self._send_nowait(data)
            if sent < len(data):
                await self._stream.send(rest_of(data, sent))
            while len(replies) < count:
                while (reply := self._gets()) is _MORE:
                    self._feed(piece := await self._receive(READ_SIZE))
                    self.received += len(piece)
                replies.append(reply)
            if self._has_data():
                raise ProtocolError("a reply that nobody asked for")
        except BaseException as exc:
            refusals = [reply for reply in replies if isinstance(reply, Exception)]
            # A server that takes no more clients says so and closes, whatever it was asked.
            self._break(refusals[-1] if refusals and isinstance(exc, _LOST) else exc)
            await aclose_forcefully(self._stream)
            if isinstance(exc, Exception):
                raise self._unusable()
            raise
        finally:
            self._executing = False
        return replies

    # Pipelined use

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Hand out replies until the connection is closed. Needed for pipelined use, once.

        When it ends, whatever the reason, all that is pending has failed, and the socket is closed.

        :raises TransportConnectionError: if the connection breaks; after `aclose` it returns
        """
        if self._running or self._executing:
            raise BusyResourceError("using")
        self._running = True
        try:
            async with create_task_group() as group:
                group.start_soon(self._go_on_writing, name="anyio_kkrpc redis write")
                group.start_soon(self._read_on, group.cancel_scope, name="anyio_kkrpc redis read")
                task_status.started()
                await self._broken_off.wait()
                group.cancel_scope.cancel()
        finally:
            self._fail(self._closed("its reader was cancelled"))
            await aclose_forcefully(self._stream)
        if isinstance(self.error, TransportConnectionError):
            raise self._unusable()

    async def request(self, *args: Argument) -> Any:
        """Send a command, along with others, and return its reply.

        If it is cancelled, the command may or may not have been sent, and its reply is dropped.

        :raises RedisError: the server's error reply; if it is about the command, its text names
            command and key
        :raises TransportConnectionError, TransportClosedError: if it breaks, is broken or closed
        """
        pending = _Pending()
        if self.before_write is not None and self.error is None:
            self.before_write()
        self.post(pack(args), 1, pending.answer)
        await self.flush()
        if pending.reply is _MORE:
            await pending.event.wait()
        else:
            await checkpoint_if_cancelled()
        reply = pending.reply
        if isinstance(reply, Exception):
            raise named(reply, args)
        return reply

    def post(self, packed: bytes, replies: int = 1, on_reply: OnReply | None = None) -> None:
        """Append packed commands to what is to be written; `flush` must follow.

        :param replies: how many commands these are
        :param on_reply: called with each reply or error (the server's, or this connection's if it
            ends first). It must not block. If ``None``, error replies are logged and counted.
        :raises TransportConnectionError, TransportClosedError: if it is broken or closed
        """
        if self.error is not None:
            raise self._unusable()
        if self._executing:
            raise BusyResourceError("using")
        if on_reply is None:
            on_reply = self._ignore
        if replies == 1:
            self._expected.append(on_reply)
        else:
            self._expected.extend((on_reply,) * replies)
        self._outgoing.append(packed)
        self._outgoing_size += len(packed)

    def expect_more(self) -> None:
        """Note that several tasks that run next will post commands: these are to go in one write.

        The writer, which is woken after those tasks, does it. Trio may run it before them: then the
        first of them wakes it again.
        """
        self._answered = False
        if not self._writing:
            self._writing = True
            self._handed_over.set()

    def flush_nowait(self) -> bool:
        """Write what was posted, or leave it to a write under way; return whether that is all.

        If not, `flush` must be awaited: much waits to be written, the connection is broken, or it
        is time to yield to other tasks.
        """
        if not self._writing and (self._outgoing or self.late):
            if self._answered:
                self._write_now()
            if self._outgoing or self.late:
                self._writing = True
                self._handed_over.set()
        self._flushes += 1
        return (
            self._flushes % _YIELD_EVERY != 0
            and self._outgoing_size <= HIGH_WATER
            and self.error is None
        )

    async def flush(self) -> None:
        """Write what was posted, or leave it to a write under way.

        If more than `HIGH_WATER` bytes wait, wait until they have become less. If it is cancelled,
        what was posted is written all the same. It yields to other tasks once in 32 times.

        :raises TransportConnectionError, TransportClosedError: if it breaks, is broken or closed
        """
        if not self.flush_nowait():
            await self.wait_flushed()

    async def wait_flushed(self) -> None:
        """Wait for what `flush_nowait` has left; raises what `flush` does."""
        if not self._flushes % _YIELD_EVERY:
            await checkpoint()
        while self._outgoing_size > HIGH_WATER:
            room = self._room = self._room or Event()
            await room.wait()
        if self.error is not None:
            raise self._unusable()

    async def aclose(self) -> None:
        """Close the connection; all that is pending fails. It is closed even if this is cancelled.

        Data that was written is not waited for.
        """
        self._fail(self._closed())
        await self._stream.aclose()

    # Tasks

    def _write_now(self) -> None:
        data = self._next_chunk()
        try:
            sent = self._send_nowait(data)
        except Exception as exc:
            self.break_off(exc)
            return
        if sent < len(data):
            self._outgoing.appendleft(memoryview(data)[sent:])
            self._outgoing_size += len(data) - sent

    async def _go_on_writing(self) -> None:
        """Write what came up behind the first that wrote, and what the socket didn't take."""
        while True:
            await self._handed_over.wait()
            self._handed_over = Event()
            try:
                while self._outgoing or self.late:
                    await self._write(self._next_chunk())
            except BaseException as exc:
                self._break(exc)  # how much was written isn't known
                await aclose_forcefully(self._stream)
                if not isinstance(exc, Exception):
                    raise
            self._writing = False

    async def _write(self, data: bytes | memoryview) -> None:
        sent = self._send_nowait(data)
        if sent < len(data):
            await self._stream.send(rest_of(data, sent))

    def _next_chunk(self) -> bytes | memoryview:
        """Take what is to be written next."""
        self._answered = False
        if self.late is not None:
            self.late()
        if self.before_write is not None:
            self.before_write()
        if self._outgoing_size < ALONE:
            data: bytes | memoryview = b"".join(self._outgoing)
            self._outgoing.clear()
            self._outgoing_size = 0
        else:
            data = take_chunk(self._outgoing)
            self._outgoing_size -= len(data)
        if self._room is not None and self._outgoing_size <= HIGH_WATER:
            self._room.set()
            self._room = None
        return data

    async def _read_on(self, scope: CancelScope) -> None:
        try:
            await self._read()
        except Exception as exc:
            self._break(exc)
        scope.cancel()

    async def _read(self) -> None:
        feed, gets, receive = self._feed, self._gets, self._receive
        expected = self._expected
        while True:
            feed(await receive(READ_SIZE))
            self._answered = True
            while (reply := gets()) is not _MORE:
                if not expected:
                    raise ProtocolError("a reply that nobody asked for")
                on_reply = expected.popleft()
                try:
                    on_reply(reply)
                except Exception:
                    logger.exception("handling a reply of %s failed", self.address)
            if self.error is not None:
                raise self._unusable()

    # The end

    def break_off(self, exc: Exception) -> None:
        """Give the connection up as broken, because of ``exc``; `run` ends. Doesn't wait."""
        self._break(exc)
        self._broken_off.set()

    async def give_up(self, why: str) -> None:
        """Give the connection up, because the other side seems to be dead; who waits is told."""
        self.break_off(TimeoutError(why))
        await aclose_forcefully(self._stream)

    def _ignore(self, reply: Any) -> None:
        if isinstance(reply, RedisError):
            self.refused += 1
            logger.warning("%s refused a command: %s", self.address, reply)

    def _break(self, exc: BaseException) -> None:
        if isinstance(exc, Exception):
            error = TransportConnectionError(
                f"Redis Streams connection error: connection to {self.address} lost "
                f"({describe(exc)})"
            )
            error.__cause__ = exc
            self._fail(error)
        else:
            self._fail(self._closed(" because a command was cancelled half-way"))

    def _closed(self, why: str = "") -> TransportClosedError:
        return TransportClosedError(f"connection to {self.address} was closed{why}")

    def _fail(self, error: TransportClosedError | TransportConnectionError) -> None:
        """Record the reason, and hand it to everyone who waits. The first reason counts."""
        if self.error is not None:
            return
        self.error, self.late = error, None
        self._outgoing.clear()
        self._outgoing_size = 0
        if self._room is not None:
            self._room.set()
        while self._expected:
            try:
                self._expected.popleft()(self._unusable())
            except Exception:
                logger.exception("handling a reply of %s failed", self.address)

    def _unusable(self) -> TransportClosedError | TransportConnectionError:
        # Each who raises it has one of their own, so that tracebacks don't mix.
        assert self.error is not None
        return fresh_copy(self.error)
