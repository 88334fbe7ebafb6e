"""How many entries a worker may take."""

from __future__ import annotations

from collections.abc import Callable, Sized

from anyio import Event

__all__ = ("Room", "SharedRoom")


class Room:
    """What limits how many entries are taken, and who waits for more.

    :param held: what is held
    :param queue_room: how many more entries the queue takes
    :ivar limit: how many entries may be held at a time, 0 for any number
    :ivar wanted: set once there may be room, if somebody waits for that
    """

    def __init__(self, held: Sized, queue_room: Callable[[], int]) -> None:
        self._held = held
        self._queue_room = queue_room
        self.limit = 0
        self.wanted: Event | None = None

    def set_limit(self, limit: int) -> None:
        """Note how many may be held from now on, 0 for any number."""
        self.limit = limit
        if limit:
            self.notify()

    def lend(self, change: int) -> None:
        """Note that more may be held for a while, or fewer again."""
        self.limit += change
        self.notify()

    def now(self) -> int:
        """Return how many entries may be taken now."""
        room = self._queue_room()
        return min(room, self.limit - len(self._held)) if self.limit else room

    async def wait(self) -> int:
        """Return how many entries may be taken now, once that is at least one."""
        while (room := self.now()) <= 0:
            wanted = self.wanted = self.wanted or Event()  # several may wait
            await wanted.wait()
        return room

    def notify(self) -> None:
        """Note that there may be room."""
        if self.wanted is not None:
            self.wanted.set()
            self.wanted = None


class SharedRoom(Room):
    """The room of one worker that takes from several streams.

    Each read asks for its share of it, and for one at least. So what is taken by reads that were
    all answered at once is no more than there was room for, but for one of each stream.

    :param queue_room: how many more entries the queue takes
    :param shares: of how many streams entries are read
    """

    def __init__(self, queue_room: Callable[[], int], shares: int) -> None:
        self._parts = _Parts()
        super().__init__(self._parts, queue_room)
        self._shares = shares

    def holding(self, held: Sized) -> SharedRoom:
        """Return it, also for what is held of one more stream."""
        self._parts.append(held)
        return self

    def now(self) -> int:
        """Return how many entries one read may take now."""
        room = super().now()
        return -(-room // self._shares) if room > 0 else room


class _Parts(list[Sized]):
    """What is held of several streams, and has the length of all of it."""

    def __len__(self) -> int:
        return sum(len(part) for part in self)
