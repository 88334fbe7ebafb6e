"""Large requests: they wait as they came, and are decoded when their handlers begin.

Decoded, a request may weigh many times its bytes. So what runs is bounded by weight: one that
finds no room is put aside until others have finished, and smaller ones pass it. One alone always
has room, and so has one for each handler that waits for a call of its own, which might be for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from anyio import Event
from msgspec import UNSET

from ...abc import Envelope
from ...records import Record, Request
from ..dialects import Entry, LargeEntry


class LargeRequest(Envelope):
    """A request whose arguments were left out.

    :ivar fields: its entry
    :ivar weight: what it weighs decoded, in bytes
    """

    fields: list[bytes] = []  # noqa: RUF012 - msgspec makes a new one each time
    weight: int = 0

    def leave_out(self, entry: Entry) -> None:
        """Take what is needed to begin from the entry."""
        assert isinstance(entry, LargeEntry)
        self.fields, self.weight = entry.left_out, entry.weight

    @property
    def size(self) -> int:
        """The bytes of its entry, as long as it waits."""
        return sum(map(len, self.fields))


class LargeRequests:
    """Those that run, by their weight, and those that were put aside.

    :param limit: what those that run may weigh together, and what is aside may have in bytes
    :param decode: returns the record of an entry
    :ivar aside: those that wait for room
    :ivar bytes_aside: their bytes
    :ivar lent: how many handlers wait for calls of their own
    """

    def __init__(self, limit: int, decode: Callable[[list[bytes]], Record]) -> None:
        self._limit = limit
        self._decode = decode
        # By their ids, which are theirs as long as they are here.
        self._running: dict[int, LargeRequest] = {}
        self._weight = 0
        self.bytes_aside = 0
        self._room: Event | None = None
        self.aside: deque[LargeRequest] = deque()
        self.lent = 0

    def begin(self, request: LargeRequest) -> bool:
        """Decode a request, if it has room; return false if it was put aside.

        :raises Exception: what decoding it raises
        """
        if not self._fits(request.weight):
            self.aside.append(request)
            self.bytes_aside += request.size
            return False
        request.record = self._decode(request.fields)
        request.fields = []
        self._running[id(request)] = request
        self._weight += request.weight
        return True

    def next(self) -> LargeRequest | None:
        """Take the first that was put aside, if it has room now."""
        if not self.aside or not self._fits(self.aside[0].weight):
            return None
        request = self.aside.popleft()
        self.bytes_aside -= request.size
        return request

    @property
    def crowded(self) -> bool:
        """Whether so much is aside that nothing else is to be taken."""
        return self.bytes_aside >= self._limit

    async def wait(self) -> None:
        """Wait until one has finished, or what was aside is forgotten."""
        self._room = self._room or Event()
        await self._room.wait()

    def end(self, request: Envelope) -> None:
        """Note that one has finished: its arguments go, whoever still has the envelope."""
        begun = self._running.pop(id(request), None)
        if begun is not None:
            self._weight -= begun.weight
        record = request.record
        if isinstance(record, Request):
            record.a = record.k = UNSET
            record.v = UNSET
        self._notify()

    def forget(self, chosen: Callable[[Envelope], bool]) -> list[Envelope]:
        """Forget those that are aside and are chosen; return them."""
        forgotten: list[Envelope] = [request for request in self.aside if chosen(request)]
        self.aside = deque(request for request in self.aside if not chosen(request))
        self.bytes_aside = sum(request.size for request in self.aside)
        self._notify()
        return forgotten

    def forget_begun(self) -> None:
        """Note that those that run are nobody's any more."""
        self._running.clear()
        self._weight = 0
        self._notify()

    def lend(self, change: int) -> None:
        """Note that more handlers wait for calls of their own, or fewer."""
        self.lent += change
        self._notify()

    def _fits(self, weight: int) -> bool:
        return len(self._running) <= self.lent or self._weight + weight <= self._limit

    def _notify(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None
