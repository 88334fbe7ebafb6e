"""Calls with a key over a pair in one process: the states that they have in Redis, in a dict."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from heapq import heappop, heappush
from itertools import count
from math import inf
from time import time
from typing import Any

from anyio import CancelScope, Event, current_time
from msgspec import UNSET, Struct

from .._exceptions import TransportClosedError
from ..abc import CallState, Envelope, KeyedCalls, KeyedItems, KeyedRequest
from ..kit._keyed import (
    BRIEFLY,
    PAUSE,
    conflict,
    ended_state,
    not_found,
    ran_too_long,
    unfit_state,
    was_cancelled,
)
from ..records import Cancel, Record, Reply
from ._items import Kept, KeptItems, MemoryItems

__all__ = ("MemoryCalls", "MemoryKeys")

_epochs = count(1)
# Calls that are kept before the first look which of them are over.
_MANY = 1000


class _Call(Struct):
    """What is known of one key.

    :ivar expires: when nothing is known of it any more, ``None`` before its end
    :ivar since: when it was received
    :ivar ends: when its handler is out of time
    :ivar due: when it may begin
    :ivar waiting: how many wait for it
    :ivar news: set at its end
    :ivar items: what is kept of a result that is a stream
    """

    digest: str
    request: KeyedRequest
    kind: str
    news: Event
    items: KeptItems
    reply: Reply | None = None
    expires: float | None = None
    since: float | None = None
    ends: float | None = None
    due: float = 0.0
    waiting: int = 0
    told: tuple[str, Any] | None = None
    told_at: float = -PAUSE


class MemoryKeys:
    """The calls with keys that one side of a pair has sent."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}
        self._sweep_at = _MANY

    def find(self, key: str) -> _Call | None:
        """Return what is known of a key."""
        now, calls = current_time(), self._calls
        if len(calls) >= self._sweep_at:
            for name in [name for name, one in calls.items() if (one.expires or now) < now]:
                del calls[name]
            self._sweep_at = max(2 * len(calls), _MANY)
        call = calls.get(key)
        if call is None or call.expires is None or call.expires > now:
            return call
        del calls[key]
        return None

    def get(self, key: str) -> _Call:
        """The same.

        :raises CallNotFoundError: if nothing is
        """
        call = self.find(key)
        if call is None:
            raise not_found(key)
        return call

    def claim(self, wanted: KeyedRequest) -> tuple[_Call, bool]:
        """Return the call that has a key, and whether it is new.

        :raises KeyConflictError: if another one has it
        """
        call = self.find(wanted.key)
        if call is not None and not unfit_state(call.kind, call.request.keep_errors):
            if call.digest != wanted.digest:
                raise conflict(wanted.key)
            return call, False
        items = KeptItems(next(_epochs), wanted.bounds)
        call = _Call(wanted.digest, wanted, "waiting", Event(), items)
        self._calls[wanted.key] = call
        return call, True

    def drop(self, key: str, call: _Call) -> None:
        """Forget a call."""
        if self._calls.get(key) is call:
            del self._calls[key]

    def end(self, call: _Call, kind: str, reply: Reply | None) -> None:
        """Note what a call has come to; only the first counts."""
        if call.expires is not None:
            return
        wanted = call.request
        keep = wanted.keep_errors if kind == "failed" else wanted.keep
        if unfit_state(kind, wanted.keep_errors):
            keep = BRIEFLY
        call.kind, call.reply, call.expires = kind, reply, current_time() + keep
        call.news.set()
        call.items.change()


class MemoryCalls(KeyedCalls):
    """One side's access to them, and what it does for those of the other side.

    :param ours: what this side has sent
    :param theirs: what the other side has sent
    :param send: hands a request to the other side
    :param tell: hands a record to the listener of the other side
    :param cancel: hands a cancel to the listener of this side
    :param copy: returns a record as it is on the other side
    :param size_of: returns how large it is there
    :ivar later: what came here and isn't to begin yet, the next one first
    """

    def __init__(
        self,
        ours: MemoryKeys,
        theirs: MemoryKeys,
        *,
        send: Callable[[Envelope], Awaitable[None]],
        tell: Callable[[Record], object],
        cancel: Callable[[Record], object],
        copy: Callable[[Record], Any],
        size_of: Callable[[Record], int],
    ) -> None:
        self._ours, self._theirs = ours, theirs
        self._send, self._tell, self._copy = send, tell, copy
        self.later: list[tuple[float, int, Envelope]] = []
        self._numbers = count()
        self._waits: set[Event] = set()
        self._ended = False
        self._items = MemoryItems(
            lambda key: self._kept_of(ours.get(key)),
            lambda envelope: envelope.token.items,
            lambda reply: (copy(reply), size_of(reply)),
            lambda envelope: self._cancel_served(envelope, cancel),
        )
        self.items: KeyedItems = self._items

    # What this side asks

    def close(self) -> None:
        """Let nobody wait any more."""
        self._ended = True
        self._items.close()
        for event in self._waits:
            event.set()

    async def start(self, call: KeyedRequest) -> None:
        """See `KeyedCalls.start`."""
        await self._start(call)

    async def call(
        self, call: KeyedRequest, *, cancel_when_left: bool = False, deadline: float | None = None
    ) -> Reply | None:
        """See `KeyedCalls.call`."""
        with CancelScope(deadline=inf if deadline is None else deadline):
            known = await self._start(call)
            try:
                return await self._wait(known)
            except BaseException:
                if cancel_when_left and not known.waiting and known.expires is None:
                    self._cancel(call.key)
                raise
        return None

    async def wait(self, key: str) -> Reply:
        """See `KeyedCalls.wait`."""
        return await self._wait(self._ours.get(key))

    async def state(self, key: str) -> CallState:
        """See `KeyedCalls.state`."""
        call, now = self._ours.get(key), current_time()
        kind: Any = call.kind
        if call.expires is not None:
            return CallState(kind, expires=max(call.expires - now, 0.0))
        if call.since is None:
            return CallState(kind)
        return CallState(kind, None, now - call.since, 1)

    async def cancel(self, key: str) -> bool:
        """See `KeyedCalls.cancel`."""
        return self._cancel(key)

    def _cancel(self, key: str) -> bool:
        call = self._ours.find(key)
        if call is None or call.expires is not None:
            return False
        self._ours.end(call, "cancelled", None)
        self._tell(Cancel(call.request.request.id))
        return True

    async def forget(self, key: str) -> bool:
        """See `KeyedCalls.forget`."""
        call = self._ours.find(key)
        if call is None:
            return False
        if call.expires is None:
            raise ValueError(f"forget: the call with the key {key!r} hasn't ended; cancel it")
        self._ours.drop(key, call)
        return True

    async def progress(self, key: str) -> tuple[str, Any] | None:
        """See `KeyedCalls.progress`."""
        return self._ours.get(key).told

    async def metadata(self, key: str) -> Mapping[str, Any]:
        """See `KeyedCalls.metadata`."""
        call = self._ours.find(key)
        meta = UNSET if call is None else call.request.request.meta
        return {} if meta is UNSET else meta

    async def _start(self, wanted: KeyedRequest) -> _Call:
        call, is_new = self._ours.claim(wanted)
        if not is_new:
            return call
        delay = wanted.delay if wanted.at is None else wanted.at - time()
        if delay > 0:
            call.kind, call.due = "delayed", current_time() + delay
        request = self._copy(wanted.request)
        if wanted.run_within is not None:
            request.d = max(int(wanted.run_within * 1000), 1)
        try:
            await self._send(Envelope(request, key=wanted.key, token=call))
        except BaseException:
            self._ours.end(call, "cancelled", None)  # for those who have joined it
            self._ours.drop(wanted.key, call)
            raise
        return call

    async def _wait(self, call: _Call) -> Reply:
        call.waiting += 1
        self._waits.add(call.news)
        try:
            if not self._ended:
                await call.news.wait()
        finally:
            call.waiting -= 1
            if not call.waiting:
                self._waits.discard(call.news)
        if call.kind == "cancelled":
            raise was_cancelled(call.request.key)
        if call.reply is None:
            raise TransportClosedError("the transport has been closed")
        return call.reply

    def _kept_of(self, call: _Call) -> Kept:
        return Kept(call.items, call.kind, call.expires is not None, call.reply)

    # What this side serves

    def _cancel_served(self, envelope: Envelope, cancel: Callable[[Record], object]) -> None:
        """Cancel a call that is served here: nobody reads its items."""
        call: _Call = envelope.token
        self._theirs.end(call, "cancelled", None)
        cancel(Cancel(call.request.request.id))

    async def receive(self, receive: Callable[[], Awaitable[Envelope]]) -> Envelope:
        """Return the next request, or the next that had to wait for its time."""
        with CancelScope(deadline=self.later[0][0]):
            return await receive()
        return heappop(self.later)[2]

    def begin(self, envelope: Envelope) -> bool:
        """Note that a request is received; return whether it is to run."""
        call: _Call = envelope.token
        if call.expires is not None:
            return False
        now = current_time()
        if now < call.due:
            heappush(self.later, (call.due, next(self._numbers), envelope))
            return False
        call.kind, call.since, envelope.sent_at = "running", now, now
        if call.request.run_within is not None:
            call.ends = now + call.request.run_within
        return True

    def settle(self, envelope: Envelope, reply: Envelope | None) -> None:
        """Keep what a request was settled with."""
        call: _Call = envelope.token
        record: Any = None if reply is None else reply.record
        if record is None and call.ends is not None and current_time() >= call.ends:
            record = ran_too_long(call.request.run_within)
        if record is None:
            self._theirs.end(call, "cancelled", None)
        else:
            self._theirs.end(call, ended_state(record), self._copy(record))

    async def report(self, envelope: Envelope, value: Any) -> None:
        """See `KeyedCalls.report`."""
        call: _Call = envelope.token
        now = current_time()
        if now - call.told_at >= PAUSE and call.expires is None:
            position = 1 if call.told is None else int(call.told[0]) + 1
            call.told, call.told_at = (str(position), self._copy(Reply("", value)).v), now
