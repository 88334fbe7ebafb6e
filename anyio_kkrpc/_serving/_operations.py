"""The serving side of a channel: what becomes of a request that the crew runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias

from anyio import EndOfStream, current_time
from msgspec import UNSET

from .._driver._context import (
    CallInfo,
    begin,
    current_call,
    go_on,
    raise_unless_failure,
    run_in_context,
    run_in_thread,
    running,
)
from .._driver._core import Core
from .._driver._inflow import Inflow, RemoteStream
from .._driver._pump import Pump, close_unopened
from .._exceptions import (
    MethodNotFoundError,
    ProtocolError,
    RPCError,
    RPCValidationError,
    TransportClosedError,
    TransportConnectionError,
)
from .._protocol._calls import Handling
from .._protocol._records import Reply, Request
from .._protocol._streams import Consumer
from .._protocol._values import PLAIN
from .._runtime._clock import clock
from .._runtime._log import quoted
from .._values._conversion import UnfitResultError, check_own
from .._wire_errors import handler_error, library_error, send_shortened
from ..abc import Envelope
from ..middleware import Invocation, Middleware, pass_through
from ._crew import Crew, Member
from ._slow import SLOW_HANDLER, SlowHandlers
from ._table import Exposed, Method, Property

logger = logging.getLogger("anyio_kkrpc")

_MAX_NAME = 200
_MAX_SEGMENTS = 32
_REMOTE_REFERENCES = "Remote reference operations require kkrpc/remote-refs"
_ENDS = (EndOfStream, TransportClosedError, TransportConnectionError)

_Member: TypeAlias = Member[Envelope, Envelope]
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


class Server:
    """Serves the requests of one channel.

    :param core: for streams that are results, with the channel's protocol and timer
    :param received: takes what is no request, which comes where the channel no longer listens
    :ivar crew: runs them
    :ivar exposed: what is served
    """

    def __init__(
        self,
        exposed: Exposed,
        max_concurrency: int,
        middleware: tuple[Middleware, ...],
        *,
        core: Core,
        received: Callable[[Envelope], None],
    ) -> None:
        self.exposed: Exposed = exposed
        self._middleware = middleware
        transport = core.transport
        self._peer = core.peer
        self._core = core
        self._abandon = core.abandon
        self._received = received
        self._settle = transport.settle
        self._serve_more = transport.serve_more
        self._broadcast = core.broadcast
        self._now: Callable[[], float] = current_time
        self._slow = SlowHandlers()
        self.expired = 0
        self.served = 0
        self.crew: Crew[Envelope, Envelope] = Crew(
            transport.receive,
            self.answer,
            transport.settle,
            settle_otherwise=self.settle_with_error,
            failed=self.failed,
            label=_label,
            ends=_ENDS,
            limit=max_concurrency,
            at=core.timer.at,
        )

    async def run(self) -> None:
        """Serve until the transport ends or the crew is cancelled."""
        self._now = clock()
        await self.crew.run()

    def lend(self) -> None:
        """Note that a handler waits for a call of its own: another one may run meanwhile.

        Otherwise peers that call each other from inside their handlers could wait for each other.
        """
        self._serve_more(1)
        self.crew.change_limit(1)

    def take_back(self) -> None:
        """Note that the handler goes on."""
        self._serve_more(-1)
        self.crew.change_limit(-1)

    async def settle_with_error(
        self, envelope: Envelope, reply: Envelope | None, exc: Exception
    ) -> None:
        """Settle a request whose reply can't be sent, with an error that can.

        Of a result, that is the handler's error; of an error, its name and the beginning of its
        text arrive.
        """
        if reply is None:
            logger.warning("a request could not be acknowledged: %r", exc)
            return
        record = reply.record
        assert isinstance(record, Reply)
        close_unopened(self._core, record)
        error = handler_error(exc) if record.e is UNSET else record.e

        async def send(error: dict[str, Any]) -> None:
            short = Envelope(Reply(record.id, e=error), None, envelope.sender)
            await self._settle(envelope, short)

        try:
            await send_shortened(error, send)
        except _ENDS:
            raise
        except Exception as reason:
            logger.warning("an error could not be sent to its caller: %s", reason)
            await self._settle(envelope, None)

    def failed(self, envelope: Envelope, exc: BaseException) -> Envelope | None:
        """Return the reply to a request that could not be run to its end."""
        logger.error("%s could not be run to its end", _label(envelope), exc_info=exc)
        request = envelope.record
        if not isinstance(request, Request) or request.o is True:
            return None
        return Envelope(Reply(request.id, e=handler_error(exc)), None, envelope.sender)

    async def answer(self, envelope: Envelope, member: _Member) -> Envelope | None:
        """Run a request; return the reply, or ``None`` if there must be none or it wants none."""
        request = envelope.record
        if not isinstance(request, Request):
            self._received(envelope)
            return None
        try:
            handling, context = self._enter(envelope, request, member)
        except NoReply:
            return None
        finished = False
        try:
            reply = await self._run(envelope, request, handling, context)
            finished = True
        except NoReply:
            return None
        finally:
            if not finished and handling.open:
                self._peer.drop(handling)
            for consumer in handling.consumers or ():
                # Never opened, because the request was refused, or its caller has given up.
                if consumer.handle is None or not finished:
                    self._abandon(consumer)
        self.served += 1
        if request.o is True:
            return None
        return Envelope(reply, None, envelope.sender, deadline=member.deadline)

    def _enter(
        self, envelope: Envelope, request: Request, member: _Member
    ) -> tuple[Handling, Context]:
        """Make what a request needs while it runs."""
        sender = envelope.sender
        if self._peer.was_cancelled(request, sender):
            raise NoReply
        deadline: float | None = None
        if request.d is not UNSET:
            now, sent = self._now(), envelope.sent_at
            if sent is None or sent > now:  # clocks are known with an error
                sent = now
            deadline = sent + request.d / 1000
            if deadline <= now:
                self.expired += 1
                raise NoReply
        try:
            handling = self._peer.handle(request, sender)
        except ProtocolError as exc:
            self._core.refuse(exc)
            raise NoReply from None
        member.deadline = deadline
        member.serves = handling
        handling.handle = member
        info = CallInfo(
            request.id,
            ".".join(request.p[:_MAX_SEGMENTS]),
            sender,
            envelope.attempt,
            deadline,
            {} if request.meta is UNSET else request.meta,
        )
        context = copy_context()
        context.run(running.set, info)
        return handling, context

    async def _run(
        self, envelope: Envelope, request: Request, handling: Handling, context: Context
    ) -> Reply:
        error: dict[str, Any] | None = None
        value: Any = None
        source: Method | Property | None = None
        try:
            if request.op == "call":
                source = method = self.exposed.methods.get(tuple(request.p))
                if method is None:
                    raise self._not_found(request, "is not a function")
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
        except BaseException as exc:
            await raise_unless_failure(exc)
            error = handler_error(exc, traceback=self._core.send_tracebacks)
        if not handling.open:
            raise NoReply
        if error is not None:
            return self._peer.reply_error(handling, error)
        reply = self._peer.reply(handling, value)
        if handling.producer is not None:
            assert source is not None
            pump = Pump(self._core, handling.producer, context, source.item, source.name)
            pump.expect_reader()
        return reply

    # Operations

    async def _construct(self, request: Request, handling: Handling, context: Context) -> Any:
        cls = self.exposed.classes.get(tuple(request.p))
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
        entry = self.exposed.properties.get(tuple(request.p))
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
            handling.handle.waits()
            # A copy, because the context can't be entered twice and the thread may outlive a step.
            return await run_in_thread(context.copy().run, method.function, *checked, **kwargs)
        started = perf_counter()
        if started > self._slow.stale_at:
            self._slow.begin()
        coroutine, value = context.run(begin, function, checked, kwargs)
        if perf_counter() - started > SLOW_HANDLER:
            self._slow.judge(method.name, started)
        if coroutine is not None:
            handling.handle.waits()
            return await go_on(context, coroutine, value)
        if value.__class__ in PLAIN:
            return value
        return await self._result(value, handling, context)

    async def _result(self, value: Any, handling: Handling, context: Context) -> Any:
        """Return a value, awaited if it is awaitable."""
        if not inspect.isawaitable(value):
            return value
        handling.handle.waits()
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
        return Unknown(error, self.exposed.depth_of(request.p))

    def _open_stream(self, value: Any) -> Any:
        if isinstance(value, Consumer):
            return RemoteStream(Inflow(self._core, value, self._core.timeout))
        return value


_OPERATIONS: dict[str, _Operation] = {
    "set": Server._set,
    "new": Server._construct,
    "ref": Server._reference,
}


def _label(envelope: Envelope) -> str:
    request = envelope.record
    if not isinstance(request, Request):
        return f"a {type(request).__name__}"
    return f"{quoted('.'.join(request.p[:_MAX_SEGMENTS]), _MAX_NAME)}()"


def _in_thread(method: Method) -> Callable[..., Any]:
    return partial(run_in_thread, method.function)


def _is_not_found(error: RPCError) -> bool:
    return isinstance(error, MethodNotFoundError)


def own_fields(instance: object) -> Any:
    """Return what a constructed instance is by value: its own public fields."""
    fields = getattr(instance, "__dict__", None)
    if fields is None:
        return instance
    return {name: value for name, value in fields.items() if not name.startswith("_")}
