"""What was read and found no room in the queue: it waits here, in order, and has one owner.

With the policy ``block`` a reader hands over all that came together, and reads on once that is in
the queue. Several tasks read (new requests, those that are taken over), so several may wait; one of
them at a time lets in what is first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sized
from typing import Generic, TypeVar

from anyio import Lock

from ..._runtime._clock import checkpoints
from ...kit._queue import BoundedQueue

T = TypeVar("T")


class Intake(Generic[T]):
    """Where items wait for room in a queue. Nothing is awaited while one leaves it and enters the
    queue, so each is in one of the two.

    :ivar waiting: the items that wait, each with its size in bytes; to be looked at only
    """

    def __init__(self, queue: BoundedQueue[T]) -> None:
        self.waiting: deque[tuple[T, int]] = deque()
        self._queue = queue
        self._turn = Lock()

    def add(self, item: T, size: int) -> None:
        """Keep an item of ``size`` bytes until it has room."""
        self.waiting.append((item, size))

    def clear(self) -> int:
        """Forget what waits, because nobody wants it here any more; return how many that were."""
        count = len(self.waiting)
        self.waiting.clear()
        return count

    def extract(self, predicate: Callable[[T], bool]) -> list[T]:
        """Take out all items for which the predicate holds, in their order."""
        found = [one for one in self.waiting if predicate(one[0])]
        for one in found:
            self.waiting.remove(one)
        return [item for item, _ in found]

    async def wait(self) -> None:
        """Wait until nothing waits any more. If it is cancelled, the rest waits on.

        :raises ClosedResourceError: if the queue is closed (or the reason given then)
        """
        while self.waiting:
            async with self._turn:
                await self._let_in_first()

    async def _let_in_first(self) -> None:
        if not self.waiting:
            return
        first = self.waiting[0]
        item, size = first
        await self._queue.wait_room(size)
        # Meanwhile what waited may have been forgotten, and other things have come.
        if self.waiting and self.waiting[0] is first:
            self._queue.put_nowait(item, size)
            self.waiting.popleft()


def letting_others_run(untaken: Sized = (None,)) -> Callable[[], Awaitable[None]]:
    """Return what lets those who were just given something do their part before the next blocking
    read.

    What they write is then ahead of it, in Redis as well as here. Trio runs the tasks of one turn
    in any order, hence the second time.

    :param untaken: what they are given; once it is empty they have done what they do at once
    """
    checkpoint = checkpoints()

    async def let_others_run() -> None:
        await checkpoint()
        if untaken:
            await checkpoint()

    return let_others_run
