"""What transports that keep the items of calls with keys have in common: positions, and how much is
kept.

A position is ``epoch-number``. The epoch is another one for each attempt at a call, and greater
than those before; the number of the first item is 1.
"""

from __future__ import annotations

import logging
from collections import deque

from msgspec import Struct

from .._exceptions import DeliveryError, OverloadedError, StreamRestartedError
from .._runtime._log import quoted
from ..abc import ItemBounds

__all__ = (
    "Left",
    "Position",
    "Unread",
    "Window",
    "check_left",
    "no_stream",
    "parse_position",
    "restarted",
)

logger = logging.getLogger("anyio_kkrpc")

# Parts of what may be kept after which a reader is to tell how far it has come.
_PARTS = 4
_MOST_DIGITS = 18
# What waits of a call though its handler didn't wait for it: items, and bytes of them.
_MOST_LEFT, _LARGE_LEFT = 128, 1024 * 1024


class Position(Struct, frozen=True, order=True):
    """Where an item stands."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"


def parse_position(after: object) -> Position | None:
    """Return the position behind which somebody wants to read; ``None`` for the beginning.

    :raises TypeError: if it is no text
    :raises ValueError: if it can't be one
    """
    if after is None:
        return None
    if not isinstance(after, str):
        raise TypeError(f"after: needs the position of an item, not {after!r:.80}")
    epoch, _, number = after.partition("-")
    for part in (epoch, number):
        if not (part.isascii() and part.isdigit() and len(part) <= _MOST_DIGITS):
            raise ValueError(f"after: {after!r:.80} is no position of an item")
    return Position(int(epoch), int(number))


def restarted(key: str) -> StreamRestartedError:
    """Return the error of who has read what isn't part of a stream any more."""
    return StreamRestartedError(f"the stream of the call with the key {quoted(key)} was begun anew")


def no_stream(key: str) -> DeliveryError:
    """Return the error of who reads items that a call has not, or has no more."""
    return DeliveryError(
        f"the call with the key {quoted(key)} has ended, and no items of it are there: its result "
        "is no stream, or the server has lost them"
    )


def check_left(items: int, size: int) -> None:
    """Check that a handler may leave the wait for one more item, which is kept all the same.

    :param items: how many it has left since it waited for one
    :param size: bytes of them
    :raises OverloadedError: if that is too much
    """
    if items >= _MOST_LEFT or size >= _LARGE_LEFT:
        raise OverloadedError(
            f"there is no room for the items of the call, and the handler has left {items} times "
            "what it waited in"
        )


class Left:
    """Counts what a handler has left the wait for since it waited for an item."""

    def __init__(self) -> None:
        self._items = self._size = 0

    def take(self, size: int) -> None:
        """Note one more item, of so many bytes, until it was waited for; see `check_left`."""
        check_left(self._items, self._size)
        self._items += 1
        self._size += size

    def waited(self) -> None:
        """Note that the handler has waited."""
        self._items = self._size = 0


class _Mark(Struct, frozen=True):
    """A number, with all items and bytes up to that item."""

    number: int
    items: int
    size: int


class Window:
    """How much is kept of one stream, and what may be removed for more. It has no clock.

    Each time that a part of what may be kept has been added, an item is marked, and so is the last
    one that there is room for. Of what is oldest, as much as is before one mark may go once
    somebody has read beyond that.

    :ivar number: of the last item
    :ivar read_to: number of the last one that somebody has read, as far as that is known
    :ivar unread: how many are gone that nobody is known to have read
    """

    def __init__(self, bounds: ItemBounds) -> None:
        self._most_items, self._most_bytes = bounds.keep_items, bounds.keep_bytes
        self.number = self.unread = 0
        self._items = self._size = 0
        self._gone = _Mark(0, 0, 0)
        self._marks: deque[_Mark] = deque()
        self.read_to = 0

    def begin(self, number: int, items: int) -> None:
        """Note how many are kept already; their bytes aren't known, and don't count.

        :param number: of the last one
        """
        self.number, self._items = number, items
        if items:
            self._marks.append(_Mark(number, items, 0))

    def add(self, size: int) -> bool:
        """Note that one more is kept; return whether who reads it is to tell."""
        self.number += 1
        self._items += 1
        self._size += size
        last = self._marks[-1] if self._marks else self._gone
        most = self._most_items
        if (
            (most is None or (self._items - last.items) * _PARTS < most)
            and (self._size - last.size) * _PARTS < self._most_bytes
            and not self.full
        ):
            return False
        self._marks.append(_Mark(self.number, self._items, self._size))
        return True

    @property
    def full(self) -> bool:
        """Whether there is no room for another one."""
        most, gone = self._most_items, self._gone
        return (most is not None and self._items - gone.items >= most) or (
            self._size - gone.size >= self._most_bytes
        )

    def read(self, number: int) -> None:
        """Note that somebody has read up to an item."""
        self.read_to = max(self.read_to, min(number, self.number))

    def make_room(self, *, unread: bool = False) -> int:
        """Remove what is oldest, as far as it has to go and may.

        :param unread: whether it may go though nobody has read it
        :return: the number of the last item that is gone
        """
        marks = self._marks
        while self.full and marks:
            number = marks[0].number
            if not (unread or number < self.read_to or self.read_to == self.number):
                break
            mark = marks.popleft()
            self.unread += min(mark.items - self._gone.items, max(number - self.read_to, 0))
            self._gone = mark
        return self._gone.number


class Unread:
    """Counts what went of calls though nobody is known to have read it, as ``when_unread`` has it.

    :ivar count: how many items
    """

    def __init__(self) -> None:
        self.count = 0

    def make_room(self, window: Window, key: str) -> int:
        """Have a window make room, read or not; log the first of a stream that goes unread.

        :return: the number of the last item that is gone
        """
        before = window.unread
        gone = window.make_room(unread=True)
        self.count += window.unread - before
        if window.unread and not before:
            logger.warning(
                "items of the call with the key %s go to make room for more, and nobody has read "
                "them: when_unread",
                quoted(key),
            )
        return gone
