"""What the parts of one channel share."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from anyio import CancelScope, EndOfStream, Event, current_time
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint_if_cancelled

from .._exceptions import ProtocolError, RPCError, TransportClosedError
from .._protocol._ahead import Ahead
from .._protocol._conversation import Conversation
from .._protocol._records import Record
from .._protocol._referred import Referred
from .._protocol._streams import Consumer
from .._protocol._values import Packed
from .._runtime._clock import OneShot, cancellation_check, clock, one_shots
from .._runtime._fresh import fresh_copy
from .._runtime._timer import Timer
from .._wire_errors import handler_error, library_error
from ..abc import Envelope, Transport
from ._outbox import Outbox

logger = logging.getLogger("anyio_kkrpc")


class Lender(Protocol):
    """What runs handlers."""

    def lend(self) -> None:
        """A handler begins to wait for another peer."""

    def take_back(self) -> None:
        """That is over."""


class NoReferences:
    """What stands for `References` where nothing is passed by reference."""

    def open(self) -> None:
        """Nothing to do."""

    def passing(self, *what: object, **options: object) -> None:
        """Nothing is passed."""

    def give(self, value: Any, peer: str | None) -> Any:
        """A result travels as it is."""
        return value

    def error(self, exc: BaseException, peer: str | None) -> dict[str, Any]:
        """Nothing is given by it."""
        return handler_error(exc)

    def not_sent(self, value: Any, peer: str | None) -> None:
        """Nothing was given."""


class Core:
    """Protocol, transport, clock, deadlines and the end of one channel; it has no task of its own.

    :param remote_callback: see `Conversation`
    :ivar timeout: seconds that a call and an item are waited for, unless they say otherwise
    :ivar send_tracebacks: whether errors carry the traceback of what raised them
    :ivar now: AnyIO's clock
    :ivar checkpoint_if_cancelled: AnyIO's
    :ivar one_shot: makes an event that one task waits for
    :ivar is_open: whether it has begun and not ended
    :ivar reason: why the channel has ended, ``None`` as long as it hasn't
    :ivar lender: what is told that a handler waits for another peer; ``None`` if this side serves
        nothing
    :ivar references: what is passed by reference, `References`
    :ivar refused: records that were not legal
    :ivar dropped_callbacks: invocations that were thrown away
    :ivar send_envelope: sends an envelope, without asking whether the channel is open
    :ivar post: sends a record without waiting, as the other three of `Outbox` do
    """

    __slots__ = (
        "_is_closed",
        "_standing",
        "_tasks",
        "abandon",
        "broadcast",
        "checkpoint_if_cancelled",
        "conversation",
        "dropped_callbacks",
        "is_open",
        "lender",
        "now",
        "one_shot",
        "outbox",
        "owe",
        "post",
        "reason",
        "references",
        "refused",
        "release",
        "send_envelope",
        "send_tracebacks",
        "timeout",
        "timer",
        "transport",
    )

    def __init__(
        self,
        transport: Transport,
        remote_callback: Callable[[str, str | None, str, Ahead | None], Callable[..., Any]],
        *,
        timeout: float | None,
        send_tracebacks: bool,
    ) -> None:
        self.transport: Transport = transport
        self.timeout: float | None = timeout
        self.send_tracebacks: bool = send_tracebacks
        self.broadcast: bool = transport.capabilities.broadcast
        self.conversation: Conversation = Conversation(
            os.urandom(8).hex() + "-",
            remote_callback,
            broadcast=self.broadcast,
            depend=transport.watch,
            referred=Referred(self._take, library_error),
        )
        self.outbox: Outbox = Outbox(self.conversation, transport)
        self.post: Callable[..., None] = self.outbox.post
        self.owe: Callable[[Record, str | None], None] = self.outbox.owe
        self.abandon: Callable[[Consumer], None] = self.outbox.abandon
        self.release: Callable[..., None] = self.outbox.release
        self.send_envelope: Callable[[Envelope], Awaitable[None]] = transport.send
        # `References`, which need this: see `refer_with`.
        self.references: Any = NoReferences()
        self.timer: Timer = Timer()
        self.now: Callable[[], float] = current_time
        self.checkpoint_if_cancelled: Callable[[], Awaitable[None]] = checkpoint_if_cancelled
        self.one_shot: Callable[[], OneShot] = Event
        self.lender: Lender | None = None
        self.refused: int = 0
        self.dropped_callbacks: int = 0
        self.is_open: bool = False
        self.reason: Exception | None = None
        self._tasks: TaskGroup | None = None
        self._standing: list[CancelScope] = []
        self._is_closed = False

    def enter(self) -> None:
        """Find out what event loop there is."""
        self.now, self.one_shot = clock(), one_shots()
        self.checkpoint_if_cancelled = cancellation_check()
        self.outbox.open()
        self.references.open()

    def serve_with(self, lender: Lender) -> None:
        """Note that this side serves, and what is told that a handler waits for another peer."""
        self.lender = lender

    def refer_with(self, references: Any) -> None:
        """Note what is passed by reference."""
        self.references = references

    def _take(self, value: Packed, sender: str | None) -> Any:
        return self.references.take(value, sender)

    def note_dropped_callback(self) -> None:
        """Note that an invocation of a function of this side was thrown away."""
        self.dropped_callbacks += 1

    def open(self, tasks: TaskGroup) -> None:
        """Begin, with the task group of the channel."""
        self._tasks = tasks
        self.is_open = self.reason is None

    def start_standing(self, function: Callable[[], Awaitable[object]], what: str) -> None:
        """Start a task that runs until it ends, or until `close`, also where the scope around the
        channel ends.

        What it does is needed as long as handlers and streams have time to finish.
        """
        scope = CancelScope(shield=True)
        self._standing.append(scope)
        if self._is_closed:
            scope.cancel()  # nobody else would

        async def run() -> None:
            try:
                with scope:
                    await function()
            finally:
                self._standing.remove(scope)

        self.start(run, what)

    def close(self) -> None:
        """End all tasks of the channel."""
        self._is_closed = True
        for scope in self._standing:
            scope.cancel()
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def end(self, reason: Exception) -> None:
        """End: from now on nothing is sent but what `finish` of the outbox has sent."""
        self.reason = reason
        self.is_open = False
        self.outbox.close()

    def start(self, function: Callable[[], Any], what: str) -> None:
        """Start a task of the channel."""
        if self._tasks is not None:
            self._tasks.start_soon(function, name=f"anyio_kkrpc {what}")

    def refuse(self, exc: ProtocolError) -> None:
        """Count and log a record that isn't legal."""
        self.refused += 1
        logger.warning("a record was refused: %s", exc)

    async def send(self, record: Record, recipient: str | None) -> None:
        """Send a record to a peer.

        :raises TransportClosedError: if the channel has ended
        """
        if self.reason is not None:
            raise self.closed_error()
        await self.send_envelope(Envelope(record, None, recipient))

    def closed_error(self, cause: Any = None) -> Exception:
        """Return a new exception that tells why the channel or the transport is of no use.

        :param cause: what is known to be the reason, if it is an error of this library
        """
        if isinstance(cause, RPCError):
            return cause
        reason = self.reason
        if self._tasks is None:
            return RuntimeError("the channel has not been entered: use 'async with'")
        if isinstance(reason, EndOfStream):
            return TransportClosedError("the other side has closed the connection")
        if isinstance(reason, RPCError):
            return fresh_copy(reason)
        error = TransportClosedError("the RPC channel has ended")
        error.__cause__ = reason
        return error
