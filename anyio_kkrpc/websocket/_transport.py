"""RPC over a WebSocket, whichever side of it this is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from anyio import (
    CancelScope,
    EndOfStream,
    create_task_group,
    move_on_after,
    sleep,
)
from msgspec import Struct

from .._exceptions import OverloadedError
from ..codecs import get_codec
from ..kit._carrying import CarryingOptions
from ..kit._messages import Messages, MessageTransport
from ..kit._options import Seconds, check, takes
from ..kit._queue import QueueStatistics
from ._asking import Asking
from ._socket import FAILED, NORMAL, POLICY, TOO_BIG, Ending, Socket, short

__all__ = ("WebSocketStatistics", "WebSocketTransport")

CLOSE_TIMEOUT = 2.0
DESTROY = b"__DESTROY__"
# Messages without any sense that are skipped; who sends more of them is none of ours.
MOST_INVALID = 100


class WebSocketStatistics(Struct, frozen=True):
    """What a `WebSocketTransport` has done and holds.

    :ivar queue: of requests that wait for a handler
    :ivar sent: records written
    :ivar received: records read
    :ivar invalid: messages that held no valid record, and were skipped
    """

    queue: QueueStatistics
    sent: int
    received: int
    invalid: int


@dataclass(frozen=True, kw_only=True, repr=False)
class WebSocketOptions(CarryingOptions):
    """All that `WebSocketTransport` takes."""

    socket: Socket = field(kw_only=False)
    ping_interval: Seconds | None = 20.0
    ping_timeout: Seconds = 20.0


@final
class WebSocketTransport(MessageTransport):
    """Carries records over a WebSocket, each as a message: JSON as text, CBOR as bytes.

    `connect_websocket` and `Endpoint` make it. It is an async context manager that owns the socket.
    A message that is too large ends the connection, and so do a hundred that hold no record.
    Reading goes on while requests wait; one that finds no room is answered with `OverloadedError`.

    :param socket: an open one
    :param ping_interval: seconds of silence after which the other side is asked whether it is
        there; ``None`` for never
    :param ping_timeout: seconds that it has to answer. So one that is gone is noticed within two
        intervals and twice this time.
    :param codec: ``"json"``, ``"cbor"`` or a `Codec`; both sides need the same
    :param dialect: how this side begins: ``"native"``, or as a TypeScript peer does: ``"kkrpc-2"``,
        ``"kkrpc-0"``. To a peer of kkrpc 0.x that begins, this side speaks as it does.
    :param superjson: with ``"kkrpc-0"``, whether this side writes superjson; if not, JSON
    :param max_message_size: bytes of one message, sent or received
    :param max_queue_size: requests that may wait for a handler
    :param max_queue_bytes: their size together, in bytes; of one over 4 KiB, what it weighs decoded
    :param overflow: which request is refused when the queue is full: ``"drop_newest"`` or
        ``"drop_oldest"``
    :param write_timeout: seconds that the other side may take no data before this one gives up
    :raises ValueError: if an option is out of range; the text names it
    :raises TypeError: if an option has the wrong type
    """

    @takes(WebSocketOptions, check)
    def __init__(self, options: WebSocketOptions) -> None:
        self._socket = options.socket
        self._max_size = options.max_message_size
        self._ping_interval = options.ping_interval
        self._ping_timeout = options.ping_timeout
        self._text = get_codec(options.codec).name == "json"
        carrying = options.carrying()
        super().__init__(Messages(self._write, self._close, name="WebSocketTransport", **carrying))
        self._asking = Asking(self._messages)
        self._reason: Exception | None = None
        self._farewell = NORMAL, ""

    def statistics(self) -> WebSocketStatistics:
        """Return what it has done and holds."""
        counts = self._messages.statistics()
        return WebSocketStatistics(
            queue=counts.queue,
            sent=counts.sent,
            received=counts.received,
            invalid=counts.invalid,
        )

    async def aclose(self, code: int = NORMAL, reason: str = "") -> None:
        """Write what waits, as far as that is quick, and close the socket. Idempotent.

        :param code: what the other side is told, 1000 or 3000 to 4999 unless you know better
        :param reason: likewise; as much of it as fits, 123 bytes
        """
        self.say_at_the_end(code, reason)
        await self._messages.aclose()

    def say_at_the_end(self, code: int, reason: str = "") -> None:
        """Set what the other side is told when this one closes, unless that was said already."""
        self._farewell = code, short(reason)

    # Reading

    async def _read(self) -> None:
        try:
            await self._read_and_watch()
        except Exception as exc:
            if isinstance(exc, Ending):
                self.say_at_the_end(exc.code, exc.reason)
            elif isinstance(exc, OverloadedError):
                self.say_at_the_end(POLICY, str(exc))
            # When the transport is left nobody is patient any more.
            with move_on_after(CLOSE_TIMEOUT, shield=True):
                await self._close()
            raise

    async def _read_and_watch(self) -> None:
        # What ends it is raised outside of the task group: the scope around may be cancelled too.
        async with create_task_group() as tasks:
            if self._ping_interval is not None:
                tasks.start_soon(self._watch, self._ping_interval, tasks.cancel_scope)
            try:
                await self._read_messages()
            except Exception as exc:
                self._reason = exc
            tasks.cancel_scope.cancel()
        reason, self._reason = self._reason, None
        try:
            if reason is not None:
                raise reason
        finally:
            del reason  # it has the frames that have it, and the last message

    async def _read_messages(self) -> None:
        receive, take, asking = self._socket.receive, self._messages.take, self._asking
        while True:
            message, is_text = await receive()
            if len(message) + asking.unread > self._max_size:
                raise Ending(TOO_BIG, f"a message exceeds {self._max_size} bytes")
            if not message:
                if is_text:
                    await self._socket.send(b"", False)
                continue
            if message == DESTROY and asking.may_be_classic:
                raise EndOfStream
            for part in asking.parts(message):
                take(part)
            if self._messages.invalid > MOST_INVALID:
                raise Ending(POLICY, f"{MOST_INVALID} messages were not valid")

    async def _watch(self, interval: float, reading: CancelScope) -> None:
        """Ask the other side whether it is there when nothing has come for a while."""
        while True:
            self._socket.forget()
            await sleep(interval)
            try:
                if self._socket.heard or await self._is_there():
                    continue
                text = f"no answer to a ping within {self._ping_timeout:g} seconds"
                self._reason = Ending(FAILED, text)
            except Exception as exc:
                self._reason = exc
            reading.cancel()
            return

    async def _is_there(self) -> bool:
        """Ask, and wait for a sign of life: the answer, or anything else."""
        must_answer = True
        with move_on_after(self._ping_timeout) as asking:
            must_answer = await self._ask()
        if asking.cancelled_caught:
            return False  # it takes nothing
        with move_on_after(self._ping_timeout):
            await self._socket.wait_for_a_sign()
        return self._socket.heard or not must_answer

    async def _ask(self) -> bool:
        """Ask, and return whether an answer is certain."""
        if await self._socket.ping():
            return True
        questions, must_answer = self._asking.questions()
        for question in questions:
            await self._socket.send(question, True)
        return must_answer

    # Writing

    async def _write(self, messages: list[bytes]) -> None:
        send, text, end = self._socket.send, self._text, self._asking.end_of_line
        for message in messages:
            await send(message + end, text)

    async def _close(self) -> None:
        await self._socket.close(*self._farewell)
