"""A call that has a key, as whoever knows the key sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Generic, TypeVar, final

from anyio import sleep
from msgspec import UNSET, Struct

from .._driver._core import Core
from .._exceptions import RPCTimeoutError
from .._protocol._records import Reply
from ..abc import CallState, Item, ItemsEnd, KeyedCalls
from ..middleware import Invocation, pass_through
from ._access import Action, KeyAccess
from ._calls import Calls
from ._keyed import (
    KeyOptions,
    is_kept_stream,
    keyed_calls,
    keyed_request,
    value_of,
    wait_within,
)
from ._options import check_metadata, check_timeout
from ._question import Question
from ._typed import NO_TYPES, TypesOf

__all__ = ("CallHandle", "read_items", "read_metadata", "start")

T = TypeVar("T")

_ENDED = frozenset({"done", "failed", "dead", "cancelled", "refused"})
# Seconds between two looks how far a call has come.
_LOOK = 0.25


class _Result(Struct, frozen=True):
    """What is known of a result: of the method that was called, or what `attach` was given."""

    types: TypesOf
    path: tuple[str, ...]


@final
class CallHandle(Generic[T]):
    """A call with a key: made by `RPCChannel.start`, or found by `RPCChannel.attach`.

    It is no resource, and nothing need be done to leave it: the call goes on. All that it tells, it
    asks for; the channel has to be open.

    :ivar key: the call's
    """

    __slots__ = ("_access", "_core", "_metadata", "_result", "key")

    def __init__(
        self, core: Core, key: str, result: _Result, access: KeyAccess, metadata: Mapping[str, Any]
    ) -> None:
        self.key: str = key
        self._core = core
        self._result = result
        self._access = access
        self._metadata = metadata

    async def result(self, *, timeout: float | Any | None = UNSET) -> T:
        """Wait for the result; leaving the wait leaves the call as it is.

        If it is a stream, wait for its end, and return ``None``: its items are kept, see `items`.

        :param timeout: seconds to wait; the channel's if not given, ``None`` for ever
        :raises RPCTimeoutError: if there is none by then
        :raises CallNotFoundError: if there is no call with this key, or not any more
        :raises CallCancelledError: if it was cancelled
        :raises RemoteError: what the handler has raised
        :raises DeliveryError: if it was given up
        :raises RPCValidationError: if the result doesn't fit
        :raises KeyNotAllowedError: if the ``key_guard`` of the channel doesn't allow it, as for all
            that a handle does
        """
        check_timeout(timeout)
        self._open()
        if timeout is UNSET:
            timeout = self._core.timeout
        late = partial(_late, self.key, timeout)
        reply = await wait_within(self._core, timeout, late, self._wait())
        known: Any = value_of(reply)
        if not is_kept_stream(reply):
            known = self._result.types.convert_result(known, self._result.path)
        return known  # type: ignore[no-any-return]

    async def state(self) -> CallState:
        """Return what is known of the call now.

        :raises CallNotFoundError: if there is no call with this key, or not any more
        """
        return await (await self._allowed("attach")).state(self.key)

    async def cancel(self) -> bool:
        """Cancel the call, whoever made it and wherever it is; its key is free then.

        Where it runs, its handler is cancelled as soon as its worker knows; a result that comes
        before is kept.

        :return: false if it has ended already, or there is none
        """
        return await (await self._allowed("cancel")).cancel(self.key)

    async def forget(self) -> bool:
        """Keep its result no longer: the next call with the key runs.

        :return: false if there is nothing to forget
        :raises ValueError: if it hasn't ended; `cancel` it
        """
        return await (await self._allowed("forget")).forget(self.key)

    async def progress(self) -> AsyncGenerator[Any, None]:
        """Yield what the handler tells by `CallInfo.progress`, the latest of it, until the end.

        :raises CallNotFoundError: if there is no call with this key, or not any more
        """
        keeps, position = await self._allowed("attach"), ""
        while True:
            ended = (await keeps.state(self.key)).kind in _ENDED  # first: what comes last is seen
            told = await keeps.progress(self.key)
            if told is not None and told[0] != position:
                position = told[0]
                yield told[1]
            if ended:
                return
            await sleep(_LOOK)

    async def items(self, *, after: str | None = None) -> AsyncGenerator[Item[Any], None]:
        """Yield what the handler yields, from the first item or from any other, until the end.

        Any number of peers may do so, at any time as long as the result is kept. The fastest reader
        paces the handler, once so much is kept as the call's options say; slower ones may lose
        items. Leaving it leaves the call as it is.

        :param after: ``position`` of the item behind which to begin, from whatever reader
        :raises ValueError: if that is no position
        :raises CallNotFoundError: if there is no call with this key, or not any more
        :raises CallCancelledError: if it was cancelled
        :raises StreamRestartedError: if what was read isn't part of the stream any more
        :raises ItemsLostError: if items that come next aren't kept any more
        :raises RemoteError: what the handler has raised
        :raises DeliveryError: if the call was given up, or its result is no stream
        :raises RPCValidationError: if an item doesn't fit
        """
        convert = self._result.types.convert_item
        async with aclosing(await read_items(self, after)) as found:
            async for one in found:
                if isinstance(one, ItemsEnd):
                    value_of(one.reply)
                    return
                value: Any = convert(one.value, self._result.path)
                yield one if value is one.value else Item(one.position, one.number, value)

    def __repr__(self) -> str:
        return f"<CallHandle {self.key!r}>"

    async def _wait(self) -> Reply:
        return await (await self._allowed("attach")).wait(self.key)

    async def _allowed(self, action: Action) -> KeyedCalls:
        """Return what keeps the call, if that may be done with its key."""
        keeps = keyed_calls(self._open())
        if self._access.guarded:
            await self._access.check(action, self.key, self._metadata)
        return keeps

    def _open(self) -> Core:
        if not self._core.is_open:
            raise self._core.closed_error()
        return self._core


async def read_items(
    handle: CallHandle[Any], after: str | None
) -> AsyncGenerator[Item[Any] | ItemsEnd, None]:
    """Return what yields the items of a call as they are, and then their end."""
    return (await handle._allowed("attach")).items.read(handle.key, after)


async def read_metadata(handle: CallHandle[Any]) -> Mapping[str, Any]:
    """Return what the request of a call carried, nothing if that isn't there any more."""
    return await (await handle._allowed("attach")).metadata(handle.key)


def _late(key: str, timeout: float | None, deadline: float | None) -> RPCTimeoutError:
    within = "the caller's deadline" if timeout is None else f"{timeout} s"
    return RPCTimeoutError(f"the call with the key {key!r} did not end within {within}")


def attach(
    core: Core, access: KeyAccess, key: str, returns: Any, metadata: dict[str, Any] | None
) -> CallHandle[Any]:
    """Return the handle of a call that somebody has made, or will.

    :param returns: annotation of its result
    :param metadata: what the guard of the channel is told
    """
    keyed_calls(core)
    check_metadata(metadata)
    types = NO_TYPES if returns is None else TypesOf.returning(returns)
    return CallHandle(core, key, _Result(types, ("result",)), access, dict(metadata or {}))


async def start(core: Core, calls: Calls, asked: Question, options: KeyOptions) -> CallHandle[Any]:
    """Have a call made, through the middleware if there is any, and return its handle.

    :raises ValueError: if it can't have a key
    """
    keeps = keyed_calls(core, asked.options.to)
    if not core.is_open:
        raise core.closed_error()

    metadata: Mapping[str, Any] = dict(asked.options.metadata or {})

    async def last(call: Invocation) -> None:
        nonlocal metadata
        metadata = call.metadata
        new, path = core.conversation.new_id(), list(asked.path)
        meta = metadata or None
        request = keyed_request(options, new, "call", path, call.args, call.kwargs, meta)
        # What begins later may be served by then.
        fail_fast = calls.fails_fast(asked.options) and not options.delay and options.at is None
        await calls.access.check_call(
            keeps, request, attaches=False, cancels=False, fail_fast=fail_fast
        )
        await keeps.start(request)

    invocation = Invocation(
        side="client",
        operation="start",
        method=asked.method,
        args=list(asked.args),
        kwargs=dict(asked.kwargs),
        metadata=dict(metadata),
        shard_key=options.key,
    )
    await pass_through(calls.middleware, invocation, last)
    return CallHandle(core, options.key, _Result(asked.types, asked.path), calls.access, metadata)
