"""The items of calls with keys over a pair in one process: the states that they have in Redis."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

from anyio import Event, move_on_after, sleep_forever
from anyio.lowlevel import checkpoint
from msgspec import UNSET, Struct

from .._exceptions import DeliveryError, ItemsLostError, TransportClosedError
from ..abc import Envelope, Item, ItemBounds, ItemsEnd, KeyedItems
from ..kit._items import Left, Position, Unread, Window, no_stream, parse_position, restarted
from ..kit._keyed import was_cancelled
from ..records import Reply

__all__ = ("KeptItems", "MemoryItems")


class KeptItems:
    """What is kept of one call.

    :param epoch: another one for each call
    :ivar begun: whether its result is a stream
    :ivar left: what its handler has yielded since it waited for an item
    """

    def __init__(self, epoch: int, bounds: ItemBounds) -> None:
        self.epoch = epoch
        self.bounds = bounds
        self.window = Window(bounds)
        self.begun = False
        self.left = Left()
        self.values: deque[Any] = deque()
        self._changed = Event()

    @property
    def number(self) -> int:
        """The number of the last item."""
        return self.window.number

    @property
    def gone(self) -> int:
        """The number of the last item that is gone."""
        return self.number - len(self.values)

    def add(self, value: Any, size: int) -> None:
        """Keep one more."""
        self.window.add(size)
        self.values.append(value)
        self.change()

    def read(self, number: int) -> Any:
        """Return an item, and note that somebody has read as far."""
        self.window.read(number)
        self.change()
        return self.values[number - self.gone - 1]

    def remove(self, gone: int) -> None:
        """Remove all up to an item."""
        while self.gone < gone:
            self.values.popleft()

    def change(self) -> None:
        """Wake all who wait for a change."""
        self._changed.set()
        self._changed = Event()

    async def wait(self) -> None:
        """Wait for a change."""
        await self._changed.wait()


class Kept(Struct):
    """What is known of a call.

    :ivar kind: its state
    :ivar ended: whether it has
    :ivar reply: what it came to
    """

    items: KeptItems
    kind: str
    ended: bool
    reply: Reply | None


class MemoryItems(KeyedItems):
    """One side's access to them.

    :param find: returns what is known of a call of this side
    :param of: returns what is kept of a call that is served here
    :param copy: returns a record as it is on the other side, and its size
    :param cancel: cancels a call that is served here
    :ivar closed: whether nobody is to wait any more
    """

    def __init__(
        self,
        find: Callable[[str], Kept],
        of: Callable[[Envelope], KeptItems],
        copy: Callable[[Reply], tuple[Any, int]],
        cancel: Callable[[Envelope], object],
    ) -> None:
        self._find = find
        self._of = of
        self._copy = copy
        self._cancel = cancel
        self._unread = Unread()
        self._reading: set[KeptItems] = set()
        self.closed = False

    def close(self) -> None:
        """Let nobody wait any more."""
        self.closed = True
        for kept in self._reading:
            kept.change()

    # What this side serves

    @property
    def unread(self) -> int:
        """See `KeyedItems.unread`."""
        return self._unread.count

    async def resume(self, envelope: Envelope) -> Item[Any] | None:
        """See `KeyedItems.resume`: there is one attempt only."""
        kept = self._of(envelope)
        if kept.begun:
            raise DeliveryError("the items of a call can be resumed once, before the first one")
        kept.begun = True
        await checkpoint()
        return None

    async def keep_item(self, envelope: Envelope, value: Any) -> None:
        """See `KeyedItems.keep_item`."""
        kept = self._of(envelope)
        kept.begun = True
        reply, size = self._copy(Reply("", None if value is UNSET else value))
        kept.left.take(size)
        try:
            if kept.window.full:
                await self._make_room(envelope, kept)
        finally:
            kept.add(reply.v, size)  # who is cancelled there has yielded it
        await checkpoint()
        kept.left.waited()

    async def keep_rest(self, envelope: Envelope) -> None:
        """See `KeyedItems.keep_rest`."""
        self._of(envelope).begun = True
        await checkpoint()

    async def _make_room(self, envelope: Envelope, kept: KeptItems) -> None:
        bounds = kept.bounds
        if bounds.when_unread == "go on":
            kept.remove(self._unread.make_room(kept.window, envelope.key or ""))
            return
        with move_on_after(bounds.unread_timeout if bounds.when_unread == "cancel" else None):
            while True:
                kept.remove(kept.window.make_room())
                if not kept.window.full:
                    return
                await kept.wait()
        self._cancel(envelope)
        await sleep_forever()

    # What this side asks

    async def read(self, key: str, after: str | None) -> AsyncGenerator[Item[Any] | ItemsEnd, None]:
        """See `KeyedItems.read`."""
        at = parse_position(after)
        known = self._find(key)
        kept, number = known.items, 0 if at is None else at.number
        if at is not None and (at.epoch != kept.epoch or number > kept.number + known.ended):
            raise restarted(key)
        while True:
            while number < kept.number:
                number += 1
                if number <= kept.gone:
                    first = kept.gone + 1
                    position = str(Position(kept.epoch, first - 1))
                    raise ItemsLostError(number, first, position)
                value = kept.read(number)
                yield Item(str(Position(kept.epoch, number)), number, value)
            known = self._find(key)
            if known.items is not kept:
                raise restarted(key)
            if number < kept.number:
                continue
            if known.ended:
                yield _end_of(key, known)
                return
            await self._wait(kept)

    async def _wait(self, kept: KeptItems) -> None:
        self._reading.add(kept)
        try:
            if not self.closed:
                await kept.wait()
        finally:
            self._reading.discard(kept)
        if self.closed:
            raise TransportClosedError("the transport has been closed")


def _end_of(key: str, known: Kept) -> ItemsEnd:
    if known.kind == "cancelled" or known.reply is None:
        raise was_cancelled(key)
    kept, error = known.items, known.reply.e
    if not kept.begun and error is UNSET:
        raise no_stream(key)
    return ItemsEnd(str(Position(kept.epoch, kept.number + 1)), Reply("", e=error))
