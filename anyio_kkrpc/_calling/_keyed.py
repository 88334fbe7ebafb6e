"""Calls with a key: their options, what tells two of them apart, and how one is asked for.

Such a call is none of the conversation's: it goes on when its caller leaves, and what it comes to
is kept by the transport, which is asked for it.
"""

from __future__ import annotations

from binascii import b2a_base64
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from math import inf
from typing import Any, TypeVar

import msgspec
from anyio import CancelScope
from msgspec import UNSET, Struct

from .._driver._context import CallInfo, earlier, running
from .._driver._core import Core
from .._exceptions import RPCTimeoutError
from .._protocol._conversation import Operation
from .._protocol._records import Reply, Request
from .._protocol._values import is_callback, is_stream, pack_argument, unpack_result
from .._references._marking import USE, has_references
from .._values._pydantic import plain
from .._wire_errors import error_from_wire
from ..abc import DEFAULT_BOUNDS, ItemBounds, KeyedCalls, KeyedRequest

__all__ = ("KeyOptions", "check_key", "key_options", "keyed_calls", "keyed_request", "value_of")

T = TypeVar("T")

# Bytes of a key.
MAX_KEY = 512
# Seconds: an hour; a hundred years; and a moment.
_KEEP = 3600.0
_LONGEST = 3_155_760_000.0
_SHORTEST = 0.001
_URLSAFE = bytes.maketrans(b"+/", b"-_")
# Items, or bytes of them, that can be kept.
_MOST = 2**31
_UNREAD = ("pause", "cancel", "go on")
_encoder = msgspec.json.Encoder(order="sorted", enc_hook=plain)


class KeyOptions(Struct, frozen=True):
    """How a call with a key is kept; see `with_call_options`."""

    key: str
    keep: float = _KEEP
    keep_errors: float = _KEEP
    run_within: float | None = None
    cancel_when_left: bool = False
    delay: float = 0.0
    at: float | None = None
    bounds: ItemBounds = DEFAULT_BOUNDS


def check_key(key: Any) -> str:
    """Refuse what can't be a key; return it."""
    if not isinstance(key, str):
        raise TypeError(f"key: needs a str, not {key!r:.80}")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ValueError("key: must be text that UTF-8 has") from None
    if not 0 < size <= MAX_KEY:
        raise ValueError(f"key: from 1 to {MAX_KEY} bytes, not {size}")
    return key


def key_options(
    key: str | None,
    keep: float | None = None,
    keep_errors: float | None = None,
    run_within: float | None = None,
    *,
    cancel_when_left: bool = False,
    delay: float = 0.0,
    at: float | None = None,
    bounds: ItemBounds | None = None,
) -> KeyOptions | None:
    """Return the options of calls with a key, checked; ``None`` if none is given.

    :raises ValueError: if one is out of range, or means nothing without a key
    """
    if keep is not None:
        _check_seconds("keep", keep, _SHORTEST)
    if keep_errors is not None:
        _check_seconds("keep_errors", keep_errors, 0.0)
    if run_within is not None:
        _check_seconds("run_within", run_within, _SHORTEST)
    if delay != 0.0:
        _check_seconds("delay", delay, 0.0)
    if at is not None:
        _check_seconds("at", at, _SHORTEST)
    if not isinstance(cancel_when_left, bool):
        raise TypeError(f"cancel_when_left: needs a bool, not {cancel_when_left!r:.80}")
    if delay and at is not None:
        raise ValueError("at: either this or delay")
    if key is None:
        given = {
            "keep": keep is not None,
            "keep_errors": keep_errors is not None,
            "run_within": run_within is not None,
            "cancel_when_left": cancel_when_left,
            "bounds": bounds is not None,
        }
        for name in given:
            if given[name]:
                raise ValueError(f"{name}: only a call with a key has it")
        return None
    keep = _KEEP if keep is None else keep
    keep_errors = keep if keep_errors is None else keep_errors
    times = (keep, keep_errors, run_within, cancel_when_left, delay, at)
    return KeyOptions(check_key(key), *times, _checked_bounds(bounds))


def _checked_bounds(bounds: ItemBounds | None) -> ItemBounds:
    """Return how much is kept of a stream; refuse what can't be."""
    if bounds is None:
        return DEFAULT_BOUNDS
    if not isinstance(bounds, ItemBounds):
        raise TypeError(f"bounds: needs ItemBounds, not {bounds!r:.80}")
    items = 1 if bounds.keep_items is None else bounds.keep_items
    for name, value in (("keep_items", items), ("keep_bytes", bounds.keep_bytes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: needs an int, not {value!r:.80}")
        if not 1 <= value <= _MOST:
            raise ValueError(f"{name}: from 1 to {_MOST:,}, not {value!r}")
    if bounds.when_unread not in _UNREAD:
        raise ValueError(f"when_unread: pause, cancel or go on, not {bounds.when_unread!r:.80}")
    _check_seconds("unread_timeout", bounds.unread_timeout, _SHORTEST)
    return bounds


def _check_seconds(name: str, value: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: needs seconds, not {value!r:.80}")
    if not least <= value <= _LONGEST:
        raise ValueError(f"{name}: from {least:g} to {_LONGEST:g} s, not {value!r}")


def keyed_calls(core: Core, to: str | None = None) -> KeyedCalls:
    """Return what keeps calls.

    :param to: whom they are for
    :raises ValueError: if they can't have a key, or the transport keeps none
    """
    if to is not None:
        raise ValueError("key: a call to one peer can't have a key")
    keyed = core.transport.keyed
    if keyed is None:
        raise ValueError(
            "key: this transport keeps no calls; Redis does, with a consumer group and the native "
            "dialect"
        )
    return keyed


def keyed_request(
    options: KeyOptions,
    request_id: str,
    op: Operation,
    path: list[str],
    args: Iterable[Any] | None,
    kwargs: dict[str, Any] | None,
    meta: dict[str, Any] | None,
) -> KeyedRequest:
    """Return what is to run.

    :raises ValueError: for functions, streams and references among the arguments: they would end
        with the caller, and the call would go on
    :raises TypeError: if an argument can't be sent
    """
    if USE.begun and has_references((args, kwargs)):
        raise ValueError("key: a call with a key takes no references")
    request = Request(request_id, op, path)
    if args is not None:
        request.a = [pack_argument(arg, _refuse) for arg in args]
    if kwargs:
        request.k = {name: pack_argument(arg, _refuse) for name, arg in kwargs.items()}
    digest = digest_of(request)
    if meta:
        request.meta = meta
    return KeyedRequest(
        options.key,
        digest,
        request,
        options.keep,
        options.keep_errors,
        options.run_within,
        options.delay,
        options.at,
        options.bounds,
    )


def _refuse(value: Any) -> None:
    if is_stream(value) or is_callback(value):
        raise ValueError("key: a call with a key takes no functions and no streams")


def digest_of(request: Request) -> str:
    """Return what is the same for the same call, whatever codec it travels in.

    Arguments by name may stand in any order; by position and by name are two calls, and so are 1
    and 1.0.
    """
    try:
        what = _encoder.encode((request.op, request.p, request.a or [], request.k or {}))
    except (RecursionError, ValueError) as exc:
        raise TypeError(f"key: the arguments can't be told from others: {exc}") from exc
    digest = b2a_base64(_hash_function()(what, digest_size=16).digest(), newline=False)
    return digest[:22].translate(_URLSAFE).decode()


@cache
def _hash_function() -> Callable[..., Any]:
    from hashlib import blake2b  # loads OpenSSL's hash functions, which few need

    return blake2b


def value_of(reply: Reply) -> Any:
    """Return the result that a reply has, ``None`` for a stream.

    :raises RPCError: the error that it has in its place
    """
    if reply.e is not UNSET:
        raise error_from_wire(reply.e)
    return unpack_result(reply.v, _kept_stream)


def is_kept_stream(reply: Reply) -> bool:
    """Whether the result that a reply has is a stream, whose items are kept elsewhere."""
    return reply.v.__class__ is dict and unpack_result(reply.v, _kept_stream) is None


def _kept_stream(stream_id: str) -> None:
    """Return what stands for a stream."""


def kept_stream(path: Iterable[str]) -> TypeError:
    """Return the error of who wants to have a stream from a call with a key at once."""
    name = ".".join(path)
    return TypeError(f"{name}: the stream of a call with a key is read by items() of its handle")


async def wait_within(
    core: Core,
    timeout: float | None,
    late: Callable[[float | None], RPCTimeoutError],
    wait: Awaitable[T],
    deadline: float | None = None,
) -> T:
    """Wait for what a call comes to, as long as it may be waited for.

    A handler that waits here lets another one run meanwhile, and has no more time than its caller.

    :param late: returns the error for when it was waited for long enough
    :param deadline: in place of that of ``timeout``
    """
    serving = running.get()
    deadline = _until(core, timeout, deadline, serving)
    lender = None if serving is None else core.lender
    if lender is not None:
        lender.lend()
    try:
        with CancelScope(deadline=inf if deadline is None else deadline):
            return await wait
    finally:
        if lender is not None:
            lender.take_back()
    raise late(deadline)


async def call_within(
    core: Core,
    keeps: KeyedCalls,
    call: KeyedRequest,
    timeout: float | None,
    late: Callable[[float | None], RPCTimeoutError],
    deadline: float | None,
    *,
    cancel_when_left: bool,
) -> Reply:
    """Make a call, and wait for what it comes to; see `wait_within`.

    The transport ends the wait: at this rate a cancel scope for each would cost too much.
    """
    serving = running.get()
    deadline = _until(core, timeout, deadline, serving)
    lender = None if serving is None else core.lender
    if lender is not None:
        lender.lend()
    try:
        reply = await keeps.call(call, cancel_when_left=cancel_when_left, deadline=deadline)
    finally:
        if lender is not None:
            lender.take_back()
    if reply is None:
        raise late(deadline)
    return reply


def _until(
    core: Core, timeout: float | None, deadline: float | None, serving: CallInfo | None
) -> float | None:
    if deadline is None and timeout is not None:
        deadline = core.now() + timeout
    return deadline if serving is None else earlier(deadline, serving)
