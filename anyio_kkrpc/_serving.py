"""The serving side of a channel: requests are taken, run, and settled.

A set of standing tasks takes requests from the transport, so that a request costs no task and no
cancel scope of its own. One of them at a time, the leader, receives. It runs one handler after the
other, until one of them waits for something: then another task becomes the leader. So a handler
that doesn't wait costs no switch of tasks either.

Each task runs in a scope; a request that is cancelled or out of time cancels the scope of the task
that runs it, and that task then goes on in a new one.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import anyio
from anyio import (
    CancelScope,
    EndOfStream,
    Event,
    current_effective_deadline,
    get_cancelled_exc_class,
    move_on_after,
    to_thread,
)
from anyio.abc import TaskGroup
from msgspec import UNSET

from ._context import CallInfo, _current, begin, current_call, go_on, run_in_context
from ._conversion import UnfitResultError, check_own
from ._errors_wire import handler_error, library_error, send_shortened
from ._exceptions import (
    MethodNotFoundError,
    ProtocolError,
    RPCError,
    RPCValidationError,
    TransportClosedError,
    TransportConnectionError,
)
from ._exposure import Exposed, Method, Property
from ._loop import OneShot, one_shots
from ._protocol._calls import Handling
from ._protocol._records import Reply, Request
from ._protocol._streams import Consumer
from ._protocol._values import PLAIN
from ._pump import Pump, close_unopened
from ._slow import SLOW_HANDLER, SlowHandlers
from ._streaming import Inflow, RemoteStream
from ._timer import TimerEntry
from .abc import Envelope
from .middleware import Invocation, Middleware, pass_through

if TYPE_CHECKING:
    from ._channel import RPCChannel

logger = logging.getLogger("anyio_kkrpc")

# Idle tasks that are kept for the next burst.
_MAX_IDLE = 64
_MAX_NAME = 200
_MAX_SEGMENTS = 32
_REMOTE_REFERENCES = "Remote reference operations require kkrpc/remote-refs"
_ENDS = (EndOfStream, TransportClosedError, TransportConnectionError)


_Operation = Callable[["Server", Request, Handling, Context], Awaitable[Any]]


class NoReply(Exception):
    """The request isn't answered: it is out of time, or another peer of a broadcast may know it."""


class Refused(Exception):
    """The library itself, not a handler, refuses the request with ``error``."""

    def __init__(self, error: RPCError) -> None:
        self.error = error


class Unknown(Refused):
    """The table has no such name; ``at`` is the index of the first segment that it lacks."""

    def __init__(self, error: MethodNotFoundError, at: int) -> None:
        super().__init__(error)
        self.at = at


class _Worker:
    """A standing task, and what belongs to the request that it serves.

    :ivar deadline: when the request is out of time, on AnyIO's clock, or ``None``
    """

    __slots__ = ("_leads", "_scope", "_server", "deadline", "timer")

    def __init__(self, server: Server) -> None:
        self._server = server
        self._leads = True
        self._scope = CancelScope()
        self.deadline: float | None = None
        self.timer: TimerEntry | None = None

    def suspends(self) -> None:
        """Note that the handler waits for something: from now on it can be out of time."""
        if self.deadline is not None:
            self.timer = self._server._channel._timer.at(self.deadline, self.cancel)
        self._step_down()

    def cancel(self) -> None:
        """Cancel the handler."""
        self._scope.cancel()

    def _step_down(self) -> None:
        if self._leads:
            self._leads = self._server._led = False
            self._server.lead_on()

    async def run(self) -> None:
        """Serve requests until this task isn't needed any more."""
        server = self._server
        try:
            while True:
                running: list[Envelope] = []
                with self._scope:
                    await self._serve(running)
                    return
                # The request was cancelled or ran out of time: nobody waits for a reply.
                self._scope = CancelScope()
                for envelope in running:
                    await server._transport.settle(envelope, None)
                server.note_finished()
        except _ENDS:
            server.note_end()
        finally:
            server._tasks -= 1

    async def _serve(self, running: list[Envelope]) -> None:
        server = self._server
        receive, settle = server._transport.receive, server._transport.settle
        while True:
            if not self._leads:
                if server._led:
                    if not await server.follow():
                        return
                elif server._tasks > server.limit:
                    return
                self._leads = server._led = True
            envelope = await receive()
            running.append(envelope)
            try:
                reply = await server.answer(envelope, self)
            except NoReply:
                reply = None
            else:
                server.served += 1
            running.clear()
            if reply is None:
                await settle(envelope, None)
            else:
                try:
                    await settle(envelope, Envelope(reply, None, envelope.sender))
                except _ENDS:
                    raise
                except Exception as exc:
                    await server.settle_with_error(envelope, reply, exc)
            if server._finished is not None:
                server.note_finished()


class Server:
    """Serves the requests of one channel."""

    def __init__(
        self,
        channel: RPCChannel,
        exposed: Exposed,
        max_concurrency: int,
        middleware: tuple[Middleware, ...],
    ) -> None:
        self._channel = channel
        self._middleware = middleware
        self._exposed = exposed
        self._peer = channel._peer
        self._outlet = channel._outlet
        self._transport = channel._transport
        self._broadcast = channel._transport.capabilities.broadcast
        self.limit = max_concurrency
        self._tasks = 0
        # Whether a task receives, or is about to.
        self._led = False
        self._ended = False
        self._followers: deque[OneShot] = deque()
        self._one_shot: Callable[[], OneShot]
        self._group: TaskGroup | None = None
        self._finished: Event | None = None
        self._slow = SlowHandlers()
        self.expired = 0
        self.served = 0

    async def run(self) -> None:
        """Serve until the transport ends or the scope is cancelled."""
        self._one_shot = one_shots()
        async with anyio.create_task_group() as self._group:
            self.lead_on()

    def lead_on(self) -> None:
        """Let a task receive, if none does and one may."""
        if self._led or self._ended or self._group is None:
            return
        if self._followers:
            self._led = True
            self._followers.popleft().set()
        elif self._tasks < self.limit:
            self._led = True
            self._tasks += 1
            worker = _Worker(self)
            self._group.start_soon(worker.run, name="anyio_kkrpc handler")

    def lend(self) -> None:
        """Note that a handler waits for a call of its own: another one may run meanwhile.

        Otherwise peers that call each other from inside their handlers could wait for each other.
        """
        self.limit += 1
        self._transport.serve_more(1)
        self.lead_on()

    def take_back(self) -> None:
        """Note that the handler goes on."""
        self.limit -= 1
        self._transport.serve_more(-1)

    async def drain(self, grace: float) -> None:
        """Take no more requests, and wait at most ``grace`` seconds for those that run."""
        self._transport.listen(self._channel, serve=0)
        with move_on_after(grace, shield=True):
            while self._peer.handlings and self._channel._reason is None:
                self._finished = Event()
                await self._finished.wait()

    def cancel(self) -> None:
        """Cancel all handlers and stop serving."""
        if self._group is not None:
            self._group.cancel_scope.cancel()

    async def follow(self) -> bool:
        """Wait to become the leader; return false if there are enough tasks without this one."""
        if self._tasks > self.limit or len(self._followers) >= _MAX_IDLE:
            return False
        turn = self._one_shot()
        self._followers.append(turn)
        try:
            await turn.wait()
        except BaseException:
            with suppress(ValueError):  # its turn can have come after it was cancelled
                self._followers.remove(turn)
            raise  # all of them are cancelled, so nobody is to lead instead
        return True

    def note_end(self) -> None:
        """Note that nothing more will be received."""
        self._ended = True
        while self._followers:
            self._followers.popleft().set()

    def note_finished(self) -> None:
        """Note that a request is done."""
        if self._finished is not None:
            self._finished.set()

    async def settle_with_error(self, envelope: Envelope, reply: Reply, exc: Exception) -> None:
        """Settle a request whose reply can't be sent, with an error that can.

        Of a result, that is the handler's error; of an error, its name and the beginning of its
        text arrive.
        """
        close_unopened(self._outlet, reply)
        error = handler_error(exc) if reply.e is UNSET else reply.e

        async def send(error: dict[str, Any]) -> None:
            short = Envelope(Reply(reply.id, e=error), None, envelope.sender)
            await self._transport.settle(envelope, short)

        try:
            await send_shortened(error, send)
        except _ENDS:
            raise
        except Exception as reason:
            logger.warning("an error could not be sent to its caller: %s", reason)
            await self._transport.settle(envelope, None)

    async def answer(self, envelope: Envelope, worker: _Worker) -> Reply | None:
        """Run a request; return the reply, or ``None`` if it wants none.

        :raises NoReply: if there must be none
        """
        request = envelope.record
        assert isinstance(request, Request)
        handling, context = self._enter(envelope, request, worker)
        finished = False
        try:
            reply = await self._run(envelope, request, handling, context)
            finished = True
        except BaseException:
            if handling.open:
                self._peer.drop(handling)
            raise
        finally:
            if worker.timer is not None:
                worker.timer.cancel()
                worker.timer = None
            for consumer in handling.consumers or ():
                # Never opened, because the request was refused, or its caller has given up.
                if consumer.handle is None or not finished:
                    self._channel._abandon_stream(consumer)
        return None if request.o is True else reply

    def _enter(
        self, envelope: Envelope, request: Request, worker: _Worker
    ) -> tuple[Handling, Context]:
        """Make what a request needs while it runs."""
        sender = envelope.sender
        if self._peer.was_cancelled(request, sender):
            raise NoReply
        deadline: float | None = None
        if request.d is not UNSET:
            now, sent = self._channel._now(), envelope.sent_at
            if sent is None or sent > now:  # clocks are known with an error
                sent = now
            deadline = sent + request.d / 1000
            if deadline <= now:
                self.expired += 1
                raise NoReply
        try:
            handling = self._peer.handle(request, sender)
        except ProtocolError as exc:
            self._channel._refuse(exc)
            raise NoReply from None
        worker.deadline = deadline
        handling.handle = worker
        info = CallInfo(
            request.id,
            ".".join(request.p[:_MAX_SEGMENTS]),
            sender,
            envelope.attempt,
            deadline,
            {} if request.meta is UNSET else request.meta,
        )
        context = copy_context()
        context.run(_current.set, info)
        return handling, context

    async def _run(
        self, envelope: Envelope, request: Request, handling: Handling, context: Context
    ) -> Reply:
        error: dict[str, Any] | None = None
        value: Any = None
        source: Method | Property | None = None
        try:
            if request.op == "call":
                source = method = self._method(request)
                value = await self._invoke(method, request, handling, context)
            elif request.op == "get":
                source = self._property(request)
                value = await self._get(source, request, handling, context)
            else:
                value = await _OPERATIONS[request.op](self, request, handling, context)
            # With middleware it has been checked already, where the middleware could see that.
            if source is not None and source.result is not Any and not self._middleware:
                value = check_own(value, source.result, source.name)
        except UnfitResultError as exc:
            error = library_error(exc)
        except Refused as exc:
            if self._broadcast and envelope.recipient is None and _is_not_found(exc.error):
                raise NoReply from None
            error = library_error(exc.error)
            if isinstance(exc, Unknown):
                error["at"] = exc.at
        except get_cancelled_exc_class() as exc:
            # One that the handler itself raised is an error like others.
            if current_effective_deadline() == float("-inf"):
                raise
            error = self._wire_error(exc)
        except (Exception, SystemExit) as exc:
            error = self._wire_error(exc)
        if not handling.open:
            raise NoReply
        if error is not None:
            return self._peer.reply_error(handling, error)
        reply = self._peer.reply(handling, value)
        if handling.producer is not None:
            assert source is not None
            pump = Pump(self._outlet, handling.producer, context, source.item, source.name)
            pump.expect_reader()
        return reply

    def _wire_error(self, exc: BaseException) -> dict[str, Any]:
        return handler_error(exc, traceback=self._outlet.send_tracebacks)

    # Operations

    def _method(self, request: Request) -> Method:
        method = self._exposed.methods.get(tuple(request.p))
        if method is None:
            raise self._not_found(request, "is not a function")
        return method

    async def _construct(self, request: Request, handling: Handling, context: Context) -> Any:
        cls = self._exposed.classes.get(tuple(request.p))
        if cls is None:
            raise self._not_found(request, "is not a constructor")
        return own_fields(await self._invoke(cls, request, handling, context))

    async def _get(
        self, entry: Property, request: Request, handling: Handling, context: Context
    ) -> Any:
        get = self._wrapped(entry.get, request, entry)
        return await self._result(context.run(get), handling, context)

    async def _set(self, request: Request, handling: Handling, context: Context) -> Any:
        entry = self._property(request)
        if not entry.writable:
            raise Refused(MethodNotFoundError(f"{entry.name} is not writable"))
        try:
            value = entry.convert(self._peer.unpack_value(request, handling))
        except (ProtocolError, RPCValidationError) as exc:
            raise Refused(exc) from None
        result = context.run(self._wrapped(entry.set, request, entry), value)
        await self._result(result, handling, context)
        return True

    async def _reference(self, request: Request, handling: Handling, context: Context) -> Any:
        raise Refused(ProtocolError(_REMOTE_REFERENCES))

    def _property(self, request: Request) -> Property:
        entry = self._exposed.properties.get(tuple(request.p))
        if entry is None:
            raise self._not_found(request, "is not a property")
        return entry

    async def _invoke(
        self, method: Method, request: Request, handling: Handling, context: Context
    ) -> Any:
        try:
            args, kwargs = self._peer.unpack(request, handling)
            if handling.consumers:
                args = [self._open_stream(value) for value in args]
                kwargs = {name: self._open_stream(value) for name, value in kwargs.items()}
            checked, kwargs = method.arguments.convert(args, kwargs)
        except (ProtocolError, RPCValidationError) as exc:
            raise Refused(exc) from None
        function = method.function
        if self._middleware:
            function = _in_thread(method) if method.in_thread else function
            function = self._wrapped(function, request, method)
        elif method.in_thread:
            # A copy, because the context can't be entered twice and the thread may outlive a step.
            handling.handle.suspends()
            return await to_thread.run_sync(
                lambda: context.copy().run(method.function, *checked, **kwargs)
            )
        started = perf_counter()
        if started > self._slow.stale_at:
            self._slow.begin()
        coroutine, value = context.run(begin, function, checked, kwargs)
        if perf_counter() - started > SLOW_HANDLER:
            self._slow.judge(method.name, started)
        if coroutine is not None:
            handling.handle.suspends()
            return await go_on(context, coroutine, value)
        if value.__class__ in PLAIN:
            return value
        return await self._result(value, handling, context)

    async def _result(self, value: Any, handling: Handling, context: Context) -> Any:
        """Return a value, awaited if it is awaitable."""
        if not inspect.isawaitable(value):
            return value
        handling.handle.suspends()
        return await run_in_context(context, value)

    def _wrapped(
        self, function: Callable[..., Any], request: Request, source: Method | Property
    ) -> Callable[..., Any]:
        """Return what calls a function through the middleware, in the request's context.

        The middleware sees the name of what is called, whatever alias the caller has used.
        """
        middleware, operation = self._middleware, request.op
        if not middleware:
            return function

        kind = Any if operation == "set" else source.result

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            checked: Any = UNSET

            async def last(call: Invocation) -> Any:
                nonlocal checked
                result = function(*call.args, **call.kwargs)
                if inspect.isawaitable(result):
                    result = await result
                checked = check_own(result, kind, source.name)
                return checked

            info = current_call()
            call = Invocation(
                side="server",
                operation=operation,
                method=source.name,
                args=list(args),
                kwargs=kwargs,
                metadata=info.metadata,
                peer=info.sender,
                deadline=info.deadline,
                attempt=info.attempt,
            )
            result = await pass_through(middleware, call, last)
            # What a middleware has made of it goes out, too.
            return result if result is checked else check_own(result, kind, source.name)

        return wrapped

    def _not_found(self, request: Request, what: str) -> Unknown:
        name = ".".join(request.p[:_MAX_SEGMENTS])
        more = " ..." if len(request.p) > _MAX_SEGMENTS or len(name) > _MAX_NAME else ""
        error = MethodNotFoundError(f"{name[:_MAX_NAME]}{more} {what}")
        return Unknown(error, self._exposed.depth_of(request.p))

    def _open_stream(self, value: Any) -> Any:
        if isinstance(value, Consumer):
            return RemoteStream(Inflow(self._channel, value, self._channel._timeout))
        return value


_OPERATIONS: dict[str, _Operation] = {
    "set": Server._set,
    "new": Server._construct,
    "ref": Server._reference,
}


def _in_thread(method: Method) -> Callable[..., Any]:
    return lambda *args, **kwargs: to_thread.run_sync(partial(method.function, *args, **kwargs))


def _is_not_found(error: RPCError) -> bool:
    return isinstance(error, MethodNotFoundError)


def own_fields(instance: object) -> Any:
    """Return what a constructed instance is by value: its own public fields."""
    fields = getattr(instance, "__dict__", None)
    if fields is None:
        return instance
    return {name: value for name, value in fields.items() if not name.startswith("_")}
