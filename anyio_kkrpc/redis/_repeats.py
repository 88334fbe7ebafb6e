"""What came before: entries that their senders wrote twice, because a connection was lost.

What isn't a request to the stream has a number, ``epoch.count``. A sender writes again what Redis
refused for now, and so may write a lesser number behind a greater one. In an epoch that has a ``+``
the counts for one key have no gaps, hence a reader knows what is missing, and takes it late. In
others, which versions before this one write, what isn't greater than the last one came before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from math import inf

from msgspec import Struct

__all__ = ("Repeats",)

# Bytes of a number.
_MAX_NUMBER = 40
# Senders that are remembered.
_SENDERS = 4096
# Gaps that are remembered, of one sender and of all.
_GAPS_OF_ONE = 16_384
_GAPS = 65_536


class _Counts(Struct, eq=False):
    """What came of one epoch.

    :ivar last: the greatest count
    :ivar missing: the first and the last count of each gap below it
    :ivar other: of the epoch of the same sender that was written in before
    """

    epoch: bytes
    gapless: bool
    last: int
    missing: list[tuple[int, int]]
    other: _Counts | None = None


class Repeats:
    """Recognizes what came before.

    :ivar dropped: how many entries came before
    """

    def __init__(self) -> None:
        self._senders: OrderedDict[tuple[bytes, str], _Counts] = OrderedDict()
        self._incomplete: OrderedDict[_Counts, None] = OrderedDict()
        self._gaps = 0
        self.dropped = 0

    def came_before(self, stream: bytes, sender: str, number: bytes) -> bool:
        """Note that an entry with a number came; return whether it had come already."""
        epoch, _, text = number.partition(b".")
        if not text.isdigit() or len(text) > 18 or len(number) > _MAX_NUMBER:
            return False
        count = int(text)
        counts = self._senders.get((stream, sender))
        if counts is None or counts.epoch != epoch:
            counts = self._turn_to((stream, sender), counts, epoch, count)
        if count > counts.last:
            if counts.gapless and count != counts.last + 1:
                self._miss(counts, counts.last + 1, count - 1)
            counts.last = count
            return False
        if counts.missing and self._fill(counts, count):
            return False
        self.dropped += 1
        return True

    def _turn_to(
        self, key: tuple[bytes, str], counts: _Counts | None, epoch: bytes, count: int
    ) -> _Counts:
        """Return what came of an epoch that isn't the one before."""
        if counts is None and len(self._senders) >= _SENDERS:
            _, forgotten = self._senders.popitem(last=False)
            self._forget(forgotten)
            self._forget(forgotten.other)
        other = None if counts is None else counts.other
        if counts is not None:
            counts.other = None
        if other is None or other.epoch != epoch:
            self._forget(other)
            gapless = b"+" in epoch
            other = _Counts(epoch, gapless, 0 if gapless else count - 1, [])
        other.other = counts
        self._senders[key] = other
        return other

    def _miss(self, counts: _Counts, first: int, last: int) -> None:
        missing = counts.missing
        missing.append((first, last))
        self._gaps += 1
        if len(missing) > _GAPS_OF_ONE:
            del missing[0]
            self._gaps -= 1
        self._incomplete[counts] = None
        while self._gaps > _GAPS:
            self._forget(next(iter(self._incomplete)))

    def _fill(self, counts: _Counts, count: int) -> bool:
        """Note that what was missing came; return false if it wasn't missing."""
        missing = counts.missing
        at = bisect_right(missing, (count, inf)) - 1
        if at < 0 or count > missing[at][1]:
            return False
        first, last = missing[at]
        rest = [(first, count - 1), (count + 1, last)]
        missing[at : at + 1] = rest = [gap for gap in rest if gap[0] <= gap[1]]
        self._gaps += len(rest) - 1
        if not missing:
            del self._incomplete[counts]
        return True

    def _forget(self, counts: _Counts | None) -> None:
        """Forget what is missing of an epoch."""
        if counts is not None and counts.missing:
            self._gaps -= len(counts.missing)
            counts.missing.clear()
            del self._incomplete[counts]
