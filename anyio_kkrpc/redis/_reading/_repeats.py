"""What came before: entries that their senders wrote twice, because a connection was lost.

What isn't a request to the stream has a number, ``epoch.count``. A sender writes again what Redis
refused for now, and so may write a lesser number behind a greater one. In an epoch that has a ``+``
the counts for one key have no gaps, hence a reader knows what is missing, and takes it late. In
others, which versions before this one write, what isn't greater than the last one came before.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from heapq import heappop, heappush
from math import inf
from typing import Any

from msgspec import Struct

__all__ = ("PATIENCE", "Repeats")

logger = logging.getLogger("anyio_kkrpc")

# Bytes of a number, and digits of its count.
_MAX_NUMBER = 40
_MAX_COUNT = 18
# Seconds that what is missing is waited for. It was refused a moment ago, and if its sender lives,
# it tries again within a second.
PATIENCE = 5.0
# Bytes of entries that wait for that, of all senders; each counts for some more than it has.
_EARLY = 16 * 1024 * 1024
_OVERHEAD = 1024
# Senders that are remembered.
_SENDERS = 4096
# Gaps that are remembered, of one sender and of all.
_GAPS_OF_ONE = 16_384
_GAPS = 65_536


class _Counts(Struct, eq=False):
    """What came of one epoch.

    :ivar gapless: whether it counts without gaps
    :ivar in_order: whether what is behind a gap waits
    :ivar last: the greatest count
    :ivar missing: the first and the last count of each gap below it
    :ivar other: of the epoch of the same sender that was written in before
    :ivar given_up: up to which count nothing that is missing is waited for
    :ivar unsure: whether entries may have been lost, so that the next gap isn't waited for
    :ivar early: a heap of what came behind something that is missing and waited for: count, weight,
        and the entry
    """

    epoch: bytes
    gapless: bool
    in_order: bool
    last: int
    missing: list[tuple[int, int]]
    other: _Counts | None = None
    given_up: int = 0
    unsure: bool = False
    early: list[tuple[int, int, Any]] = []


class Repeats:
    """Recognizes what came before, and puts what came too early in its order.

    :param inbox: the key whose entries are put in order
    :ivar dropped: how many entries came before
    :ivar lost: how many were missing, and not waited for, since entries may have been lost
    :ivar disorder: the counts below which something is missing and waited for, with the time, on
        AnyIO's clock, up to when; ``None`` if that is not known yet
    """

    def __init__(self, inbox: bytes) -> None:
        self._inbox = inbox
        self._senders: OrderedDict[tuple[bytes, str], _Counts] = OrderedDict()
        self._incomplete: OrderedDict[_Counts, None] = OrderedDict()
        self._gaps = 0
        self._weight = 0
        self.dropped = self.lost = 0
        self.disorder: dict[_Counts, float | None] = {}

    def came_before(self, stream: bytes, sender: str, number: bytes) -> bool:
        """Note that an entry with a number came; return whether it had come already."""
        epoch, _, text = number.partition(b".")
        if not text.isdigit() or len(text) > _MAX_COUNT or len(number) > _MAX_NUMBER:
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

    def follow(self, stream: bytes, sender: str, number: bytes, many: int) -> bool:
        """Note that so many records came together, if all are new, and nothing is missing before
        them; return whether that is so. If not, `came_before` tells of each.

        :param number: the first one's
        """
        epoch, _, text = number.partition(b".")
        counts = self._senders.get((stream, sender))
        if counts is None or counts.epoch != epoch or self.disorder:
            return False
        if not text.isdigit() or len(text) > _MAX_COUNT or int(text) != counts.last + 1:
            return False
        counts.last += many
        return True

    def sort(
        self, stream: bytes, sender: str, number: bytes, item: Any, size: int, now: float
    ) -> list[Any]:
        """Return what may be handled after an entry came that hadn't come before, in order.

        :param item: the entry, in whatever form
        :param size: its bytes
        """
        counts = self._senders.get((stream, sender))
        epoch, _, text = number.partition(b".")
        if counts is None or counts.epoch != epoch:
            return [item]
        if not text.isdigit() or len(text) > _MAX_COUNT:
            return [item]
        ready = self._take_former(counts.other)
        if counts not in self.disorder:
            return [*ready, item]
        if self.disorder[counts] is None:
            self.disorder[counts] = now + PATIENCE
        heappush(counts.early, (int(text), size + _OVERHEAD, item))
        self._weight += size + _OVERHEAD
        if self._weight > _EARLY:
            counts.given_up = counts.last
        return ready + self._take_ready(counts)

    def overdue(self, now: float) -> list[Any]:
        """Return what has waited long enough for what is missing, in order."""
        ready = []
        for counts, until in list(self.disorder.items()):
            if until is not None and until <= now:
                counts.given_up = counts.last
                ready += self._take_ready(counts)
        return ready

    def lose(self) -> None:
        """Note that entries may have been lost: what is missing next may never come."""
        for (stream, _), counts in self._senders.items():
            if stream == self._inbox:
                counts.unsure = True

    def _take_former(self, counts: _Counts | None) -> list[Any]:
        """Take what waits in the epoch before, if it isn't to wait any more."""
        if counts is None or self.disorder.get(counts) != -inf:
            return []
        counts.given_up = counts.last
        return self._take_ready(counts)

    def _take_ready(self, counts: _Counts) -> list[Any]:
        """Take what nothing is waited for below."""
        at = bisect_right(counts.missing, (counts.given_up, inf))
        first = counts.missing[at][0] if at < len(counts.missing) else inf
        early, ready = counts.early, []
        while early and early[0][0] < first:
            _, weight, item = heappop(early)
            self._weight -= weight
            ready.append(item)
        if first == inf:
            del self.disorder[counts]
        return ready

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
            if counts in self.disorder:  # its sender leaves out what is missing
                self.disorder[counts] = -inf
        if other is None or other.epoch != epoch:
            self._forget(other)
            gapless = b"+" in epoch
            in_order = gapless and key[0] == self._inbox
            other = _Counts(epoch, gapless, in_order, 0 if gapless else count - 1, [])
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
        if counts.unsure:
            counts.given_up, counts.unsure = last, False
            self.lost += last - first + 1
            logger.warning(
                "%d entries that a peer wrote for this one are missing, and aren't waited for: "
                "another server may have lost them (%d so far)",
                last - first + 1,
                self.lost,
            )
        elif counts.in_order:
            self.disorder.setdefault(counts, None)
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
            if counts in self.disorder:
                self.disorder[counts] = -inf
