"""A queue that is bounded by the number of its items and by their bytes."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args

from anyio import ClosedResourceError, Event, WouldBlock
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from msgspec import Struct

__all__ = ("BoundedQueue", "Overflow", "QueueStatistics")

T = TypeVar("T")
Overflow: TypeAlias = Literal["drop_oldest", "drop_newest", "block"]
logger = logging.getLogger("anyio_kkrpc")

# A consumer that always finds an item yields to others once in so many of them.
_YIELD_EVERY = 32


class QueueStatistics(Struct, frozen=True):
    """What a `BoundedQueue` holds and has seen.

    :ivar current_items: items in it
    :ivar current_bytes: their size together
    :ivar high_water_items: most items that it has held
    :ivar high_water_bytes: most bytes that it has held
    :ivar dropped: items dropped because it was full
    :ivar max_items: bound of the items
    :ivar max_bytes: bound of the bytes
    :ivar waiting_receivers: tasks that wait for an item
    :ivar waiting_senders: tasks that wait for room
    """

    current_items: int
    current_bytes: int
    high_water_items: int
    high_water_bytes: int
    dropped: int
    max_items: int
    max_bytes: int
    waiting_receivers: int
    waiting_senders: int


class BoundedQueue(Generic[T]):
    """A first-in, first-out queue with bounds, for tasks of one event loop.

    One item is always admitted to an empty queue, so memory is bounded by the larger of
    ``max_bytes`` and one item. An item stays in the queue until a running task takes it: receiving
    that is cancelled loses nothing.

    :param max_items: most items that it holds
    :param max_bytes: most bytes that they have together, as given with each
    :param overflow: what happens to an item that doesn't fit: ``"drop_oldest"`` makes room by
        dropping as few of the oldest as needed, ``"drop_newest"`` drops the item itself,
        ``"block"`` makes its sender wait
    :param on_drop: called with each item that is dropped
    :raises ValueError: if an argument is out of range
    """

    def __init__(
        self,
        max_items: int = 1000,
        max_bytes: int = 64 * 1024 * 1024,
        overflow: Overflow = "drop_oldest",
        *,
        on_drop: Callable[[T], object] | None = None,
    ) -> None:
        for name, value in (("max_items", max_items), ("max_bytes", max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be an int of at least 1, not {value!r}")
        if overflow not in get_args(Overflow):
            raise ValueError(f"overflow: one of {', '.join(get_args(Overflow))}, not {overflow!r}")
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._overflow = overflow
        self._on_drop = on_drop
        self._high_items = 0
        self._high_bytes = 0
        self._dropped = 0
        self._in_burst = False
        self._immediate = 0
        self._receivers: OrderedDict[Event, None] = OrderedDict()
        self._senders: OrderedDict[Event, int] = OrderedDict()
        self._notified_senders = 0
        self._closed: Exception | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __aiter__(self) -> AsyncIterator[T]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[T]:
        while True:
            try:
                item = await self.get()
            except ClosedResourceError:
                return
            yield item

    # Putting

    def put_nowait(self, item: T, size: int = 0) -> bool:
        """Add an item; return whether it was admitted.

        :param size: its bytes
        :raises WouldBlock: if it doesn't fit, or others wait before it, and the policy is ``block``
        :raises ClosedResourceError: if the queue was closed (or the reason given then)
        """
        self._check_open()
        if self._fits(size) and not self._senders:
            self._add(item, size)
            return True
        if self._overflow == "block":
            raise WouldBlock
        if self._overflow == "drop_newest":
            self._note_drop("newest")
            self._drop(item)
            return False
        evicted = []
        while not self._fits(size):
            self._note_drop("oldest")
            evicted.append(self._take())
        self._add(item, size)
        for old in evicted:
            self._drop(old)
        return True

    async def put(self, item: T, size: int = 0) -> bool:
        """Add an item, and wait for room if the policy is ``block``; return if it was admitted.

        If it is cancelled, the item was not added. Senders are served in their order.

        :raises ClosedResourceError: if the queue is closed (or the reason given then)
        """
        await checkpoint_if_cancelled()
        try:
            return self.put_nowait(item, size)
        except WouldBlock:
            pass
        turn = Event()
        self._senders[turn] = size
        try:
            while True:
                await turn.wait()
                self._check_open()
                if self._fits(size) and next(iter(self._senders)) is turn:
                    break
                turn = self._renew(self._senders, turn)
        finally:
            del self._senders[turn]
            self._wake_sender()
        self._add(item, size)
        self._wake_sender()
        return True

    @staticmethod
    def _renew(waiting: OrderedDict[Event, Any], old: Event) -> Event:
        """Put a new event in the place of a set one; the order stays."""
        new = Event()
        items = [(new if event is old else event, value) for event, value in waiting.items()]
        waiting.clear()
        waiting.update(items)
        return new

    def _fits(self, size: int) -> bool:
        count = len(self._items)
        return not count or (count < self._max_items and self._bytes + size <= self._max_bytes)

    def _add(self, item: T, size: int) -> None:
        self._items.append((item, size))
        self._bytes += size
        if len(self._items) > self._high_items:
            self._high_items = len(self._items)
        if self._bytes > self._high_bytes:
            self._high_bytes = self._bytes
        if self._receivers:
            self._wake_receiver()

    def _note_drop(self, which: str) -> None:
        self._dropped += 1
        if not self._in_burst:
            self._in_burst = True
            if len(self._items) >= self._max_items:
                bound = f"{self._max_items} messages"
            else:
                bound = f"{self._max_bytes} bytes"
            logger.warning("Message queue full (%s), dropping %s message", bound, which)

    def _drop(self, item: T) -> None:
        if self._on_drop is not None:
            self._on_drop(item)

    # Getting

    def get_nowait(self) -> T:
        """Take the oldest item.

        :raises WouldBlock: if there is none
        :raises ClosedResourceError: if there is none and the queue was closed (or the reason)
        """
        if not self._items:
            self._check_open()
            raise WouldBlock
        item = self._take()
        if self._senders:
            self._wake_sender()
        return item

    async def get(self) -> T:
        """Take the oldest item, and wait for one if there is none.

        With an item at hand it checks for cancellation each time, and yields to other tasks once in
        32 times: a full checkpoint for each message costs more than the rest.

        :raises ClosedResourceError: if there is none and the queue is closed (or the reason)
        """
        if self._items:
            self._immediate += 1
            if self._immediate % _YIELD_EVERY:
                await checkpoint_if_cancelled()
            else:
                await checkpoint()
        while not self._items:
            self._check_open()
            turn = Event()
            self._receivers[turn] = None
            try:
                await turn.wait()
            except BaseException:
                if turn.is_set() and self._items:
                    self._wake_receiver()
                raise
            finally:
                self._receivers.pop(turn, None)
        item = self._take()
        if self._senders:
            self._wake_sender()
        return item

    def extract(self, predicate: Callable[[T], bool]) -> list[T]:
        """Take out all items for which the predicate holds, in their order; they aren't dropped."""
        kept: deque[tuple[T, int]] = deque()
        out = []
        for item, size in self._items:
            if predicate(item):
                out.append(item)
                self._bytes -= size
            else:
                kept.append((item, size))
        self._items = kept
        self._end_burst()
        self._wake_sender()
        return out

    def _take(self) -> T:
        item, size = self._items.popleft()
        self._bytes -= size
        if self._in_burst:
            self._end_burst()
        return item

    def _end_burst(self) -> None:
        if 2 * len(self._items) <= self._max_items and 2 * self._bytes <= self._max_bytes:
            self._in_burst = False

    # Waiting

    @property
    def room(self) -> int:
        """How many more items fit by their number; 0 if the bytes are used up."""
        if self._items and self._bytes >= self._max_bytes:
            return 0
        return self._max_items - len(self._items)

    async def wait_room(self) -> None:
        """Wait until there is room.

        :raises ClosedResourceError: if the queue is closed (or the reason)
        """
        while True:
            self._check_open()
            if self.room > 0:
                return
            turn = Event()
            self._senders[turn] = 0
            try:
                await turn.wait()
            finally:
                del self._senders[turn]
                self._wake_sender()

    def _wake_receiver(self) -> None:
        if self._receivers:
            turn, _ = self._receivers.popitem(last=False)
            turn.set()

    def _wake_sender(self) -> None:
        for turn, size in self._senders.items():
            if self._fits(size):
                turn.set()
            return

    # Closing

    def close(self, reason: Exception | None = None, *, discard: bool = False) -> None:
        """Close it, and wake everybody; later calls of this change nothing but ``discard``.

        Receivers get what is queued first.

        :param reason: what senders, and receivers when it is empty, get instead of
            `~anyio.ClosedResourceError`
        :param discard: whether what is queued is thrown away
        """
        if self._closed is None:
            self._closed = ClosedResourceError() if reason is None else reason
        if discard:
            self._items.clear()
            self._bytes = 0
        for turn in [*self._receivers, *self._senders]:
            turn.set()
        self._receivers.clear()

    def _check_open(self) -> None:
        if self._closed is not None:
            # A copy, because one exception that is raised again and again collects tracebacks.
            error = copy.copy(self._closed)
            error.__cause__ = self._closed.__cause__
            raise error

    def statistics(self) -> QueueStatistics:
        """Return what it holds and has seen."""
        return QueueStatistics(
            current_items=len(self._items),
            current_bytes=self._bytes,
            high_water_items=self._high_items,
            high_water_bytes=self._high_bytes,
            dropped=self._dropped,
            max_items=self._max_items,
            max_bytes=self._max_bytes,
            waiting_receivers=len(self._receivers),
            waiting_senders=len(self._senders),
        )
