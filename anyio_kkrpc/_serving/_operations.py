"""The serving side of a channel: what becomes of a request that the crew runs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeAlias

from anyio import current_time
from anyio.lowlevel import checkpoint
from msgspec import UNSET

from .._driver._context import (
    CallInfo,
    raise_unless_failure,
    run_in_context,
    running,
)
from .._driver._core import Core
from .._driver._endings import Outcome, close_unopened, tell
from .._driver._inflow import end_arguments
from .._driver._pump import Pump
from .._exceptions import (
    MethodNotFoundError,
    ProtocolError,
    RPCError,
    RPCTimeoutError,
)
from .._protocol._calls import Handling
from .._protocol._records import Reply, Request
from .._protocol._state import HandlingState
from .._protocol._streams import Producer
from .._protocol._values import PLAIN
from .._references._marking import USE
from .._runtime._clock import clock
from .._values._conversion import UnfitResultError, check_own
from .._wire_errors import library_error
from ..abc import Envelope
from ..middleware import Middleware, StreamEnd
from ._crew import Answer, Crew, Member
from ._intercepting import NOT_SENT, Interceptor, watchers_in
from ._invoking import OPERATIONS, Invoker, failing
from ._keyed import keep_stream, with_key
from ._outcomes import FailureLog
from ._refusals import (
    MAX_SEGMENTS,
    Expired,
    NoReply,
    Refused,
    Unknown,
    find,
    name_of,
)
from ._settling import ENDS, Settling, label
from ._table import Exposed, Method, Property

# Of what is no stream, and need not be awaited.
_AT_ONCE = PLAIN | {list, dict}
_Member: TypeAlias = Member[Envelope, Envelope]


class Server:
    """Serves the requests of one channel.

    :param core: for streams that are results, with the channel's protocol and timer
    :param received: takes what is no request, which comes where the channel no longer listens
    :ivar crew: runs them
    :ivar settling: settles those whose reply can't be sent
    :ivar exposed: what is served, with what became of the requests for each name
    :ivar unknown: requests for names that aren't there
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
        self._interceptor = Interceptor(middleware) if middleware else None
        transport = core.transport
        self._conversation = core.conversation
        self._cancelled = core.conversation.cancelled
        self._core = core
        self._received = received
        self._settle = transport.settle
        self._serve_more = transport.serve_more
        self._broadcast = core.broadcast
        self._now: Callable[[], float] = current_time
        self._invoker = Invoker(core, self._interceptor)
        self._failures = FailureLog()
        self.settling = Settling(core, self._entry, self._note_failure)
        self.unknown = 0
        self.crew: Crew[Envelope, Envelope] = Crew(
            transport.receive,
            self.answer,
            transport.settle,
            settle_otherwise=self.settling.settle_with_error,
            failed=self.settling.failed,
            label=label,
            ends=ENDS,
            limit=max_concurrency,
            timer=core.timer,
        )

    def serve(self, entered: Exposed) -> None:
        """Serve this from now on: what was exposed, once it is entered."""
        self.exposed = entered

    async def run(self) -> None:
        """Serve until the transport ends or the crew is cancelled."""
        self._now = clock()
        await self.crew.run()

    def _entry(self, request: Request) -> Method | Property | None:
        return self.exposed.entry(request.op, request.p)

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

    def _note_failure(
        self, source: Method | Property, request: Request, sender: str | None, exc: BaseException
    ) -> None:
        source.failed += 1
        self._failures.note(source.name, request.id, sender, exc)

    def answer(self, envelope: Envelope, member: _Member) -> Answer[Envelope]:
        """Run a request.

        A call that doesn't have to wait for anything, as most, needs no coroutine but its own.

        :return: the reply, or ``None`` if there must be none or it wants none; and what is to be
            awaited for it, if there is anything
        """
        request = envelope.record
        if not isinstance(request, Request):
            self._received(envelope)
            return None, None
        try:
            handling, context = self._enter(envelope, request, member)
        except Expired:
            return None, self._show_expired(envelope, request, member)
        except NoReply:
            return None, None
        method = self.exposed.methods.get(tuple(request.p)) if request.op == "call" else None
        if method is None or method.in_thread or self._interceptor is not None:
            return None, self._answer(envelope, request, handling, context, member)
        try:
            coroutine, value = self._invoker.begin(method, request, handling, context)
            if coroutine is None and value.__class__ in _AT_ONCE and handling.consumers is None:
                kind = method.result
                if kind is not Any and (value.__class__ is not kind or kind not in PLAIN):
                    value = check_own(value, kind, method.name)
                if handling.state is not HandlingState.DONE:
                    if value is None and method.void:
                        value = UNSET
                    elif USE.begun:
                        value = self._core.references.give(value, handling.sender)
                    reply = self._conversation.reply(handling, value)
                    method.served += 1
                    if request.o is True:
                        if USE.begun:
                            self._core.references.not_sent(value, handling.sender)
                        return None, None
                    return Envelope(reply, None, envelope.sender, deadline=member.deadline), None
            begun = self._invoker.go_on(handling, context, coroutine, value)
        except BaseException as exc:
            begun = failing(exc)
        answer = self._answer(envelope, request, handling, context, member, begun)
        del begun  # an exception knows this frame: arguments would be kept by both
        return None, answer

    async def _answer(
        self,
        envelope: Envelope,
        request: Request,
        handling: Handling,
        context: Context,
        member: _Member,
        begun: Coroutine[Any, Any, Any] | None = None,
    ) -> Envelope | None:
        """Run a request, or the rest of it; return the reply as `answer` does.

        :param begun: gives the result of a call that was begun
        """
        succeeded = False
        try:
            reply = await self._run(envelope, request, handling, context, begun)
            succeeded = reply.e is UNSET
        except NoReply:
            return None
        except BaseException:
            source = self.exposed.entry(request.op, request.p)
            if source is not None:
                source.cancelled += 1
            raise
        finally:
            if handling.open:
                self._conversation.drop(handling)
            if handling.consumers is not None:
                end_arguments(self._core, handling.consumers, failed=not succeeded)
        if request.o is True:
            close_unopened(self._core, reply, envelope.sender)
            return None
        return Envelope(reply, None, envelope.sender, deadline=member.deadline)

    def _enter(
        self, envelope: Envelope, request: Request, member: _Member, *, late: bool = False
    ) -> tuple[Handling, Context]:
        """Make what a request needs while it runs.

        :param late: whether it is known to be out of time
        """
        sender = envelope.sender
        if self._cancelled and self._conversation.was_cancelled(request, sender):
            self._count(request, "cancelled")
            raise NoReply
        deadline: float | None = None
        if request.d is not UNSET:
            now, sent = self._now(), envelope.sent_at
            if sent is None or sent > now:  # clocks are known with an error
                sent = now
            deadline = sent + request.d / 1000
            if deadline <= now and not late:
                if not self._count(request, "expired"):
                    if not self._answers_all(envelope):
                        raise NoReply
                    self.unknown += 1
                raise NoReply if self._interceptor is None else Expired
        try:
            handling = self._conversation.begin(request, sender, member)
        except ProtocolError as exc:
            if envelope.attempt == 1:  # else its caller took it for lost, and it runs still
                self._core.refuse(exc)
            raise NoReply from None
        member.deadline = None if late else deadline
        member.serves = handling
        path = request.p
        info = CallInfo(
            request.id,
            path[0] if len(path) == 1 else ".".join(path[:MAX_SEGMENTS]),
            sender,
            envelope.attempt,
            deadline,
            {} if request.meta is UNSET else request.meta,
        )
        if envelope.key is not None:
            info = with_key(info, envelope, self._core.transport.keyed)
        context = copy_context()
        context.run(running.set, info)
        return handling, context

    async def _run(
        self,
        envelope: Envelope,
        request: Request,
        handling: Handling,
        context: Context,
        begun: Coroutine[Any, Any, Any] | None,
    ) -> Reply:
        error: dict[str, Any] | None = None
        value: Any = None
        kind: Any = Any
        source: Method | Property | None = None
        try:
            source = find(self.exposed, request)
            kind = source.result if request.op in ("call", "get") else Any
            if begun is None:
                operation = OPERATIONS[request.op]
                begun = operation(self._invoker, source, request, handling, context)
            value = await begun
            # With middleware it has been checked already, where the middleware could see that.
            if kind is not Any and self._interceptor is None:
                value = check_own(value, kind, source.name)
            if envelope.key is not None:
                value = await keep_stream(self._core, value, envelope, source, handling, context)
            if USE.begun:
                value = self._core.references.give(value, handling.sender)
        except Refused as exc:
            error, value = await self._refuse(exc, source, envelope, request, handling, context)
            if source is not None:
                source.refused += 1  # not before: who has given up meanwhile is counted as that
            source = None
        except BaseException as exc:
            error = await self._fail(exc, source, request, handling.sender)
        if not handling.open:
            outcome = value if error is None else error
            await self._give_up(source if error is None else None, outcome, handling, context)
            raise NoReply
        if error is not None:
            return self._conversation.reply_error(handling, error)
        if value is None and source is not None and source.void:
            value = UNSET
        reply = self._conversation.reply(handling, value)
        if handling.producer is not None:
            self._begin_stream(handling.producer, source, request, handling.sender, context)
        elif source is not None:
            source.served += 1
        return reply

    async def _give_up(
        self, source: Method | Property | None, value: Any, handling: Handling, context: Context
    ) -> None:
        """Note that nobody waits for what a request came to."""
        if self.crew.over:
            # Its caller waits: it was the channel that ended, and whose group gets it back.
            await checkpoint()  # the crew is cancelled
        if source is not None:
            source.cancelled += 1
        if USE.begun:
            self._core.references.not_sent(value, handling.sender)
        tell(watchers_in(context), NOT_SENT)

    def _begin_stream(
        self,
        producer: Producer,
        source: Method | Property | None,
        request: Request,
        sender: str | None,
        context: Context,
    ) -> None:
        """Send a result that is a stream; it is counted when it has ended."""
        item, name = (Any, name_of(request)) if source is None else (source.item, source.name)
        watchers = watchers_in(context)

        def over(outcome: Outcome, items: int, error: BaseException | None) -> None:
            if source is not None:
                if outcome == "failed" and error is not None:
                    self._note_failure(source, request, sender, error)
                elif outcome == "lost":
                    source.cancelled += 1
                else:
                    source.served += 1
            tell(watchers, StreamEnd(outcome, items, error))

        Pump(self._core, producer, context, item, name, over).expect_reader()

    async def _fail(
        self,
        exc: BaseException,
        source: Method | Property | None,
        request: Request,
        sender: str | None,
    ) -> dict[str, Any]:
        """Count and log what was raised for a request; return what travels. Raises it if it is the
        request that was cancelled.
        """
        await raise_unless_failure(exc)
        if source is not None:
            self._note_failure(source, request, sender, exc)
        if isinstance(exc, UnfitResultError):
            return library_error(exc)
        error: dict[str, Any] = self._core.references.error(exc, sender)
        return error

    async def _refuse(
        self,
        refused: Refused,
        source: Method | Property | None,
        envelope: Envelope,
        request: Request,
        handling: Handling,
        context: Context,
    ) -> tuple[dict[str, Any] | None, Any]:
        """Count a request that isn't run; return its error, or what a middleware makes of it."""
        if isinstance(refused.error, MethodNotFoundError) and not self._answers_all(envelope):
            raise NoReply
        if source is None and request.op != "ref":
            self.unknown += 1
        error = library_error(refused.error)
        if self._interceptor is not None:
            try:
                return None, await self._show(refused.error, source, request, handling, context)
            except BaseException as exc:
                other = exc is not refused.error
                if other:
                    error = await self._fail(exc, None, request, handling.sender)
                    if source is not None:
                        self._failures.note(source.name, request.id, handling.sender, exc)
            if other:
                return error, None
        if isinstance(refused, Unknown):
            error["at"] = refused.at
        return error, None

    async def _show(
        self,
        error: RPCError,
        source: Method | Property | None,
        request: Request,
        handling: Handling,
        context: Context,
    ) -> Any:
        """Let the middleware see that a request isn't run."""
        assert self._interceptor is not None
        handling.driver.waits()
        name = name_of(request) if source is None else source.name
        known = source is not None
        seen = self._interceptor.refuse(error, request.op, name, known=known)
        return await run_in_context(context, seen)

    async def _show_expired(
        self, envelope: Envelope, request: Request, member: _Member
    ) -> Envelope | None:
        """Let the middleware see a request that came out of time; there is no reply."""
        try:
            handling, context = self._enter(envelope, request, member, late=True)
        except NoReply:
            return None
        error = RPCTimeoutError(f"{name_of(request)} was out of time before it was started")
        source = self.exposed.entry(request.op, request.p)
        try:
            await self._show(error, source, request, handling, context)
        except BaseException as exc:
            await raise_unless_failure(exc)
            if exc is not error and source is not None:
                self._failures.note(source.name, request.id, envelope.sender, exc)
        finally:
            if handling.open:
                self._conversation.drop(handling)
        return None

    def _answers_all(self, envelope: Envelope) -> bool:
        """Whether names that aren't there are for this peer to refuse: others may have them."""
        return not self._broadcast or envelope.recipient is not None

    def _count(self, request: Request, what: str) -> bool:
        """Count a request that isn't run; return whether its name is there."""
        source = self.exposed.entry(request.op, request.p)
        if source is not None:
            setattr(source, what, getattr(source, what) + 1)
        return source is not None
