"""Which items of an attempt are written when, and how far its handler may run ahead of who reads.

One entry is on its way at a time; what is yielded meanwhile goes into the next one, so that a
handler in a hurry makes few large ones, and one that isn't has each written at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from anyio import Event, current_time, move_on_after, sleep_forever
from msgspec import Struct

from ..._exceptions import OverloadedError
from ...abc import ItemBounds
from ...kit._items import Left, Window
from ._entries import pack_id

__all__ = ("Batch", "Pacer")

# Items of one entry, and bytes after which it takes no more.
_MOST, _LARGE = 128, 16 * 1024


class Batch(Struct):
    """What one entry is to hold.

    :ivar number: of its last item
    :ivar closed: whether it takes no more
    :ivar marked: whether who reads it is to tell
    :ivar gone: the first id that is kept still, if what is before is to go
    """

    number: int
    fields: list[bytes]
    size: int = 0
    closed: bool = False
    marked: bool = False
    gone: bytes = b""


class Pacer:
    """Decides which items of one attempt are written when.

    :param place: where they are kept
    :param bounds: how much is kept
    :param keep: milliseconds for which Redis is to keep it while more may come
    :param write: writes what is on its way
    :param cancel: cancels the call
    :param catch_up: waits until all has come here that Redis had for this worker
    :param drop: makes room in a window, read or not; see `Unread.make_room`
    :ivar window: what is kept
    :ivar sent: what is on its way
    :ivar error: why nothing more can be written
    :ivar closed: whether the end is told
    :ivar caught_up: set by `read` with 0, which `catch_up` has itself told
    """

    def __init__(
        self,
        place: bytes,
        epoch: int,
        bounds: ItemBounds,
        keep: int,
        write: Callable[[Pacer, Batch], object],
        cancel: Callable[[], object],
        catch_up: Callable[[Pacer], Awaitable[None]],
        drop: Callable[[Window], int],
    ) -> None:
        self.place = place
        self.epoch = epoch
        self.keep = keep
        self.window = Window(bounds)
        self.error: Exception | None = None
        self.closed = False
        self._left = Left()
        self.renewed_at = current_time()
        self._bounds = bounds
        self._write = write
        self._cancel = cancel
        self._catch_up = catch_up
        self.caught_up = Event()
        self._drop = drop
        self._waiting: deque[Batch] = deque()
        self.sent: Batch | None = None
        self._written = self._removed = 0
        self._gone = b""
        self._news = Event()

    def begin(self, behind: int, first: int) -> None:
        """Note what was kept when this attempt began.

        :param behind: number of the item behind which it goes on
        :param first: number of the first item that is kept
        """
        self._written = behind
        self.window.begin(behind, behind - first + 1 if behind else 0)

    async def put(self, field: tuple[bytes, bytes]) -> None:
        """Write an item, once there is room for it; if this is cancelled, all the same.

        :raises OverloadedError: if that has happened too often, and none was waited for since
        """
        self._check()
        try:
            self._left.take(len(field[1]))
        except OverloadedError as exc:
            self.fail(exc)
            raise
        try:
            if self.window.full:
                await self._make_room()
        finally:
            self._add(field)  # who is cancelled there has yielded it
        while self.error is None and len(self._waiting) > 1:
            await self._wait()
        self._left.waited()
        self._check()

    async def flush(self) -> None:
        """Wait until all is written."""
        while self.error is None and (self._waiting or self.sent is not None):
            await self._wait()
        self._check()

    def read(self, number: int) -> None:
        """Note that somebody has read up to an item."""
        if not number:
            self.caught_up.set()
        self.window.read(number)
        self._tell()

    def fail(self, error: Exception) -> None:
        """Write nothing more."""
        if self.error is None:
            self.error = error
            self._tell()

    def written(self) -> None:
        """Note that what was on its way is written."""
        self.sent = None
        self._go_on()
        self._tell()

    def close(self) -> bytes:
        """Leave out what isn't on its way; return the id of the end."""
        self._waiting.clear()
        self.closed = True
        return pack_id(self.epoch, self._written + 1)

    def _add(self, field: tuple[bytes, bytes]) -> None:
        batch = self._waiting[-1] if self._waiting else None
        if batch is None or batch.closed:
            batch = Batch(0, [])
            self._waiting.append(batch)
        size = len(field[1])
        batch.fields += field
        batch.size += size
        batch.marked = self.window.add(size)
        batch.number = self.window.number
        batch.closed = batch.marked or batch.size >= _LARGE or len(batch.fields) >= 2 * _MOST
        self._go_on()

    def _go_on(self) -> None:
        if self.sent is None and self._waiting and self.error is None:
            self.sent = batch = self._waiting.popleft()
            self._written = batch.number
            batch.gone, self._gone = self._gone, b""
            self._write(self, batch)

    async def _make_room(self) -> None:
        """Remove what is oldest, once somebody has read beyond that."""
        window, bounds = self.window, self._bounds
        unread = bounds.when_unread
        if unread == "go on":
            self._remove(self._drop(window))
            return
        seconds = bounds.unread_timeout if unread == "cancel" else None
        while True:
            known = window.read_to
            with move_on_after(seconds):
                await self._wait_for_room()
                return
            await self._catch_up(self)  # words may be on their way, or the connection is lost
            if window.read_to == known and self.error is None:
                break
        self._cancel()
        await sleep_forever()

    async def _wait_for_room(self) -> None:
        while self.error is None:
            self._remove(self.window.make_room())
            if not self.window.full:
                return
            await self._wait()

    def _remove(self, number: int) -> None:
        if number > self._removed:  # an earlier attempt goes as a whole
            self._removed = number
            self._gone = pack_id(self.epoch, number + 1)

    async def _wait(self) -> None:
        if self._news.is_set():
            self._news = Event()
        await self._news.wait()

    def _tell(self) -> None:
        self._news.set()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
