"""A queue that is bounded by the number of its items and by their bytes.

An item leaves the queue only in a step that a running task makes without awaiting. A task that
waits is never handed an item or a place: it is told that there is one, and takes it when it runs.
So there is no moment at which a cancellation could lose an item, or leave one behind.

Two things follow. What a waiting receiver was told of is *promised*: a later `get` doesn't take it,
but `get_nowait`, `extract` and an eviction may, and then a receiver waits on at its old place
(which one, if several were told at once, is up to the scheduler: trio runs them in any order). And
a receiver that is cancelled after it was told passes the promise on.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NoReturn, TypeAlias, TypeVar, final, get_args

from anyio import ClosedResourceError, EndOfStream, Event, WouldBlock
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from .._runtime._clock import OneShot, OneShots
from .._runtime._fresh import fresh_copy

__all__ = ("BoundedQueue", "Overflow", "QueueStatistics")

T = TypeVar("T")
Overflow: TypeAlias = Literal["drop_oldest", "drop_newest", "block"]
logger = logging.getLogger("anyio_kkrpc")

# A task that never has to wait yields to the others once in so many operations. Measured (us, per
# call: asyncio, uvloop, trio): a full checkpoint 2.5, 1.3, 3.8, and more if others are ready;
# checkpoint_if_cancelled 0.7, 0.75, 0.5; put_nowait and get_nowait together 0.3.
_YIELD_EVERY = 32


@final
@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What a `BoundedQueue` holds and has seen.

    :ivar current_items: items in it
    :ivar current_bytes: their size together
    :ivar high_water_items: most items that it has held at a time
    :ivar high_water_bytes: most bytes that it has held at a time
    :ivar dropped: items dropped because it was full
    :ivar max_items: bound of the items
    :ivar max_bytes: bound of the bytes
    :ivar waiting_receivers: tasks that wait for an item and haven't been told of one
    :ivar waiting_senders: tasks that wait for room, in `~BoundedQueue.put` or
        `~BoundedQueue.wait_room`
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


@final
class BoundedQueue(Generic[T]):
    """A first-in, first-out queue with bounds, for the tasks of one event loop.

    One item is always admitted to an empty queue, however large it is: the queue holds no more
    bytes than the larger of ``max_bytes`` and one item. An item counts until a task has taken it.
    Waiting tasks are served in the order in which they came. Cancelling any method loses no item,
    adds none, and passes on what the cancelled task was told of.

    Iterating receives until the queue was closed and is empty; a reason that was given to `close`
    is raised then, except `~anyio.EndOfStream`.

    The first drop of a burst is logged as a warning. A burst ends when receivers have drained the
    queue to half of both bounds, or less.

    :param max_items: most items that it holds, at least 1
    :param max_bytes: most bytes that they have together, as given with each; at least 1
    :param overflow: what happens when an item doesn't fit: ``"drop_oldest"`` drops as few of the
        oldest as needed, ``"drop_newest"`` drops the item itself, ``"block"`` makes its sender wait
    :param on_drop: called with each dropped item, when the queue is in order again, so it may use
        the queue. If it raises, that is logged.
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
            raise ValueError(
                f"overflow: must be one of {', '.join(get_args(Overflow))}, not {overflow!r}"
            )
        if on_drop is not None and not callable(on_drop):
            raise ValueError(f"on_drop: must be callable, not {on_drop!r}")
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
        self._operations = 0
        # Receivers that haven't been told of an item, each with its place in the line. While there
        # are any, at least as many have been told and not run yet as there are items.
        self._receivers: OrderedDict[OneShot, int] = OrderedDict()
        self._one_shot = OneShots()
        self._told_receivers = 0
        self._last_place = 0
        # Tasks in put() and wait_room(), each with its size. Only the first of a line is told, and
        # stays there until it has run.
        self._putters: OrderedDict[Event, int] = OrderedDict()
        self._room_waiters: OrderedDict[Event, int] = OrderedDict()
        self._reason: Exception | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __aiter__(self) -> BoundedQueue[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.get()
        except (EndOfStream, ClosedResourceError) as exc:
            if isinstance(exc, EndOfStream) or type(exc) is ClosedResourceError:
                raise StopAsyncIteration from None
            raise

    # Putting

    def put_nowait(self, item: T, size: int = 0) -> bool:
        """Add an item; return whether it was admitted, which ``drop_newest`` may refuse.

        :param size: its bytes
        :raises WouldBlock: if the policy is ``block`` and the item doesn't fit, or others wait in
            `put` before it
        :raises ClosedResourceError: if the queue was closed (or the reason given then)
        """
        if self._reason is not None or size < 0:
            self._refuse(size)
        count, total = len(self._items) + 1, self._bytes + size
        if not self._putters and (
            count == 1 or (count <= self._max_items and total <= self._max_bytes)
        ):
            self._add(item, size)
            return True
        if self._overflow == "block":
            raise WouldBlock
        if self._overflow == "drop_newest":
            self._note_drop("newest")
            self._tell_dropped(item)
            return False
        evicted = []
        while not self._fits(size):
            self._note_drop("oldest")
            old, old_size = self._items.popleft()
            self._bytes -= old_size
            evicted.append(old)
        self._add(item, size)
        self._notify_senders()  # several may have gone for one
        for old in evicted:
            self._tell_dropped(old)
        return True

    async def put(self, item: T, size: int = 0) -> bool:
        """Add an item, and with ``block`` wait for room; return whether it was admitted.

        If it is cancelled, the item was not added. With room at hand it checks for cancellation
        each time, and yields to other tasks once in 32 operations.

        :param size: its bytes
        :raises ClosedResourceError: if the queue is closed (or the reason given then)
        """
        await self._checkpoint()
        try:
            return self.put_nowait(item, size)
        except WouldBlock:
            pass
        turn = Event()
        self._putters[turn] = size
        try:
            await turn.wait()
            if self._reason is not None:
                raise fresh_copy(self._reason)
            self._add(item, size)  # it fits: nobody passes the first of the line
        finally:
            del self._putters[turn]
            self._notify_senders()
        return True

    def _refuse(self, size: int) -> NoReturn:
        if self._reason is not None:
            raise fresh_copy(self._reason)
        raise ValueError(f"size: must be at least 0, not {size!r}")

    def _fits(self, size: int) -> bool:
        count = len(self._items)
        return not count or (count < self._max_items and self._bytes + size <= self._max_bytes)

    def _add(self, item: T, size: int) -> None:
        self._items.append((item, size))
        count, total = len(self._items), self._bytes + size
        self._bytes = total
        if count > self._high_items:
            self._high_items = count
        if total > self._high_bytes:
            self._high_bytes = total
        if self._receivers:
            self._notify_receivers()

    def _note_drop(self, which: str) -> None:
        self._dropped += 1
        if self._in_burst:
            return
        self._in_burst = True
        if len(self._items) >= self._max_items:
            text, bound = "Message queue full (%d messages), dropping %s message", self._max_items
        else:
            text, bound = "Message queue full (%d bytes), dropping %s message", self._max_bytes
        logger.warning(text, bound, which)

    def _tell_dropped(self, item: T) -> None:
        if self._on_drop is not None:
            try:
                self._on_drop(item)
            except Exception:
                logger.exception("on_drop failed")

    # Getting

    def get_nowait(self) -> T:
        """Take the oldest item, even if a waiting task has been told of it.

        :raises WouldBlock: if there is none
        :raises ClosedResourceError: if there is none and the queue was closed (or the reason)
        """
        if self._items:
            return self._take()
        if self._reason is not None:
            raise fresh_copy(self._reason)
        raise WouldBlock

    def poll(self) -> T | None:
        """Take the oldest item, unless there is none that no waiting task has been told of, or it
        is time to look for a cancellation, as `get` does."""
        self._operations += 1
        if len(self._items) <= self._told_receivers or not self._operations % _YIELD_EVERY:
            return None
        item, size = self._items.popleft()
        self._bytes -= size
        if self._in_burst or self._putters or self._room_waiters:
            self._make_room()
        return item

    async def get(self) -> T:
        """Take the oldest item, and wait for one if there is none.

        With an item at hand it checks for cancellation each time, before it takes the item, and
        yields to other tasks once in 32 operations: a scheduler round trip for each item would cost
        several times as much as the rest.

        :raises ClosedResourceError: if there is none and the queue is closed (or the reason)
        """
        if self._items or self._reason is not None:
            self._operations += 1
            if self._operations % _YIELD_EVERY:
                await checkpoint_if_cancelled()
            else:
                await checkpoint()
        if len(self._items) <= self._told_receivers:
            await self._wait_item()
        return self._take()

    async def _wait_item(self) -> None:
        """Return when the oldest item is this task's to take."""
        self._last_place = place = self._last_place + 1
        while self._reason is None:
            turn = self._one_shot()
            self._receivers[turn] = place
            if place != self._last_place:
                # Others came after it, so it was woken for an item that is gone: back to its place.
                in_order = sorted(self._receivers.items(), key=lambda waiting: waiting[1])
                self._receivers = OrderedDict(in_order)
            try:
                await turn.wait()
            except BaseException:
                if self._receivers.pop(turn, None) is None:
                    self._told_receivers -= 1
                    self._notify_receivers()
                raise
            self._told_receivers -= 1
            if self._items:
                return
        if not self._items:
            raise fresh_copy(self._reason)

    def _take(self) -> T:
        item, size = self._items.popleft()
        self._bytes -= size
        self._make_room()
        return item

    def _make_room(self) -> None:
        """Note that an item was taken."""
        if self._in_burst:
            self._end_burst()
        if self._putters or self._room_waiters:
            self._notify_senders()

    def _end_burst(self) -> None:
        if 2 * len(self._items) <= self._max_items and 2 * self._bytes <= self._max_bytes:
            self._in_burst = False

    def _notify_receivers(self) -> None:
        while self._receivers and self._told_receivers < len(self._items):
            turn, _ = self._receivers.popitem(last=False)
            self._told_receivers += 1
            turn.set()

    def extract(self, predicate: Callable[[T], bool]) -> list[T]:
        """Take out all items for which the predicate holds, in their order; they aren't dropped.

        If the predicate raises, nothing is taken. It must not use the queue.
        """
        chosen = [predicate(item) for item, _ in self._items]
        if not any(chosen):
            return []
        entries = list(zip(self._items, chosen, strict=True))
        self._items = deque(entry for entry, out in entries if not out)
        self._bytes = sum(size for _, size in self._items)
        self._end_burst()
        self._notify_senders()
        return [item for (item, _), out in entries if out]

    # Room

    @property
    def room(self) -> int:
        """How many more items fit by their number; 0 if the bytes are used up."""
        if self._items and self._bytes >= self._max_bytes:
            return 0
        return self._max_items - len(self._items)

    @property
    def at_hand(self) -> int:
        """How many items no waiting task has been told of."""
        return len(self._items) - self._told_receivers

    @property
    def waiting_receivers(self) -> int:
        """Tasks that wait in `get` and haven't been told of an item yet."""
        return len(self._receivers)

    async def wait_room(self, size: int = 1) -> None:
        """Wait until an item of ``size`` bytes fits and nobody waits in `put`.

        It reserves nothing: the room is there until this task awaits something else. Those who wait
        are woken one after the other as long as there is room. Who calls this because `put_nowait`
        raised `~anyio.WouldBlock` must give the same size, or waits for less than it needs.

        :raises ClosedResourceError: if the queue is closed (or the reason)
        """
        await self._checkpoint()
        if self._has_room(size):
            return
        turn = Event()
        self._room_waiters[turn] = size
        try:
            while True:
                await turn.wait()
                if self._has_room(size):
                    return
                # Somebody else took the room. Only the first is woken, so it is the first again.
                del self._room_waiters[turn]
                turn = Event()
                self._room_waiters[turn] = size
                self._room_waiters.move_to_end(turn, last=False)
        finally:
            del self._room_waiters[turn]
            self._notify_senders()

    def _has_room(self, size: int) -> bool:
        if self._reason is not None or size < 0:
            self._refuse(size)
        return not self._putters and self._fits(size)

    def _notify_senders(self) -> None:
        for turn, size in (self._putters or self._room_waiters).items():
            if self._fits(size):
                turn.set()
            return

    async def _checkpoint(self) -> None:
        self._operations += 1
        if self._operations % _YIELD_EVERY:
            await checkpoint_if_cancelled()
        else:
            await checkpoint()

    # Closing

    def close(self, reason: Exception | None = None, *, discard: bool = False) -> None:
        """Close the queue and wake everybody.

        Senders fail at once; receivers get what is queued first. Calling it again changes nothing,
        except that ``discard`` still empties the queue.

        :param reason: what is raised from now on, as a copy each time, instead of
            `~anyio.ClosedResourceError`
        :param discard: whether what is queued is thrown away; it doesn't count as dropped
        """
        if self._reason is None:
            self._reason = ClosedResourceError() if reason is None else reason
        if discard:
            self._items.clear()
            self._bytes = 0
        self._told_receivers += len(self._receivers)
        for turn in (*self._receivers, *self._putters, *self._room_waiters):
            turn.set()
        self._receivers.clear()

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
            waiting_senders=len(self._putters) + len(self._room_waiters),
        )
