"""What is for one peer, taken in the order in which each sender wrote it.

A sender writes again what Redis refused for a while, and what Redis took behind that has come then.
Such entries wait here for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from anyio import current_time, sleep

from ..._runtime._bell import Bell
from ..dialects import Entry
from ._repeats import PATIENCE, Repeats

__all__ = ("InOrder",)


class InOrder:
    """Hands entries on. `run` must run beside it.

    :param repeats: knows what is missing
    :param take: is given an entry's id and the entry
    :ivar bell: set once there is something for `run` to do
    """

    def __init__(self, repeats: Repeats, take: Callable[[bytes, Entry], object]) -> None:
        self._repeats = repeats
        self._take = take
        self.bell = Bell()

    def sort(self, stream: bytes, entry_id: bytes, entry: Entry, number: bytes) -> None:
        """Hand on an entry that came while something is missing, and what is next, or let it wait.

        :param number: the entry's
        """
        item = (entry_id, entry)
        self._sort(stream, entry.sender, number, item, entry.size)

    def skipped(self, stream: bytes, sender: str, numbers: Iterable[bytes]) -> None:
        """Note that records with these numbers could not be read: nothing waits for them."""
        for number in numbers:
            if self._repeats.came_before(stream, sender, number):
                continue
            if self._repeats.disorder:
                self._sort(stream, sender, number, None, 0)

    def _sort(
        self, stream: bytes, sender: str, number: bytes, item: tuple[bytes, Entry] | None, size: int
    ) -> None:
        ready = self._repeats.sort(stream, sender, number, item, size, current_time())
        self._hand_on(ready)
        self.bell.set()

    def _hand_on(self, items: list[tuple[bytes, Entry] | None]) -> None:
        for item in items:
            if item is not None:
                self._take(*item)

    async def run(self) -> None:
        """Hand on what waits for something that doesn't come."""
        while True:
            self.bell.clear()
            if not self._repeats.disorder:
                await self.bell.wait()
            await sleep(PATIENCE / 20)
            self._hand_on(self._repeats.overdue(current_time()))
