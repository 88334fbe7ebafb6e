"""Calls with keys in a stream that has shards: each is where its key belongs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from ...abc import CallState, Envelope, Item, ItemsEnd, KeyedCalls, KeyedItems, KeyedRequest
from ...records import Reply

__all__ = ("ShardedCalls",)


class ShardedCalls(KeyedCalls):
    """Hands each call to what keeps those of its shard.

    :param of_key: returns that for a key
    :param of_request: returns that for a request that was received
    :param every: returns those of all shards in which any may have been received
    """

    def __init__(
        self,
        of_key: Callable[[str], KeyedCalls],
        of_request: Callable[[Envelope], KeyedCalls],
        every: Callable[[], Iterable[KeyedCalls]],
    ) -> None:
        self._of_key = of_key
        self._of_request = of_request
        self.items: KeyedItems = ShardedItems(of_key, of_request, every)

    async def start(self, call: KeyedRequest) -> None:
        """See `KeyedCalls.start`."""
        await self._of_key(call.key).start(call)

    async def call(
        self, call: KeyedRequest, *, cancel_when_left: bool = False, deadline: float | None = None
    ) -> Reply | None:
        """See `KeyedCalls.call`."""
        calls = self._of_key(call.key)
        return await calls.call(call, cancel_when_left=cancel_when_left, deadline=deadline)

    async def wait(self, key: str) -> Reply:
        """See `KeyedCalls.wait`."""
        return await self._of_key(key).wait(key)

    async def state(self, key: str) -> CallState:
        """See `KeyedCalls.state`."""
        return await self._of_key(key).state(key)

    async def cancel(self, key: str) -> bool:
        """See `KeyedCalls.cancel`."""
        return await self._of_key(key).cancel(key)

    async def forget(self, key: str) -> bool:
        """See `KeyedCalls.forget`."""
        return await self._of_key(key).forget(key)

    async def report(self, envelope: Envelope, value: Any) -> None:
        """See `KeyedCalls.report`."""
        await self._of_request(envelope).report(envelope, value)

    async def progress(self, key: str) -> tuple[str, Any] | None:
        """See `KeyedCalls.progress`."""
        return await self._of_key(key).progress(key)


class ShardedItems(KeyedItems):
    """Hands the items of each call to what keeps those of its shard.

    :param of_key: as of `ShardedCalls`
    :param of_request: the same
    :param every: the same
    """

    def __init__(
        self,
        of_key: Callable[[str], KeyedCalls],
        of_request: Callable[[Envelope], KeyedCalls],
        every: Callable[[], Iterable[KeyedCalls]],
    ) -> None:
        self._of_key = of_key
        self._of_request = of_request
        self._every = every

    @property
    def unread(self) -> int:
        """See `KeyedItems.unread`."""
        return sum(calls.items.unread for calls in self._every())

    async def resume(self, envelope: Envelope) -> Item[Any] | None:
        """See `KeyedItems.resume`."""
        return await self._of_request(envelope).items.resume(envelope)

    async def keep_item(self, envelope: Envelope, value: Any) -> None:
        """See `KeyedItems.keep_item`."""
        await self._of_request(envelope).items.keep_item(envelope, value)

    async def keep_rest(self, envelope: Envelope) -> None:
        """See `KeyedItems.keep_rest`."""
        await self._of_request(envelope).items.keep_rest(envelope)

    def read(self, key: str, after: str | None) -> AsyncGenerator[Item[Any] | ItemsEnd, None]:
        """See `KeyedItems.read`."""
        return self._of_key(key).items.read(key, after)
