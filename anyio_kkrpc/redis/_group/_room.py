"""How many entries a worker may take."""

from __future__ import annotations

from collections.abc import Callable, Sized

from anyio import Event

__all__ = ("Room",)


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
