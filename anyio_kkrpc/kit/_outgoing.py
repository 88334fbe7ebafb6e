"""What is written by many tasks, in order: who comes first writes, and takes the others along."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import final

from anyio import CancelScope, Event, move_on_after
from anyio.abc import TaskGroup

__all__ = ("Outgoing",)

# Bytes that wait for a write under way before those who add more wait too; and of one write, as
# soon as it has more than one message.
HIGH_WATER = 1024 * 1024


@final
class Outgoing:
    """Writes messages, several at once where one write can take them.

    Whoever has something to write writes at once, unless a write is under way, whose task then
    takes it along. A message is never torn: a sender that is cancelled finishes its write first.
    While 1 MiB waits, senders wait too. The write that fails is the last one, since how much of it
    was done isn't known.

    :param write: writes messages, in their order; it is called by one task at a time
    :param failed: called when a write has failed, with what it raised; must not wait, and sees to
        it that nothing is added any more
    :param timeout: seconds that one write may take
    :ivar sent: messages that were taken
    :ivar posted: bytes that wait of those for which nobody waits; its owner bounds them
    """

    def __init__(
        self,
        write: Callable[[list[bytes]], Awaitable[object]],
        failed: Callable[[BaseException], Awaitable[object]],
        *,
        timeout: float = 10.0,
    ) -> None:
        self._write = write
        self._failed = failed
        self._timeout = timeout
        self._waiting: list[bytes] = []
        # Places and sizes of those that were posted, and how many have left before them.
        self._posts: deque[tuple[int, int]] = deque()
        self._left = 0
        self._size = 0
        self._writing = False
        self._handed_over = Event()
        self._room: Event | None = None
        self._scope: CancelScope | None = None
        self.sent: int = 0
        self.posted: int = 0

    def start(self, tasks: TaskGroup, name: str) -> None:
        """Start the task that writes what nobody else writes. It runs until `stop`, also where the
        scope around it is cancelled.

        :param name: of the task
        """
        self._scope = CancelScope(shield=True)
        tasks.start_soon(self._go_on, self._scope, name=name)

    async def send(self, message: bytes) -> None:
        """Write a message, or leave it to the write under way; wait while there is too much."""
        self.sent += 1
        self._size += len(message)
        if self._writing:
            self._waiting.append(message)
        else:
            self._writing = True
            await self._write_some([message], len(message))
            if self._waiting:
                self._handed_over.set()
            else:
                self._writing = False
        while self._size > HIGH_WATER:
            await self._change()

    def post(self, message: bytes) -> None:
        """Have a message written by the task, for a caller that must not wait, such as a reader."""
        self.sent += 1
        self._size += len(message)
        self._posts.append((self._left + len(self._waiting), len(message)))
        self.posted += len(message)
        self._waiting.append(message)
        if not self._writing:
            self._writing = True
            self._handed_over.set()

    async def drain(self) -> None:
        """Wait until all is written, or was forgotten."""
        while self._writing:
            await self._change()

    def clear(self) -> None:
        """Forget what waits, and let those go on who wait for room: nothing can be written."""
        self._waiting.clear()
        self._posts.clear()
        self._size = self.posted = 0
        self._notify()

    def stop(self) -> None:
        """End the task."""
        if self._scope is not None:
            self._scope.cancel()

    async def _write_some(self, messages: list[bytes], size: int) -> None:
        try:
            with move_on_after(self._timeout, shield=True) as scope:
                await self._write(messages)
            if scope.cancelled_caught:
                raise TimeoutError(f"it took no data for {self._timeout:g} seconds")
            self._size -= size
            if self._room is not None:
                self._notify()
        except BaseException as exc:
            await self._failed(exc)
            if not isinstance(exc, Exception):
                raise

    def _next(self) -> tuple[list[bytes], int]:
        size = count = 0
        for message in self._waiting:
            size += len(message)
            count += 1
            if size >= HIGH_WATER:
                break
        messages = self._waiting[:count]
        del self._waiting[:count]
        self._left += count
        while self._posts and self._posts[0][0] < self._left:
            self.posted -= self._posts.popleft()[1]
        return messages, size

    async def _go_on(self, scope: CancelScope) -> None:
        with scope:
            while True:
                await self._handed_over.wait()
                self._handed_over = Event()
                while self._waiting:
                    await self._write_some(*self._next())
                self._writing = False
                self._notify()

    async def _change(self) -> None:
        if self._room is None:
            self._room = Event()
        await self._room.wait()

    def _notify(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None
