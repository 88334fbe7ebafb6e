"""Functions around calls, where they are made and where they are served: logs, checks, retries.

A middleware is ``async def middleware(call, call_next)``. It returns the result of the call, which
``await call_next(call)`` gives, or raises. It may change what `Invocation` holds before that, and
call more than once or not at all. The first of those that are given to `anyio_kkrpc.RPCChannel` is
the outermost.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Literal, Protocol, TypeAlias

import anyio
from msgspec import Struct, field

from ._exceptions import (
    OverloadedError,
    RPCError,
    RPCTimeoutError,
    TransportConnectionError,
)
from ._runtime._log import quoted

__all__ = (
    "CallNext",
    "Invocation",
    "Middleware",
    "StreamEnd",
    "access_log",
    "is_stream",
    "limit_concurrency",
    "retry",
)

_REFUSED_UNRUN: tuple[type[Exception], ...] = (OverloadedError,)


class StreamEnd(Struct, frozen=True):
    """How a stream has ended that was the result of a call.

    :ivar outcome: ``"ok"`` if it came to its end, ``"left"`` if its reader left before,
        ``"failed"`` if its source raised, ``"lost"`` if the other side is gone, or nothing came
        in time
    :ivar items: how many were sent, or came
    :ivar error: why it failed or was lost, if that is known
    """

    outcome: Literal["ok", "left", "failed", "lost"]
    items: int
    error: BaseException | None = None


StreamWatcher: TypeAlias = Callable[[StreamEnd], object]


class Invocation(Struct, kw_only=True):
    """One call as a middleware sees it.

    :ivar side: ``"client"`` before it is sent, ``"server"`` before the handler runs
    :ivar operation: ``"call"``; ``"get"`` and ``"set"`` of a property; ``"new"`` for a constructor;
        ``"broadcast"`` for the sending of a question to all, whose result is ``None``
    :ivar method: dotted name of what is called; at the serving side its own name there, also where
        the caller used an alias of ``expose(naming="camel")``
    :ivar args: positional arguments; of ``"set"`` the value. At the serving side they have been
        converted to the annotations.
    :ivar kwargs: arguments by name
    :ivar metadata: travels with the request; what a client's middleware puts in is sent
    :ivar peer: id of the peer that calls, or of the one that is addressed; ``None`` if there is one
        only, or any may answer
    :ivar deadline: when the caller gives up, on AnyIO's clock, or ``None``. At the client it is for
        all that the middleware does, and may be brought forward for what `CallNext` does.
    :ivar attempt: how often the request has been delivered, this time included; 1 at the client
    :ivar idempotent: whether the caller said (by `anyio_kkrpc.with_call_options`) that it does no
        harm to make the call again; at the client only
    :ivar shard_key: the ``shard_key`` or ``key`` that the caller gave, if any; at the client only
    :ivar refused: why the call isn't made, at the serving side: its arguments don't fit, there is
        no such name, or it came out of time. `CallNext` raises it, and its arguments aren't shown.
    :ivar known: whether there is such a name, at the serving side; if not, a peer made it up, and
        it shouldn't be kept
    :ivar stream_ended: functions to be called when the stream that `CallNext` has returned has
        ended; a middleware that finds one by `is_stream` appends its own
    """

    side: Literal["client", "server"]
    operation: str
    method: str
    args: list[Any]
    kwargs: dict[str, Any]
    metadata: dict[str, Any]
    peer: str | None = None
    deadline: float | None = None
    attempt: int = 1
    idempotent: bool = False
    shard_key: str | None = None
    refused: RPCError | None = None
    known: bool = True
    stream_ended: list[StreamWatcher] = field(default_factory=list)


class CallNext(Protocol):
    """Goes on with a call: the next middleware, and in the end the call itself."""

    def __call__(self, call: Invocation, /) -> Awaitable[Any]:
        """Return the result, once awaited."""
        ...


class Middleware(Protocol):
    """A function around calls; an ``async def`` with these two parameters."""

    def __call__(self, call: Invocation, call_next: CallNext, /) -> Awaitable[Any]:
        """Return the result, once awaited."""
        ...


def check_middleware(middleware: Sequence[Middleware]) -> tuple[Middleware, ...]:
    """Return it as a tuple.

    :raises TypeError: if it isn't a sequence of callables
    """
    if isinstance(middleware, (str, bytes)) or not isinstance(middleware, Sequence):
        raise TypeError(f"middleware: needs a list of functions, not {middleware!r:.80}")
    for one in middleware:
        if not callable(one):
            raise TypeError(f"middleware: needs functions, not {one!r:.80}")
    return tuple(middleware)


async def pass_through(middleware: tuple[Middleware, ...], call: Invocation, last: CallNext) -> Any:
    """Run a call through all of it."""
    if not middleware:
        return await last(call)
    first, rest = middleware[0], middleware[1:]

    async def call_next(call: Invocation) -> Any:
        return await pass_through(rest, call, last)

    return await first(call, call_next)


def is_stream(result: object) -> bool:
    """Whether the result of a call is a stream, which ends later: see `Invocation`."""
    return hasattr(type(result), "__aiter__")


def retry(
    attempts: int = 3,
    *,
    initial: float = 0.1,
    maximum: float = 5.0,
    attempt_timeout: float | None = None,
    on: tuple[type[Exception], ...] = (RPCTimeoutError, TransportConnectionError),
) -> Middleware:
    """Return a client's middleware that makes calls again, after growing pauses with jitter.

    Calls that were refused before they ran (`OverloadedError`) are made again in any case, others
    only if they are marked: ``with_call_options(api, idempotent=True)``. All attempts and pauses
    together take no longer than the call's timeout: where there is no time for another one, the
    error of the last one is raised. A call with an iterator among its arguments is made once: what
    has been read of it is gone.

    :param attempts: how often a call is made at most, at least 1
    :param initial: longest pause after the first failure, in seconds; doubled after each
    :param maximum: longest pause of all, in seconds
    :param attempt_timeout: seconds after which an attempt is given up with `RPCTimeoutError`, whose
        text says so; as long as there is time, if not given, and then no other one follows
    :param on: errors after which an idempotent call is made again
    :raises ValueError: if a number is out of range
    """
    _check_retry(attempts, initial, maximum, attempt_timeout)

    async def middleware(call: Invocation, call_next: CallNext) -> Any:
        again: tuple[type[Exception], ...] = _REFUSED_UNRUN
        if call.idempotent:
            again += on
        if any(hasattr(type(value), "__anext__") for value in (*call.args, *call.kwargs.values())):
            return await call_next(call)
        end = call.deadline
        attempt = partial(_attempt, call, call_next, end, attempt_timeout, attempts)
        try:
            for made in range(1, attempts):
                try:
                    return await attempt(made)
                except again:
                    pause = random.uniform(0, min(initial * 2 ** (made - 1), maximum))
                    if end is not None and anyio.current_time() + pause >= end:
                        raise
                # Outside of the except block, which would keep the error while this waits.
                await anyio.sleep(pause)
            return await attempt(attempts)
        finally:
            call.deadline = end

    return middleware


def _check_retry(
    attempts: int, initial: float, maximum: float, attempt_timeout: float | None
) -> None:
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ValueError(f"attempts: must be an int of at least 1, not {attempts!r}")
    for name, seconds in (("initial", initial), ("maximum", maximum)):
        if not 0 <= seconds < 1e7:
            raise ValueError(f"{name}: must be a number of seconds, not {seconds!r}")
    if attempt_timeout is not None and not 0 < attempt_timeout < 1e7:
        raise ValueError(f"attempt_timeout: must be above 0 seconds, not {attempt_timeout!r}")


async def _attempt(
    call: Invocation,
    call_next: CallNext,
    end: float | None,
    seconds: float | None,
    attempts: int,
    number: int,
) -> Any:
    """Make one of so many attempts, within what all of them have; its time-out says whose it was.

    :param end: when the time of all of them is over
    :param seconds: what this one has of it, ``None`` for all that is left
    """
    call.deadline = end
    if seconds is not None:
        own_end = anyio.current_time() + seconds
        call.deadline = own_end if end is None else min(own_end, end)
    try:
        return await call_next(call)
    except RPCTimeoutError as exc:
        is_own = call.deadline != end
        if type(exc) is RPCTimeoutError and (is_own or number > 1):
            whose = "its attempt_timeout" if is_own else "the timeout of all together"
            exc.args = (f"{exc} (attempt {number} of {attempts}: {whose})",)
        raise


def limit_concurrency(limit: int, methods: Collection[str] | None = None) -> Middleware:
    """Return a middleware that lets so many calls of each method run at once; others wait.

    :param limit: at least 1
    :param methods: dotted names of the methods it is about; all, each with a limit of its own, if
        not given
    :raises ValueError: if ``limit`` is out of range
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit: must be an int of at least 1, not {limit!r}")
    if isinstance(methods, str):
        raise TypeError("methods: needs a list of names, not a str")
    chosen = None if methods is None else frozenset(methods)
    limiters: dict[str, anyio.Semaphore] = {}

    async def middleware(call: Invocation, call_next: CallNext) -> Any:
        method = call.method
        if call.refused is not None or (chosen is not None and method not in chosen):
            return await call_next(call)
        limiter = limiters.get(method)
        if limiter is None:
            limiter = limiters[method] = anyio.Semaphore(limit)
        has_turn = False
        end = math.inf if call.deadline is None else call.deadline
        with anyio.CancelScope(deadline=end):
            await limiter.acquire()
            has_turn = True
        if not has_turn:
            raise RPCTimeoutError(f"{method}: no answer in time: {limit} calls of it were running")
        try:
            return await call_next(call)
        finally:
            limiter.release()

    return middleware


def access_log(logger: logging.Logger | None = None, level: int = logging.INFO) -> Middleware:
    """Return a middleware that logs each call when it ends: side, method, peer, outcome, time.

    One whose result is a stream ends with that, and has the number of its items. Arguments and
    results are not logged.

    :param logger: ``anyio_kkrpc.access`` if not given
    """
    log = logging.getLogger("anyio_kkrpc.access") if logger is None else logger

    def note(call: Invocation, started: float, outcome: str, items: int | None = None) -> None:
        log.log(
            level,
            "%s %s %s peer=%s attempt=%d %s %.1f ms%s",
            call.side,
            call.operation,
            quoted(call.method),
            quoted(call.peer),
            call.attempt,
            quoted(outcome),
            (perf_counter() - started) * 1000,
            "" if items is None else f" items={items}",
        )

    async def middleware(call: Invocation, call_next: CallNext) -> Any:
        started, outcome = perf_counter(), "cancelled"

        def ended(end: StreamEnd) -> None:
            what = end.outcome if end.error is None else type(end.error).__name__
            note(call, started, what, end.items)

        try:
            result = await call_next(call)
            outcome = "ok"
        except Exception as exc:
            outcome = type(exc).__name__
            raise
        finally:
            if outcome != "ok":
                note(call, started, outcome)
        if is_stream(result):
            call.stream_ended.append(ended)
        else:
            note(call, started, outcome)
        return result

    return middleware
