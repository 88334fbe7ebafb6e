"""Calls of this side: made, waited for, expired, given up."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from contextvars import copy_context
from functools import partial
from typing import Any

from anyio import current_time, move_on_after
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from .._driver._context import CallInfo, earlier, running
from .._driver._core import Core
from .._driver._endings import close_streams, tell
from .._driver._inflow import RemoteStream, watch
from .._driver._pump import Pump
from .._driver._references import PassedArguments
from .._exceptions import OverloadedError, RPCError, RPCTimeoutError
from .._protocol._calls import Call
from .._protocol._conversation import Operation
from .._protocol._records import Cancel, Reply
from .._protocol._state import CallInput, CallState
from .._references._marking import USE
from .._wire_errors import error_from_wire
from ..abc import Envelope, KeyedCalls
from ..middleware import Invocation, Middleware, StreamEnd, StreamWatcher, pass_through
from ._access import KeyAccess, KeyGuard
from ._explaining import LOOK, Explainer
from ._keyed import (
    KeyOptions,
    call_within,
    is_kept_stream,
    kept_stream,
    keyed_calls,
    keyed_request,
    value_of,
    wait_within,
)
from ._options import CallOptions

_OPTIONS = CallOptions()
_ANSWERED = CallState.ANSWERED


class Calls:
    """Makes the calls of one channel.

    :param fail_fast: whether calls that nobody serves fail at once, unless they say otherwise
    :param key_guard: decides who may use which key
    :ivar access: asks that
    :ivar middleware: what each call goes through; see `intercept`
    """

    __slots__ = (
        "_cancels",
        "_checker",
        "_core",
        "_explainer",
        "_fail_fast",
        "access",
        "middleware",
    )

    def __init__(
        self,
        core: Core,
        middleware: tuple[Middleware, ...],
        *,
        fail_fast: bool = False,
        key_guard: KeyGuard | None = None,
    ) -> None:
        self._core = core
        self._explainer = Explainer(core, self._expire, self.give_up_on)
        self._checker = Explainer(core, self._expire, self.give_up_on, within=5.0)
        self._fail_fast = fail_fast
        self._cancels = core.transport.capabilities.cancellation
        self.access: KeyAccess = KeyAccess(core, key_guard)
        self.middleware: tuple[Middleware, ...] = middleware

    def ask(
        self, op: Operation, path: list[str], options: CallOptions, **what: Any
    ) -> Coroutine[Any, Any, Any]:
        """Make a request, through the middleware if there is any."""
        return (self.intercept if self.middleware else self.request)(op, path, options, **what)

    async def intercept(
        self,
        op: Operation,
        path: list[str],
        options: CallOptions = _OPTIONS,
        *,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        value: Any = UNSET,
        convert: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Make a request through the middleware.

        :param convert: makes of the result what the middleware is to see
        """
        call = Invocation(
            side="client",
            operation=op,
            method=".".join(path),
            args=list(args) if value is UNSET else [value],
            kwargs=dict(kwargs or {}),
            metadata=dict(options.metadata or {}),
            peer=options.to,
            idempotent=options.idempotent,
            shard_key=options.shard_key if options.keyed is None else options.keyed.key,
            deadline=self._deadline(options),
        )
        given = call.deadline
        opened: list[tuple[RemoteStream[Any], list[StreamWatcher]]] = []

        async def last(call: Invocation) -> Any:
            watchers: list[StreamWatcher] = []
            call.stream_ended = watchers
            changed = self._bounded(options, call, given)
            if op == "set":
                return await self.request(op, path, changed, value=call.args[0])
            if op == "get":
                result = await self.request(op, path, changed)
            else:
                result = await self.request(op, path, changed, args=call.args, kwargs=call.kwargs)
            if isinstance(result, RemoteStream):
                opened.append((result, watchers))
            return result if convert is None else convert(result)

        try:
            return await pass_through(self.middleware, call, last)
        finally:  # now they have said what they want to be told, also if it has ended already
            for stream, told in opened:
                watch(stream, lambda *end, told=told: tell(told, StreamEnd(*end)))

    async def request(
        self,
        op: Operation,
        path: list[str],
        options: CallOptions = _OPTIONS,
        args: Iterable[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        value: Any = UNSET,
    ) -> Any:
        """Make a request; return its result, or ``None`` at once if no reply is wanted."""
        core = self._core
        if not core.is_open:
            raise core.closed_error()
        if USE.begun and (passed := self._passed(options, args, kwargs, value)) is not None:
            return await self._pass(passed, op, path, options)
        timeout = core.timeout if options.timeout is UNSET else options.timeout
        if options.keyed is not None:
            return await self._keyed(op, path, options, options.keyed, timeout, args, kwargs)
        serving = running.get()
        call, envelope, at = self._make(op, path, options, args, kwargs, value, timeout, serving)
        if not options.reply:
            return await self._send_only(envelope, path, timeout)
        answered = call.driver = core.one_shot()
        deadline, timer = envelope.deadline, None
        if deadline is not None:
            timer = core.timer.at(at, partial(self._explainer.suspect, call, deadline))
        lender = None if serving is None else core.lender
        if lender is not None:
            lender.lend()
        try:
            await core.send_envelope(envelope)
            if self.fails_fast(options):
                self._checker.check(call)
            await answered.wait()
        except BaseException as exc:
            self._give_up(call, not isinstance(exc, (TypeError, RPCError)))
            raise
        finally:
            if lender is not None:
                lender.take_back()
            if timer is not None:
                core.timer.cancel(timer)
        if call.state is not _ANSWERED:
            raise self._error(call, path, timeout, deadline)
        if call.callbacks:
            await self._wait_for_callbacks(call, deadline)
        if call.undefined and options.undefined:
            return UNSET
        return call.result if call.stream is None else RemoteStream(call.stream.driver)

    def fails_fast(self, options: CallOptions) -> bool:
        """Whether a call fails at once if nobody serves it."""
        return bool(options.fail_fast or (self._fail_fast and options.fail_fast is UNSET))

    def _passed(
        self,
        options: CallOptions,
        args: Iterable[Any] | None,
        kwargs: dict[str, Any] | None,
        value: Any,
    ) -> PassedArguments | None:
        """Return what a call passes by reference, unless that is known already."""
        if options.passed is not None or options.keyed is not None:
            return None
        made: PassedArguments | None = self._core.references.passing(
            options.to, args, kwargs, value, lasts=options.reply
        )
        return made

    async def _pass(
        self, passed: PassedArguments, op: Operation, path: list[str], options: CallOptions
    ) -> Any:
        """Make a request that passes something by reference; one that passes an object back is for
        the peer that has that.
        """
        try:
            return await self.request(
                op,
                path,
                replace(options, to=passed.to, passed=passed),
                args=passed.args,
                kwargs=passed.kwargs,
                value=passed.value,
            )
        finally:
            passed.end()

    def check_keyed(self, to: str | None) -> KeyedCalls:
        """Return what keeps calls.

        :param to: whom they are for
        :raises ValueError: if they can't have a key
        """
        return keyed_calls(self._core, to)

    async def _keyed(
        self,
        op: Operation,
        path: list[str],
        options: CallOptions,
        key_options: KeyOptions,
        timeout: float | None,
        args: Iterable[Any] | None,
        kwargs: dict[str, Any] | None,
    ) -> Any:
        """Make a call that has a key, and wait for what it comes to, if that is wanted."""
        keeps = keyed_calls(self._core, options.to)
        new = self._core.conversation.new_id()
        call = keyed_request(key_options, new, op, path, args, kwargs, options.metadata)
        late = partial(_timed_out, path, timeout)
        leaving, fail_fast = key_options.cancel_when_left, self.fails_fast(options)
        if not options.reply or self.access.guarded or fail_fast:

            async def make() -> Reply | None:
                await self.access.check_call(
                    keeps, call, attaches=options.reply, cancels=leaving, fail_fast=fail_fast
                )
                if options.reply:
                    return await keeps.call(call, cancel_when_left=leaving)
                await keeps.start(call)
                return None

            reply = await wait_within(self._core, timeout, late, make(), options.deadline)
        else:
            what = (self._core, keeps, call, timeout, late, options.deadline)
            reply = await call_within(*what, cancel_when_left=leaving)
        if reply is not None and is_kept_stream(reply):
            raise kept_stream(path)
        return None if reply is None else value_of(reply)

    def _make(
        self,
        op: Operation,
        path: list[str],
        options: CallOptions,
        args: Iterable[Any] | None,
        kwargs: dict[str, Any] | None,
        value: Any,
        timeout: float | None,
        serving: CallInfo | None,
    ) -> tuple[Call, Envelope, float]:
        """Enter a call; return it, what is to be sent, and when to ask why it has no answer.

        :param serving: the call whose handler makes this one, which has no more time than its
            caller
        :raises RPCTimeoutError: if there is none left
        """
        core = self._core
        now = core.now()
        deadline = options.deadline or (None if timeout is None else now + timeout)
        if serving is not None and serving.deadline is not None:
            deadline = serving.deadline if deadline is None else min(deadline, serving.deadline)
        budget: int | UnsetType = UNSET
        look_at = now
        if deadline is not None:
            left = deadline - now
            if left <= 0:
                raise _timed_out(path, timeout, deadline)
            budget = max(int(left * 1000), 1)
            look_at = deadline - LOOK if left > 2 * LOOK else now + left / 2
        to, metadata, one_way = options.to, options.metadata, not options.reply
        call, request = core.conversation.call(
            op, path, to, args, kwargs, value, budget, metadata, one_way
        )
        if options.passed is not None:
            call.passes(options.passed)
        for producer in call.producers or ():
            Pump(core, producer, copy_context())
        envelope = call.sent = Envelope(request, None, to, deadline=deadline)
        if options.shard_key is not None:
            envelope.route = options.shard_key
        return call, envelope, look_at

    async def _send_only(self, envelope: Envelope, path: list[str], timeout: float | None) -> None:
        """Send a request that nobody answers, within its time."""
        deadline = envelope.deadline
        with move_on_after(None if deadline is None else deadline - current_time()) as scope:
            await self._core.send_envelope(envelope)
        if scope.cancelled_caught:
            raise envelope.error or _timed_out(path, timeout, deadline)

    def _bounded(self, options: CallOptions, call: Invocation, given: float | None) -> CallOptions:
        """Return the options with what the middleware leaves of the call's time.

        :param given: the end of that time before the middleware; then a time-out names all of it
        """
        deadline, timeout = call.deadline, options.timeout
        if deadline is None:
            timeout = None
        elif deadline != given and (left := round(deadline - self._core.now(), 3)) > 0:
            timeout = int(left) if left.is_integer() else left
        return replace(options, metadata=call.metadata or None, timeout=timeout, deadline=deadline)

    def _deadline(self, options: CallOptions) -> float | None:
        """Return when a call is out of time, all that its middleware does included."""
        timeout = self._core.timeout if options.timeout is UNSET else options.timeout
        deadline: float | None = None if timeout is None else self._core.now() + timeout
        return earlier(deadline, running.get())

    def _error(
        self, call: Call, path: list[str], timeout: float | None, deadline: float | None
    ) -> Exception:
        if call.state is CallState.FAILED:
            assert call.error is not None
            return error_from_wire(call.error)
        if call.state is CallState.EXPIRED:
            return _timed_out(path, timeout, deadline, call.overdue)
        return self._core.closed_error(call.lost)

    def _expire(self, call: Call, reason: str | None) -> None:
        self.finish(call, CallInput.TIMEOUT)
        call.overdue = reason
        self.cancel(call)
        call.driver.set()

    def give_up_on(self, call: Call, error: Exception) -> None:
        """End a call that would wait in vain, and tell who may run it."""
        self.lose(call, error)
        self.cancel(call)

    def _give_up(self, call: Call, was_sent: bool) -> None:
        """The caller stopped waiting, or sending failed."""
        if call.state is CallState.WAITING:
            self.finish(call, CallInput.CANCEL)
            if was_sent:
                self.cancel(call)
        elif call.stream is not None:
            call.stream.driver.leave()

    def finish(self, call: Call, step: CallInput) -> None:
        """End a call that has no answer."""
        close_streams(self._core, self._core.conversation.finish_call(call, step))

    def cancel(self, call: Call) -> None:
        """Tell who runs it that nobody waits for it."""
        if self._cancels:
            sent = call.sent
            how = (None, None) if sent is None else (sent.token, sent.route)
            self._core.post(Cancel(call.id), call.recipient, *how)

    def lose(self, call: Call, error: Exception) -> None:
        """End a call whose request could not be delivered."""
        self.finish(call, CallInput.LOSE)
        call.lost = error
        call.driver.set()

    async def _wait_for_callbacks(self, call: Call, deadline: float | None) -> None:
        """Let the invocations that came before the reply finish before the caller goes on.

        :raises OverloadedError: if some of them were dropped
        """
        with move_on_after(None if deadline is None else deadline - current_time()):
            for export in call.callbacks or ():
                if export.driver is not None:
                    await export.driver.idle()
        if call.dropped:
            if call.stream is not None:
                call.stream.driver.leave()
            raise dropped_callbacks(call)


def dropped_callbacks(call: Call) -> OverloadedError:
    """Return the error of a call that has a result, but some of its callbacks didn't run."""
    return OverloadedError(
        f"{call.dropped} invocations of a callback were dropped: they came faster than it ran"
    )


def _timed_out(
    path: list[str],
    timeout: float | None,
    deadline: float | None,
    reason: str | None = None,
) -> RPCTimeoutError:
    serving = running.get()
    of_caller = serving is not None and serving.deadline == deadline
    within = "its caller's deadline" if of_caller or timeout is None else f"{timeout} s"
    because = "" if reason is None else f": {reason}"
    error = RPCTimeoutError(f"{'.'.join(path)}: no answer within {within}{because}")
    error.reason = reason
    return error
