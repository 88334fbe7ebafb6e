"""The sending end of a stream: runs its source, and closes it whatever happens."""

from __future__ import annotations

import logging
from collections import deque
from contextvars import Context
from typing import Any

from anyio import CancelScope, Event, current_time, get_cancelled_exc_class
from anyio.lowlevel import checkpoint_if_cancelled

from .._exceptions import (
    OverloadedError,
    RPCError,
    RPCTimeoutError,
    TransportClosedError,
    TransportConnectionError,
)
from .._protocol._budget import BUDGET
from .._protocol._records import StreamReply
from .._protocol._state import ProducerState
from .._protocol._streams import Producer
from .._protocol._values import PLAIN, REFERENCES, is_stream, pack_result, stream_envelope
from .._references._marking import USE
from .._runtime._timer import TimerEntry
from .._values._conversion import StreamKind, UnfitResultError, check_own
from .._wire_errors import (
    error_from_wire,
    handler_error,
    is_bare,
    library_error,
    send_shortened,
    unraised,
)
from ..abc import Envelope
from ._context import begin_awaiting, go_on, run_in_context
from ._core import Core
from ._endings import Outcome, StreamOver, close_unopened, is_closing
from ._families import Family

logger = logging.getLogger("anyio_kkrpc")

# How long the source of a stream that ended early may take to close.
CLOSE_TIMEOUT = 5.0
# Seconds that the stream of a reply may wait for its reader before its source is closed.
FIRST_PULL = 60.0
# Errors that may wait until they can be raised in the source; its reader waits for each.
MOST_THROWN = 16
_VALUES = PLAIN | {list, dict, tuple}  # of what is no stream
_NONE: Any = object()
_PAUSED = ProducerState.PAUSED  # found more quickly than in its class


class Pump:
    """Sends the items of a source as the consumer allows; one task does all that touches it.

    A source may hold cancel scopes and task groups around what it yields. They are entered in the
    pump's task, inside the pump's scope, so the source is closed before that is left, and no other
    scope is open around a step of the source. What cancels the pump while the source is at its
    ``yield``, such as the time-out of a ``fail_after`` there, is the source's, and raised in it.
    """

    __slots__ = (
        "_answer",
        "_answering",
        "_bounded",
        "_context",
        "_core",
        "_end",
        "_family",
        "_gone",
        "_halted",
        "_held",
        "_kind",
        "_life",
        "_name",
        "_over",
        "_paused",
        "_producer",
        "_raising",
        "_scope",
        "_started",
        "_stopped",
        "_thrown",
        "_unread",
        "_wake",
    )

    def __init__(
        self,
        core: Core,
        producer: Producer,
        context: Context,
        kind: Any = Any,
        name: str = "an argument",
        over: StreamOver | None = None,
        family: Family | None = None,
    ) -> None:
        self._family = family
        self._kind = kind
        self._name = name
        self._over = over
        self._end: tuple[Outcome, BaseException | None] | None = None
        self._core = core
        self._producer = producer
        self._context = context
        self._wake: Event | None = None
        # Around all of it: in a channel that is cancelled, sources go on until they are stopped.
        self._life = CancelScope(shield=True)
        self._scope = CancelScope()
        # Halted: there is something else to do than to send items.
        self._started = self._stopped = self._halted = False
        self._held: Any = _NONE  # an item that waits for credit
        # What its reader raises in it, and whom that is to be told then.
        self._thrown: deque[tuple[str, dict[str, Any]]] = deque()
        self._answering: str | None = None
        # Whether something is waited for with the source at its yield.
        self._paused = self._raising = False
        # Whether the source is being closed, and has CLOSE_TIMEOUT for it.
        self._bounded = False
        self._answer: StreamReply | None = None
        self._unread: TimerEntry | None = None
        self._gone: Event | None = None
        producer.driver = self

    def expect_reader(self) -> None:
        """Close the source unless somebody reads within `FIRST_PULL` seconds."""
        self._expect_nobody()
        self._unread = self._core.timer.at(current_time() + FIRST_PULL, self._give_up)

    def _expect_nobody(self) -> None:
        if self._unread is not None:
            self._core.timer.cancel(self._unread)
            self._unread = None

    def _give_up(self) -> None:
        if self._family is not None and not self._started:
            now = current_time()
            if patience := self._family.patience(now, FIRST_PULL):
                self._unread = self._core.timer.at(now + patience, self._give_up)
                return
        what = "went on reading" if self._producer.sent else "began to read"
        self._refuse(RPCTimeoutError(f"nobody {what} the stream within {FIRST_PULL:.0f} s"))

    def _refuse(self, error: RPCError) -> None:
        logger.warning("the stream of %s was closed: %s", self._name, error)
        answer = self._core.conversation.end_production(self._producer, library_error(error))
        self.stop(answer, error)

    def wake(self) -> None:
        """Note that there is something to do, such as after credit came."""
        if self._wake is not None:
            self._wake.set()
        self._start()

    def throw(self, answer_id: str, error: dict[str, Any]) -> None:
        """Raise an error in the source once it yields, and answer with what it makes of that.

        The stream of one who sends more than can wait ends.
        """
        if len(self._thrown) >= MOST_THROWN:
            if not self._stopped:
                self._refuse(OverloadedError("too many errors wait to be raised in its source"))
            return
        self._thrown.append((answer_id, error))
        self._halted = True
        self.wake()

    def stop(self, answer: StreamReply | None, error: Exception | None = None) -> None:
        """Close the source, then send ``answer`` if there is one.

        :param error: why, if it isn't that the reader has left
        """
        if self._end is None:
            left = error is None and answer is not None
            self._end = ("left" if left else "lost", error)
        self._answer = answer
        self._stopped = self._halted = True
        if self._raising:
            self._bound(self._scope)
        elif self._wake is not None:
            self._wake.set()
        elif not (self._paused or self._bounded):
            self._scope.cancel()
        if answer is None:
            self._life.shield = False
        self._start()

    async def over(self) -> None:
        """Wait until the source is closed and its end was sent."""
        if self._gone is None:
            self._gone = Event()
        await self._gone.wait()

    def _start(self) -> None:
        self._expect_nobody()
        if not self._started:
            self._started = True
            if self._family is not None:
                self._family.begin()
            self._core.start(self._run, "stream")

    async def _run(self) -> None:
        """Send items until the source ends or the consumer leaves; close the source in any case."""
        core, producer = self._core, self._producer
        try:
            with self._life:
                error = await self._run_source()
                if self._answer is not None:
                    answer = self._answer
                    if error is not None and answer.d is True:
                        answer = StreamReply(id=answer.id, sid=answer.sid, e=error)
                    await core.send(answer, producer.consumer)
                elif producer.open and not self._stopped:
                    await self._send_end(error)
                for answer_id, thrown in self._thrown:  # they came when it had ended
                    core.post(StreamReply(answer_id, producer.id, e=thrown), producer.consumer)
        except RPCError as exc:
            logger.warning("the end of the stream of %s was not sent: %s", self._name, exc)
        finally:
            core.conversation.forget(producer)
            self._expect_nobody()
            if self._family is not None:
                self._family.end(current_time())
            if self._gone is not None:
                self._gone.set()
            if self._over is not None:
                outcome, reason = self._end or ("lost", None)
                self._over(outcome, producer.sent, reason)

    async def _send_end(self, error: dict[str, Any] | None) -> None:
        core, consumer = self._core, self._producer.consumer
        end = core.conversation.end_production(self._producer, error)
        end.id = self._answering or end.id
        try:
            await core.send(end, consumer)
        except Exception as exc:
            if error is None or isinstance(exc, (TransportClosedError, TransportConnectionError)):
                raise
            logger.warning("the error of a stream can't be sent as it is: %s", exc)

            async def send(shorter: dict[str, Any]) -> None:
                end.e = shorter
                await core.send(end, consumer)

            await send_shortened(error, send)

    async def _run_source(self) -> dict[str, Any] | None:
        """Run the source and close it; return its error, whatever it raised."""
        iterator: Any = self._producer.source
        error: dict[str, Any] | None = None
        failure: BaseException | None = None
        closed: BaseException | bool = False
        with self._scope:
            try:
                iterator = type(iterator).__aiter__(iterator)
                error = await self._serve(iterator)
            except BaseException as exc:
                failure = exc
            # In its scopes; if this one was cancelled, what that takes is cut short.
            closed = await self._close_source(iterator, self._scope)
        if closed is False and not self._bounded:
            with CancelScope() as scope:
                closed = await self._close_source(iterator, scope)
        if failure is None:
            self._end = self._end or ("ok", None)
            if error is None and isinstance(closed, BaseException):
                error = handler_error(closed, traceback=self._core.send_tracebacks)
            return error
        if isinstance(failure, KeyboardInterrupt):
            raise failure
        await checkpoint_if_cancelled()
        if self._stopped and isinstance(failure, get_cancelled_exc_class()):
            return None
        # Nobody has cancelled this task: whatever it is, the source raised it.
        self._end = self._end or ("failed", failure)
        return handler_error(failure, traceback=self._core.send_tracebacks)

    async def _serve(self, iterator: Any) -> dict[str, Any] | None:
        """Do what the reader wants until the source ends; return its error if it has one."""
        while True:
            error = await self._send_items(iterator)
            self._halted = self._stopped
            while error is _NONE and self._thrown and not self._stopped:
                error = await self._raise(iterator, *self._thrown.popleft())
            if self._stopped or error is not _NONE:
                return None if error is _NONE else error

    async def _raise(self, iterator: Any, answer_id: str, error: dict[str, Any]) -> Any:
        """Raise an error of the reader in the source, and answer with the item that comes of it.

        :return: as `_send_items`
        """
        producer, throw = self._producer, getattr(iterator, "athrow", None)
        self._answering = answer_id
        raised = error_from_wire(error)
        if throw is None:
            self._end = ("failed", raised)
            return unraised(error)
        try:
            item = await run_in_context(self._context, throw(raised))
            if self._kind is not Any:
                item = check_own(item, self._kind, self._name)
        except StopAsyncIteration:
            return None
        except UnfitResultError as exc:
            self._end = ("failed", exc)
            return library_error(exc)
        except RPCError as exc:
            if exc is not raised:
                raise
            self._end = ("failed", exc)
            return error
        self._answering = None
        if self._stopped:
            return _NONE
        record = StreamReply(answer_id, producer.id, d=False, v=self._packed(item))
        try:
            await self._core.send_envelope(Envelope(record, None, producer.consumer))
        except Exception:
            close_unopened(self._core, record, producer.consumer)
            raise
        if is_bare(error):
            self.expect_reader()  # kkrpc's reader has ended with that, and doesn't say so
        return _NONE

    async def _send_items(self, iterator: Any) -> Any:
        """Send them.

        :return: the error if one doesn't fit the annotation of its handler, ``None`` if there are
            no more, `_NONE` if there is something else to do
        """
        producer, context, send = self._producer, self._context, self._core.send_envelope
        step = type(iterator).__anext__
        item, self._held = self._held, _NONE
        try:
            while not self._halted:
                if producer.state is _PAUSED:
                    raised = await self._wait_for_credit(iterator)
                    item = raised if item is _NONE else item
                    continue
                if item is _NONE:
                    coroutine, item = context.run(begin_awaiting, step(iterator))
                    if coroutine is not None:
                        item = await go_on(context, coroutine, item)
                        if producer.paused:
                            continue  # another worker is to have it
                if self._kind is not Any:
                    item = check_own(item, self._kind, self._name)
                if item.__class__ in _VALUES or not is_stream(item):
                    if USE.begun or (item.__class__ is dict and REFERENCES in item):
                        item = self._packed(item)
                    record = producer.item(item)
                else:
                    record = producer.item(self._packed(item), BUDGET)
                envelope = Envelope(record, None, producer.consumer)
                item = _NONE
                self._paused = True
                try:
                    await send(envelope)
                except get_cancelled_exc_class() as exc:  # it is on its way all the same
                    item = await self._raise_in_source(iterator, exc)
                except Exception:
                    close_unopened(self._core, record, producer.consumer)
                    raise
                finally:
                    self._paused = False
        except StopAsyncIteration:
            return None
        except UnfitResultError as exc:
            self._end = ("failed", exc)
            return library_error(exc)
        self._held = item
        return _NONE

    def _packed(self, item: Any) -> Any:
        """Return what stands for an item: for a stream, which begins, or for references."""
        if self._stopped:
            return item  # its source has gone on all the same; it isn't sent
        if USE.begun:
            item = self._core.references.give(item, self._producer.consumer)
        if item.__class__ in _VALUES or not is_stream(item):
            return pack_result(item, lambda value: None)
        if self._family is None:
            self._family = Family()
        self._family.add()
        kind = self._kind.item if isinstance(self._kind, StreamKind) else Any
        inner = self._core.conversation.produce(item, self._producer.consumer)
        pump = Pump(self._core, inner, self._context.copy(), kind, self._name, family=self._family)
        pump.expect_reader()
        return stream_envelope(inner.id)

    async def _wait_for_credit(self, iterator: Any) -> Any:
        """Wait until the consumer wants more, or leaves; return what `_raise_in_source` does."""
        self._wake = Event()
        self._paused = True
        try:
            await self._wake.wait()
        except get_cancelled_exc_class() as exc:
            return await self._raise_in_source(iterator, exc)
        finally:
            self._paused = False
            self._wake = None
        return _NONE

    async def _raise_in_source(self, iterator: Any, exc: BaseException) -> Any:
        """Raise a cancellation at the source's yield; return its next item if it goes on."""
        throw = getattr(iterator, "athrow", None)
        if throw is None:
            raise exc
        # If it is everybody who is cancelled, the source may still clean up: `stop` bounds that.
        self._raising = self._scope.shield = True
        if self._stopped:
            self._bound(self._scope)
        try:
            item = await run_in_context(self._context, throw(exc))
        finally:
            self._raising = False
        if not self._bounded:
            self._scope.shield = False
        await checkpoint_if_cancelled()
        return item

    async def _close_source(self, iterator: Any, scope: CancelScope) -> BaseException | bool:
        """Close it within the present scope; return false if that was cut short, or its error."""
        close = getattr(iterator, "aclose", None)
        if close is None:
            return True
        if not scope.cancel_called:
            self._bound(scope)
        try:
            await run_in_context(self._context, close())
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            if scope.cancel_called and isinstance(exc, get_cancelled_exc_class()):
                if self._bounded:
                    logger.warning("the source of a stream took over %s s to close", CLOSE_TIMEOUT)
                return False
            await checkpoint_if_cancelled()
            if not is_closing(exc):
                logger.exception("closing the source of a stream failed")
                return exc
        return True

    def _bound(self, scope: CancelScope) -> None:
        """Let the source finish, though others be cancelled, within its time."""
        self._bounded = True
        scope.shield, scope.deadline = True, current_time() + CLOSE_TIMEOUT
