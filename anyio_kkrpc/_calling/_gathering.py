"""One question to all peers, and their answers as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextvars import copy_context
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from anyio import BusyResourceError, ClosedResourceError, Event
from anyio.lowlevel import checkpoint_if_cancelled
from msgspec import Struct

from .._driver._core import Core
from .._driver._inflow import Inflow, RemoteStream
from .._driver._pump import Pump
from .._driver._references import PassedArguments
from .._exceptions import RPCError
from .._protocol._calls import Call
from .._protocol._state import CallInput, CallState
from .._protocol._streams import Consumer
from .._references._marking import USE
from .._runtime._timer import TimerEntry
from .._wire_errors import error_from_wire
from ..abc import Envelope
from ..middleware import Invocation, pass_through
from ._calls import Calls
from ._question import Question

__all__ = ("PeerReply", "Replies")

T = TypeVar("T")


class PeerReply(Struct, Generic[T], frozen=True):
    """What one peer answered.

    :ivar sender: its id, ``None`` where the transport has one peer only
    :ivar value: its result, ``None`` if it failed
    :ivar error: why it failed, or ``None``
    """

    sender: str | None
    value: T | None = None
    error: RPCError | None = None

    def result(self) -> T:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


@final
class Replies(AsyncIterator[PeerReply[T]], Generic[T]):
    """The answers to a question, made by `RPCChannel.broadcast`; also a context manager.

    It ends when the time is over or enough have answered. What still runs elsewhere when it is
    left is cancelled. One task at a time may read it.
    """

    def __init__(
        self,
        core: Core,
        calls: Calls,
        question: Question,
        timeout: float,
        limit: int | None,
    ) -> None:
        self._core = core
        self._calls = calls
        self._question = question
        self._timeout = timeout
        self._limit = limit
        self._call: Call | None = None
        self._timer: TimerEntry | None = None
        self._passed: PassedArguments | None = None
        self._items: deque[PeerReply[T]] = deque()
        self._senders: set[str | None] = set()
        self._wake: Event | None = None
        self._reading = False
        # No answer is wanted any more; and nor will one be, should middleware go on once more.
        self._ended = self._left = False

    def __aiter__(self) -> Replies[T]:
        return self

    async def __anext__(self) -> PeerReply[T]:
        """Return the next answer; the first one asked for sends the question.

        :raises TransportClosedError: if the channel was closed
        :raises RPCError: if the question could not be sent
        """
        if self._reading:
            raise BusyResourceError("reading from")
        self._reading = True
        try:
            return await self._next()
        finally:
            self._reading = False

    async def _next(self) -> PeerReply[T]:
        if self._call is None and not self._ended:
            await self._ask()
        if self._items:
            await checkpoint_if_cancelled()
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            call = self._call
            if call is not None and call.state is CallState.LOST:
                self._end(CallInput.LOSE)
                raise self._core.closed_error(call.lost)
            self._wake = Event()
            try:
                await self._wake.wait()
            finally:
                self._wake = None
        return self._items.popleft()

    async def aclose(self) -> None:
        """Ask no longer."""
        self._leave()
        await checkpoint_if_cancelled()

    async def __aenter__(self) -> Replies[T]:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._leave()

    def set(self) -> None:
        """Wake the reader."""
        if self._wake is not None:
            self._wake.set()

    def add(self, sender: str | None, value: Any, error: dict[str, Any] | None) -> bool:
        """Take an answer that came; return whether it is wanted. A second one of the same peer is a
        repetition.
        """
        if sender in self._senders or self._ended:
            return False
        self._senders.add(sender)
        failure: RPCError | None = None
        if error is not None:
            failure = error_from_wire(error)
        else:
            if isinstance(value, Consumer):
                value = RemoteStream(Inflow(self._core, value, self._core.timeout))
            question = self._question
            try:
                value = question.types.convert_result(value, question.path)
            except RPCError as exc:
                value, failure = None, exc
        self._items.append(PeerReply(sender, value, failure))
        if len(self._senders) == self._limit:
            self._end(CallInput.CANCEL)
        self.set()
        return True

    async def _ask(self) -> None:
        question, middleware = self._question, self._calls.middleware
        if not self._core.is_open:
            raise self._core.closed_error()
        options = question.options
        if not middleware:
            await self._send(question.args, question.kwargs, options.metadata)
            return

        async def last(invocation: Invocation) -> None:
            metadata = invocation.metadata or None
            await self._send(invocation.args, invocation.kwargs, metadata)

        invocation = Invocation(
            side="client",
            operation="broadcast",
            method=question.method,
            args=list(question.args),
            kwargs=dict(question.kwargs),
            metadata=dict(options.metadata or {}),
            peer=options.to,
        )
        await pass_through(middleware, invocation, last)

    async def _send(
        self, args: Sequence[Any], kwargs: dict[str, Any], metadata: dict[str, Any] | None
    ) -> None:
        """Ask all. If middleware goes on once more, what was asked before is taken back."""
        core, question = self._core, self._question
        options = question.options
        self._take_back()
        if USE.begun:
            self._passed = core.references.passing(options.to, args, kwargs, to_all=True)
        if self._passed is not None:
            args, kwargs = self._passed.args or (), self._passed.kwargs
        call, request = core.conversation.call(
            "call",
            list(question.path),
            options.to,
            args=args,
            kwargs=kwargs,
            budget=max(int(self._timeout * 1000), 1),
            meta=metadata,
            gather=True,
        )
        for producer in call.producers or ():
            Pump(core, producer, copy_context())
        call.driver = self
        if self._passed is not None:
            call.passes(self._passed)
        self._call = call
        deadline = core.now() + self._timeout
        self._timer = core.timer.at(deadline, self._expire)
        envelope = call.sent = Envelope(request, None, options.to, deadline=deadline)
        try:
            await core.send_envelope(envelope)
        except BaseException:
            self._end(CallInput.CANCEL)
            raise

    def _expire(self) -> None:
        self._end(CallInput.TIMEOUT)
        self.set()

    def _leave(self) -> None:
        self._left = True
        self._end(CallInput.CANCEL)

    def _take_back(self) -> None:
        self._end(CallInput.CANCEL)
        if self._left:
            raise ClosedResourceError
        self._call = self._timer = self._passed = None
        self._items.clear()
        self._senders.clear()
        self._ended = False

    def _end(self, step: CallInput) -> None:
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._core.timer.cancel(self._timer)
        if self._passed is not None:
            self._passed.end()
        call = self._call
        if call is not None and call.state is CallState.WAITING:
            self._calls.finish(call, step)
            self._calls.cancel(call)
