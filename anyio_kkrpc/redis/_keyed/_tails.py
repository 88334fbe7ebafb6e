"""Who reads items and has all that is there waits here for more.

One connection waits for up to 64 streams at once, and what comes is handed to all who wait for it.
Who doesn't take it in time has to ask again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from anyio import Event, create_task_group, move_on_after
from msgspec import Struct

from ..._runtime._bell import Bell
from ...kit._items import Position
from .._connection._command import pack
from .._connection._errors import Meaning, RedisError, meaning_of
from .._connection._link import Link
from .._connection._patience import Outages, Patience
from .._connection._portion import ReadPortion
from .._connection._resp import Connection
from .._connection._role import Silence
from .._stream._scripts import add_briefly
from ._entries import parse_id
from ._item_scripts import SOME

__all__ = ("LARGE_PAGE", "PAGE", "Entry", "Feed", "Read", "Tails", "next_count")

# Entries that are asked for at a time, and bytes of them after which there are no more.
PAGE = 100
LARGE_PAGE = 256 * 1024
# The same of what waits for one who reads slowly.
_MOST_WAITING = 200
_MOST_BYTES = 256 * 1024
# Streams that one connection waits for.
_STREAMS = 64
# Milliseconds for which the key lives that ends a wait.
_WAKE_MS = b"60000"

Entry = tuple[bytes, list[bytes]]


def size_of(entries: list[Entry]) -> int:
    """Return how many bytes some entries have."""
    return sum(len(field) for _, fields in entries for field in fields)


def next_count(count: int, found: list[list[Entry]]) -> int:
    """Return how many entries of each stream to ask for, as large as those were that came now.

    :param count: how many were asked for
    """
    largest = max((size_of(entries) / len(entries) for entries in found), default=0)
    return max(1, min(PAGE, 2 * count, int(LARGE_PAGE / largest) if largest else PAGE))


class Feed(Struct, eq=False):
    """What has come for one who reads.

    :ivar waiting: entries that he has yet to take
    :ivar size: bytes of them
    :ivar behind: whether more has come that wasn't put there
    :ivar error: why nothing more comes
    :ivar news: set when something has come
    """

    place: bytes
    waiting: list[Entry] = []
    size: int = 0
    behind: bool = False
    error: Exception | None = None
    news: Event | None = None

    def put(self, entries: list[Entry]) -> None:
        """Have him take entries, if he isn't too slow."""
        if not self.behind:
            if len(self.waiting) >= _MOST_WAITING or self.size >= _MOST_BYTES:
                self.behind = True
            else:
                self.waiting += entries
                self.size += size_of(entries)
        self.tell()

    def fall_behind(self) -> None:
        """Have him ask again."""
        self.behind = True
        self.tell()

    def tell(self) -> None:
        """Wake him."""
        if self.news is not None:
            self.news.set()

    def take(self) -> list[Entry]:
        """Return what has come."""
        taken, self.waiting, self.size = self.waiting, [], 0
        return taken

    async def wait(self, seconds: float) -> None:
        """Wait until something has come, so long at most."""
        if not self.waiting and not self.behind:
            self.news = Event()
            with move_on_after(seconds):
                await self.news.wait()
            self.news = None


class _Tail(Struct, eq=False):
    """The end of one stream: behind which entry more is waited for, and who does so."""

    cursor: Position
    feeds: list[Feed]


class _Waiting:
    """Waits for more of up to 64 streams, on one connection after the other."""

    def __init__(self, wake: bytes, block: bytes, silence: Silence) -> None:
        self.tails: dict[bytes, _Tail] = {}
        self._silence = silence
        self._wake = wake
        self._woken = b"0-0"
        self._block = block
        self._count = SOME
        self._wanted = Event()
        self.blocked = False

    def add(self, place: bytes, tail: _Tail) -> None:
        """Wait for one more."""
        self.tails[place] = tail
        self._wanted.set()

    def lose(self, error: Exception | None = None) -> None:
        """Have all who wait ask again, or give up."""
        for tail in self.tails.values():
            for feed in tail.feeds:
                feed.error = error
                feed.fall_behind()
        self.tails.clear()

    async def wait_wanted(self) -> None:
        """Wait until somebody waits."""
        while not self.tails:
            self._wanted = Event()
            await self._wanted.wait()

    async def read(self, connection: Connection, portion: ReadPortion) -> None:
        """Wait, again and again, and hand on what comes."""
        connection.silence = self._silence(connection.role)
        try:
            while True:
                await self.wait_wanted()
                await self._read(connection)
        except RedisError as exc:
            if meaning_of(exc) is not Meaning.RIGHTS:
                raise
            self.lose(exc)  # who may not read is told, and no other
        finally:
            self.blocked = False
            self.lose()

    async def _read(self, connection: Connection) -> None:
        tails = dict(self.tails)
        cursors = [str(tail.cursor).encode() for tail in tails.values()]
        self.blocked = True
        reply = await connection.execute(
            *(b"XREAD", b"COUNT", b"%d" % self._count, b"BLOCK", self._block, b"STREAMS"),
            *(self._wake, *tails, self._woken, *cursors),
        )
        self.blocked = False
        self._count = next_count(self._count, [entries for _, entries in reply or ()])
        for place, entries in reply or ():
            if place == self._wake:
                self._woken = entries[-1][0]
                continue
            tail = self.tails.get(place)
            if tail is not None and tail is tails[place]:
                tail.cursor = parse_id(entries[-1][0])
                for feed in tail.feeds:
                    feed.put(entries)
        for place, tail in tails.items():
            tail.feeds = [feed for feed in tail.feeds if not feed.behind]
            if not tail.feeds and self.tails.get(place) is tail:
                del self.tails[place]


Read = Callable[[Connection, ReadPortion], Awaitable[None]]


class Tails:
    """Waits for what comes. `run` must run beside it.

    :param read_on: reads on one connection after the other; see `ReadLoop.run`
    :param wake: the key that ends a wait
    :param block: seconds that a wait lasts at most
    :param silence: returns that of a connection, as its server's role wants it
    :ivar ended: why nobody is to wait any more
    :ivar bell: set once there is something for `run` to do
    """

    def __init__(
        self,
        link: Link,
        outages: Outages,
        read_on: Callable[[str, Read, Patience], Awaitable[None]],
        wake: bytes,
        block: float,
        silence: Silence,
    ) -> None:
        self._link = link
        self._outages = outages
        self._read_on = read_on
        self._wake = wake
        self._block = b"%d" % max(round(block * 1000), 1)
        self._silence = silence
        self._all: list[_Waiting] = []
        self._new: list[_Waiting] = []
        self.bell = Bell()
        self.ended: Exception | None = None

    async def run(self) -> None:
        """Wait on as many connections as it takes. Goes on for ever."""
        async with create_task_group() as group:
            while True:
                await self.bell.wait()
                self.bell.clear()
                while self._new:
                    group.start_soon(self._wait, self._new.pop(), name="anyio_kkrpc redis items")

    async def _wait(self, waiting: _Waiting) -> None:
        await waiting.wait_wanted()
        patience = Patience("reading items", self._outages, spare=True)
        await self._read_on("items", waiting.read, patience)

    def join(self, place: bytes, cursor: Position) -> Feed | None:
        """Return what more of a stream comes to, for one who has all up to an entry.

        :return: ``None`` if there is more already
        """
        for waiting in self._all:
            tail = waiting.tails.get(place)
            if tail is not None:
                if tail.cursor > cursor:
                    return None
                feed = Feed(place)
                tail.feeds.append(feed)
                return feed
        feed = Feed(place)
        waiting = self._one_with_room()
        waiting.add(place, _Tail(cursor, [feed]))
        if waiting.blocked:
            self._end_wait(waiting)
        return feed

    def leave(self, feed: Feed) -> None:
        """Note that nobody takes what comes any more."""
        feed.behind = True
        for waiting in self._all:
            tail = waiting.tails.get(feed.place)
            if tail is not None and feed in tail.feeds:
                tail.feeds.remove(feed)
                if not tail.feeds:
                    del waiting.tails[feed.place]

    def end(self, reason: Exception) -> None:
        """Let nobody wait any more."""
        self.ended = reason
        for waiting in self._all:
            waiting.lose()

    def _one_with_room(self) -> _Waiting:
        for waiting in self._all:
            if len(waiting.tails) < _STREAMS:
                return waiting
        waiting = _Waiting(self._wake, self._block, self._silence)
        self._all.append(waiting)
        self._new.append(waiting)
        self.bell.set()
        return waiting

    def _end_wait(self, waiting: _Waiting) -> None:
        """End its wait, so that it waits for the new one too. If this is lost, it does so soon."""
        connection = self._link.connection
        if connection is not None and connection.error is None:
            waiting.blocked = False  # once is enough
            entry = (b"MAXLEN", b"1", b"*", b"hint", b"wake")
            connection.post(pack(add_briefly(self._wake, _WAKE_MS, *entry)))
            connection.flush_nowait()
