"""Asynchronous iterators as arguments and results, with credits in both directions."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from anyio import BusyResourceError, Event, current_time
from anyio.lowlevel import checkpoint_if_cancelled
from msgspec import UNSET

from .._exceptions import DeliveryError, ProtocolError, RemoteError, RPCError, RPCTimeoutError
from .._protocol._records import StreamReply, StreamRequest
from .._protocol._streams import Consumer
from .._protocol._values import REFERENCES, Packed, pack_result
from .._runtime._timer import TimerEntry
from .._values._conversion import convert_items, convert_value
from .._wire_errors import error_from_wire, handler_error
from ._core import Core
from ._endings import StreamOver

__all__ = ("RemoteStream",)

T = TypeVar("T")


@final
class RemoteStream(AsyncIterator[T], Generic[T]):
    """A stream of the other side: an asynchronous iterator that is also a context manager.

    Items are fetched ahead by credits: at most 32 of them, and up to 256 small ones where the
    reader takes them quicker than a round trip brings more. Of those that aren't small, no more
    wait than weigh 1 MiB together, and one beside them. Leaving it early, by ``async with``, by
    `aclose` or by dropping the iterator, ends the source at the other side. One task at a time may
    read it.
    """

    __slots__ = ("_inflow",)

    def __init__(self, inflow: Inflow) -> None:
        self._inflow = inflow

    def __aiter__(self) -> RemoteStream[T]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        """Return the next item.

        :raises RemoteError: if the source failed, after the items before it
        :raises DeliveryError: if the peer that has the source is gone, or an item was lost
        :raises RPCTimeoutError: if no item came within the call's timeout; the stream is ended
        :raises TransportClosedError: if the channel was closed
        :raises RPCValidationError: if the item doesn't fit the Protocol of a typed proxy, the
            annotation of the handler that reads it, or that of the one that made it
        """
        return self._inflow.next(self)

    async def aclose(self) -> None:
        """End the stream; the source at the other side is closed. Harmless if it has ended."""
        self._inflow.leave()
        await checkpoint_if_cancelled()

    async def areturn(self, value: Any = UNSET) -> Any:
        """End the stream, and wait until its source is closed.

        :param value: what is returned unless the source has something else; a generator in
            JavaScript can end with a value of its own
        :return: the value that the source ended with
        :raises RemoteError: if closing the source failed
        :raises DeliveryError: if the peer that has the source is gone
        :raises RPCTimeoutError: if no answer came within the call's timeout
        :raises TypeError: if the value can't be sent; the stream is ended all the same
        """
        return await self._inflow.end_with(value)

    async def athrow(self, error: BaseException) -> T:
        """Raise an error in the source, where it yields, as with a generator here.

        What the source had yielded before is still to be read. If this is cancelled, the answer of
        the source is lost.

        :return: what the source yields next, if it has caught the error
        :raises StopAsyncIteration: if it has caught the error, and ended
        :raises RemoteError: if it hasn't, or has raised another one
        :raises DeliveryError: if the peer that has the source is gone
        :raises RPCTimeoutError: if no answer came within the call's timeout; the stream is ended
        """
        if not isinstance(error, Exception):
            self._inflow.leave()
            raise error
        item: T = await self._inflow.throw(error)
        return item

    async def __aenter__(self) -> RemoteStream[T]:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._inflow.leave()

    def __del__(self) -> None:
        self._inflow.leave()


def watch(stream: RemoteStream[Any], over: StreamOver) -> None:
    """Have a function called once a stream has ended, or was left."""
    stream._inflow.watch(over)


def leave(stream: RemoteStream[Any]) -> None:
    """End a stream from this side, without awaiting; see `RemoteStream.aclose`."""
    stream._inflow.leave()


@convert_items.register(RemoteStream)
def _(stream: RemoteStream[Any], kind: Any, name: str, phase: str) -> None:
    stream._inflow.convert_items(kind, name, phase)


class _Question:
    """What is asked of a source, with the answer once it is there, or why there is none."""

    __slots__ = ("_error", "answered", "reply")

    def __init__(self) -> None:
        self.answered = Event()
        self.reply: StreamReply | None = None
        self._error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self._error = error
        self.answered.set()

    def failure(self) -> Exception:
        """Return why there is no answer, and keep it no longer than whoever is told."""
        error, self._error = self._error, None
        assert error is not None
        return error


class Inflow:
    """What a `RemoteStream` reads from. Held by the channel, so that the other can be collected."""

    __slots__ = (
        "_asked",
        "_consumer",
        "_core",
        "_end",
        "_items",
        "_kind",
        "_left",
        "_name",
        "_over",
        "_phase",
        "_reading",
        "_timeout",
        "_wake",
    )

    def __init__(self, core: Core, consumer: Consumer, timeout: float | None) -> None:
        self._kind: Any = Any
        self._name = self._phase = ""
        self._core = core
        self._consumer = consumer
        self._timeout = timeout
        self._items: deque[Any] = deque()
        self._wake: Event | None = None
        self._end: Exception | None = None
        self._reading = self._left = False
        self._over: StreamOver | None = None
        self._asked: _Question | None = None
        consumer.driver = self

    async def next(self, stream: object) -> Any:
        """Return the next item, or raise the end.

        :param stream: what is being read; it must not be collected meanwhile, though nobody else
            may hold it
        """
        if self._reading:
            raise BusyResourceError("reading from")
        items = self._items
        if items:
            await self._core.checkpoint_if_cancelled()
        else:
            await self._wait()
        item = items.popleft()
        pull = self._consumer.delivered()
        if pull is not None:
            self._core.post(pull, self._consumer.producer)
        if self._kind is Any:
            return item
        return convert_value(item, self._kind, self._name, self._phase)

    def convert_items(self, kind: Any, name: str, phase: str) -> None:
        """Convert each item as it is read; ``name`` and ``phase`` are for errors."""
        self._kind, self._name, self._phase = kind, name, phase

    async def _wait(self) -> None:
        self._reading = True
        entry: TimerEntry | None = None
        try:
            while not self._items:
                if self._end is not None:
                    end, self._end = self._end, StopAsyncIteration()
                    raise end
                pull = self._consumer.wait()
                if pull is not None:
                    self._core.post(pull, self._consumer.producer)
                if entry is None and self._timeout is not None:
                    entry = self._core.timer.at(current_time() + self._timeout, self._expire)
                wake = self._wake = Event()
                await wake.wait()
        finally:
            self._reading = False
            self._wake = None
            if entry is not None:
                self._core.timer.cancel(entry)

    async def end_with(self, value: Any) -> Any:
        """End it, and return what the source ended with; raises as `RemoteStream.areturn`."""
        if self._asked is not None:
            raise BusyResourceError("reading from")
        record = None
        if self._end is None:
            record = self._core.conversation.leave(self._consumer, _as_data(value), ask=True)
        self._items.clear()
        if record is None:
            await checkpoint_if_cancelled()
            self._end = StopAsyncIteration()
            return None if value is UNSET else value
        self._end, self._left = StopAsyncIteration(), True
        self._notify()
        try:
            reply = await self._ask(record)
        except TypeError:
            record.v = UNSET
            self._core.post(record, self._consumer.producer)
            raise
        finally:
            self._tell()
        if reply.e is not UNSET:
            raise error_from_wire(reply.e)
        return None if reply.v is UNSET else reply.v

    async def throw(self, error: Exception) -> Any:
        """Raise an error in the source; see `RemoteStream.athrow`."""
        if self._reading or self._asked is not None:
            raise BusyResourceError("reading from")
        if self._end is not None:
            raise error
        sent = handler_error(error, traceback=self._core.send_tracebacks)
        try:
            reply = await self._ask(self._consumer.throw(sent))
        except Exception:
            if self._end is not None:
                self._end = StopAsyncIteration()  # why it ended is told once
            raise
        if reply.e is not UNSET or reply.d is True:
            end = StopAsyncIteration() if reply.e is UNSET else error_from_wire(reply.e)
            self.finish(end)
            self._end = StopAsyncIteration()
            raise end
        if self._kind is Any:
            return reply.v
        return convert_value(reply.v, self._kind, self._name, self._phase)

    async def _ask(self, record: StreamRequest) -> StreamReply:
        """Send what the source has to answer, and wait for that."""
        core, asked = self._core, _Question()
        self._asked, entry = asked, None
        try:
            await core.send(record, self._consumer.producer)
            if self._timeout is not None:
                entry = core.timer.at(current_time() + self._timeout, self._expire_question)
            await asked.answered.wait()
        finally:
            self._asked = None
            if entry is not None:
                core.timer.cancel(entry)
        if asked.reply is None:
            raise asked.failure()
        return asked.reply

    def _expire_question(self) -> None:
        if self._asked is not None:
            error = RPCTimeoutError(
                f"no answer of the stream's source came within {self._timeout} s"
            )
            self._asked.fail(error)
            self.leave()

    def answered(self, reply: StreamReply) -> None:
        """Take the answer of the source."""
        if reply.v.__class__ is dict and REFERENCES in reply.v and len(reply.v) == 1:
            try:
                reply.v = self._taken(reply.v)
            except RPCError as exc:
                self._fail(exc)
                return
        if self._asked is not None:
            self._asked.reply = reply
            self._asked.answered.set()
        elif reply.e is not UNSET or reply.d is True:
            self.finish(StopAsyncIteration())  # nobody waits for it any more

    def doubt(self) -> None:
        """Note that the answer of the source, or what was asked, may be lost."""
        if self._asked is not None and not self._left:
            self._asked.fail(DeliveryError("whether the error reached the source isn't known"))

    def add(self, item: Any) -> None:
        """Take an item that came, unless this side has ended it, and the other isn't told yet."""
        if item.__class__ is dict and REFERENCES in item and len(item) == 1:
            try:
                item = self._taken(item)  # also what nobody reads, so that it is released
            except RPCError as exc:  # more items would be as wrong
                self._fail(exc)
                return
        if self._end is None:
            self._items.append(item)
            if self._wake is not None:
                self._notify()

    def _fail(self, error: RPCError) -> None:
        """End it from this side, because of what came."""
        error = error.with_traceback(None)  # it may wait long, and would keep what others sent
        if self._end is None:
            self.finish(error)
            self._core.abandon(self._consumer)
        elif self._asked is not None:
            self._asked.fail(error)

    def _taken(self, item: dict[str, Any]) -> Any:
        """Return an item with objects in place of references."""
        return self._core.references.take(Packed(item), self._consumer.producer)

    def finish(self, end: Exception) -> None:
        """Note how it ended; what came before is read first."""
        if self._end is None:
            self._end = end
        if self._asked is not None:
            self._asked.fail(end)
        self._tell()
        self._notify()

    def leave(self) -> None:
        """End it from this side. May be called from any thread, by the garbage collector."""
        if self._end is None:
            self._end = StopAsyncIteration()
            self._left = True
            self._items.clear()
            self._core.abandon(self._consumer)
            self._notify()

    def _expire(self) -> None:
        if self._items or self._end is not None:
            return  # an item or the end came in the same turn
        self.give_up(RPCTimeoutError(f"no item of the stream came within {self._timeout} s"))

    def give_up(self, error: Exception) -> None:
        """End it from this side, unless it has ended; who reads on is told why."""
        if self._end is None:
            self.leave()
            self._left = False
            self._end = error
            self._tell()
            self._notify()

    def watch(self, over: StreamOver) -> None:
        """Have it called once the stream has ended, or was left; in the event loop."""
        self._over = over
        if self._end is not None and (not self._left or self._consumer.finished):
            self._tell()

    def left(self) -> None:
        """Note that the other side is told that the stream was left. Called in the event loop."""
        self._items.clear()
        self._tell()

    def _tell(self) -> None:
        over, self._over = self._over, None
        if over is None:
            return
        end = self._end
        if self._left or isinstance(end, StopAsyncIteration):
            over("left" if self._left else "ok", self._consumer.received, None)
            return
        over("failed" if isinstance(end, RemoteError) else "lost", self._consumer.received, end)

    def _notify(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.set()


def end_arguments(core: Core, consumers: Iterable[Consumer], *, failed: bool) -> None:
    """End streams that came with a request: those that were never opened, since it was refused, and
    all of one that failed, as kkrpc does, whoever holds them still.
    """
    for consumer in consumers:
        inflow: Inflow | None = consumer.driver
        if inflow is None:
            core.abandon(consumer)
        elif failed:
            inflow.give_up(DeliveryError("the call that the stream was passed to has failed"))


def _as_data(value: Any) -> Any:
    """Return what is sent for a value that comes back as it is."""
    return pack_result(value, lambda _: None)


def stream_error(error: dict[str, Any] | None) -> Exception:
    """Return the exception for a stream that failed; without ``error``, items came unasked for."""
    if error is None:
        return ProtocolError("items of the stream came without being asked for")
    return error_from_wire(error)
