"""Functions as arguments whose results are wanted: who asks, and who answers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

from anyio import CancelScope, current_time
from anyio.lowlevel import checkpoint_if_cancelled
from msgspec import UNSET

from .._exceptions import (
    RPCError,
    RPCTimeoutError,
    TransportClosedError,
    TransportConnectionError,
)
from .._protocol._calls import Call, Handling
from .._protocol._records import CallbackCall, Cancel, Reply, Request
from .._protocol._state import CallInput, CallState
from .._protocol._values import Packed
from .._references._marking import USE
from .._wire_errors import error_from_wire, handler_error, library_error, send_shortened
from ._context import earlier, raise_unless_failure, running
from ._core import Core
from ._endings import close_unopened
from ._inflow import RemoteStream
from ._pump import Pump

logger = logging.getLogger("anyio_kkrpc")

# Invocations of one function that may run at a time, if their results are wanted.
MAX_RUNNING = 100


async def ask(
    core: Core,
    function_id: str,
    args: Iterable[Any],
    kwargs: dict[str, Any],
    owner: str | None,
    name: str,
    *,
    request_id: str | None = None,
    path: list[str] | None = None,
    undefined: bool = False,
) -> Any:
    """Call a function of another peer, and return its result.

    It has the time that a call has, and no more than the handler that asks.

    :param request_id: see `Callbacks.call`
    :param path: what is done to a reference, if ``function_id`` is of one
    :param undefined: whether JavaScript's undefined comes as ``UNSET``
    :raises RemoteError: what the function raised
    :raises DeliveryError: if its owner is gone, or has it no more
    :raises RPCTimeoutError: if no answer came in time
    :raises TransportClosedError: if the channel ends
    """
    if core.reason is not None:
        raise core.closed_error()
    call_of = core.conversation.callback_call
    passed = core.references.passing(owner, args, kwargs) if USE.begun else None
    if passed is None:
        record = call_of(function_id, args, kwargs, request_id, path)
        call = await _ask(core, record, owner, name)
        return _result(call, undefined=undefined)
    try:
        record = call_of(function_id, passed.args, passed.kwargs, request_id, path)
        call = await _ask(core, record, owner, name, passed)
        return _result(call, undefined=undefined)
    finally:
        passed.end()


def _result(call: Call, *, undefined: bool) -> Any:
    if undefined and call.undefined:
        return UNSET
    return call.result if call.stream is None else RemoteStream(call.stream.driver)


async def _ask(
    core: Core, record: CallbackCall, owner: str | None, name: str, passed: Any = None
) -> Call:
    serving = running.get()
    deadline, budget = None if core.timeout is None else core.now() + core.timeout, None
    deadline = earlier(deadline, serving)
    if deadline is not None:
        budget = max(int((deadline - core.now()) * 1000), 1)
    table = core.conversation.functions
    call = table.ask(record, owner, budget)
    if passed is not None:
        call.passes(passed)
    answered = call.driver = core.one_shot()
    timer = None if deadline is None else core.timer.at(deadline, partial(_expire, core, call))
    lender = None if serving is None else core.lender
    if lender is not None:
        lender.lend()
    try:
        await core.send(record, owner)
        await answered.wait()
    except BaseException as exc:
        _give_up(core, call, was_sent=not isinstance(exc, (TypeError, RPCError)))
        raise
    finally:
        table.end_ask(call)
        if lender is not None:
            lender.take_back()
        if timer is not None:
            core.timer.cancel(timer)
    if call.state is CallState.ANSWERED:
        return call
    if call.state is CallState.FAILED and call.error is not None:
        raise error_from_wire(call.error)
    if call.state is CallState.EXPIRED:
        raise RPCTimeoutError(f"{name}: no answer of the function came in time")
    raise core.closed_error(call.lost)


def _expire(core: Core, call: Call) -> None:
    core.conversation.finish_call(call, CallInput.TIMEOUT)
    core.post(Cancel(call.id), call.recipient)
    call.driver.set()


def _give_up(core: Core, call: Call, *, was_sent: bool) -> None:
    if call.state is CallState.WAITING:
        core.conversation.finish_call(call, CallInput.CANCEL)
        if was_sent:
            core.post(Cancel(call.id), call.recipient)
    elif call.stream is not None:
        call.stream.driver.leave()


class RefusedError(Exception):
    """What was asked for isn't done.

    :ivar error: why
    :ivar at: index of the first name of the path that isn't there, if that is why
    """

    def __init__(self, error: RPCError, at: int | None = None) -> None:
        super().__init__(error)
        self.error: RPCError = error
        self.at: int | None = at


class Answering:
    """Runs an invocation whose result is wanted, and replies; its caller may cancel it.

    :param reply_id: id of the reply
    :param sender: who gets it
    :param budget: milliseconds that it has
    :raises ProtocolError: if it runs already
    """

    __slots__ = ("_core", "_handling", "_scope", "_sender")

    def __init__(self, core: Core, reply_id: str, sender: str | None, budget: float | None) -> None:
        self._core = core
        self._sender = sender
        self._scope = CancelScope()
        if budget is not None:
            self._scope.deadline = current_time() + budget / 1000
        request = Request(reply_id, "call", [])
        self._handling = handling = core.conversation.begin(request, sender)
        handling.driver = self

    def cancel(self, handling: Handling) -> None:
        """Cancel it, whether it runs yet or not."""
        self._scope.cancel()

    def refuse(self, error: RPCError) -> None:
        """Reply that it doesn't run, or not to its end, unless it has been replied to."""
        if self._handling.open:
            told = library_error(error)
            reply = self._core.conversation.reply_error(self._handling, told)
            self._core.owe(reply, self._sender)

    async def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> None:
        """Run it, and send what becomes of it; what can't be sent is logged."""
        core, handling = self._core, self._handling
        try:
            with self._scope:
                await checkpoint_if_cancelled()
                reply = await self._reply(function, args, kwargs)
                if reply is not None:
                    await self._send(reply)
        except (TransportClosedError, TransportConnectionError) as exc:
            logger.info("the result of a callback was not sent: %s", exc)
        except Exception:
            logger.exception("the result of a callback could not be sent")
        finally:
            if handling.open:
                core.conversation.drop(handling)

    async def _reply(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Any
    ) -> Reply | None:
        conversation, handling = self._core.conversation, self._handling
        refer = self._core.references
        try:
            if Packed in map(type, (*args, *kwargs.values())):
                args, kwargs = self._taken(args, kwargs)
            result = function(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            if not handling.open:
                return None
            if USE.begun:
                result = refer.give(result, self._sender)
        except RefusedError as exc:
            error = library_error(exc.error)
            if exc.at is not None:
                error["at"] = exc.at
        except BaseException as exc:
            await raise_unless_failure(exc)
            error = refer.error(exc, self._sender)
        else:
            reply = conversation.reply(handling, result)
            if handling.producer is not None:
                Pump(self._core, handling.producer, copy_context()).expect_reader()
            return reply
        if not handling.open:
            refer.not_sent(error, self._sender)
            return None
        return conversation.reply_error(handling, error)

    def _taken(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return arguments with objects in place of references."""

        def one(value: Any) -> Any:
            return take(value, self._sender) if value.__class__ is Packed else value

        take = self._core.references.take
        try:
            return [one(value) for value in args], {key: one(v) for key, v in kwargs.items()}
        except RPCError as exc:
            raise RefusedError(exc) from None

    async def _send(self, reply: Reply) -> None:
        core, sender = self._core, self._sender
        try:
            await core.send(reply, sender)
        except (TransportClosedError, TransportConnectionError):
            raise
        except Exception as exc:  # whatever it can't be sent for is told in its place
            close_unopened(core, reply, sender)
            error = reply.e if isinstance(reply.e, dict) else handler_error(exc)

            async def send(shorter: dict[str, Any]) -> None:
                await core.send(Reply(reply.id, e=shorter), sender)

            await send_shortened(error, send)
