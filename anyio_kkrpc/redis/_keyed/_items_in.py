"""The readers' side of streams that are kept: any number of them, at any position.

Who reads asks for what is there, on the connection that all share. Who has all of it waits for
more, see `Tails`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

from msgspec import UNSET, Struct

from ..._runtime._fresh import fresh_copy
from ...abc import Envelope, Item, ItemsEnd, KeyedItems
from ...kit._items import Position, no_stream, parse_position
from ...kit._keyed import not_found, was_cancelled
from ...records import Reply
from .._connection._command import pack
from .._connection._link import Link
from .._stream._keys import Keys
from ._entries import Entries, Reader, epoch_of, parse_id
from ._item_scripts import READ, SOME
from ._items_out import ItemsOut, read_word
from ._kept import Kept, parse_kept
from ._script import ask_patiently, run_script
from ._tails import LARGE_PAGE, PAGE, Entry, Feed, Tails

__all__ = ("RedisItems",)

# Seconds that one waits before one looks whether the call is there still; at first, where the call
# may yet come to something that is no stream, twice as long each time.
LOOKS_AFTER = 5.0
_SOON = 0.1
_NOWHERE = Position(0, 0)


class _Page(Struct):
    """What is behind an entry.

    :ivar last: if that is nothing, the last entry that is there
    :ivar mark: who is to be told when that was read
    """

    known: Kept
    entries: list[Entry]
    last: Position
    mark: bytes


class RedisItems(KeyedItems):
    """Implements `KeyedItems` on one stream.

    :param out: writes those of calls that are served here
    :param kept: returns all that is kept of a call
    :param value_of: returns what that came to
    :param refusal: returns the error of this library for what Redis refuses
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        entries: Entries,
        tails: Tails,
        out: ItemsOut,
        *,
        kept: Callable[[bytes], Awaitable[Kept | None]],
        value_of: Callable[[str, bytes, Kept], Reply],
        refusal: Callable[[Exception], Exception],
    ) -> None:
        self._link = link
        self._keys = keys
        self._entries = entries
        self._tails = tails
        self._out = out
        self._kept = kept
        self._value_of = value_of
        self._refusal = refusal

    # See `KeyedItems`

    @property
    def unread(self) -> int:
        """See `KeyedItems.unread`."""
        return self._out.unread.count

    async def resume(self, envelope: Envelope) -> Item[Any] | None:
        """See `KeyedItems.resume`."""
        ask = partial(self._out.resume, envelope.token)
        found: Item[Any] | None = await ask_patiently(ask, self._refusal, needs_memory=True)
        return found

    async def keep_item(self, envelope: Envelope, value: Any) -> None:
        """See `KeyedItems.keep_item`."""
        self._out.take(envelope.token, value)
        ask = partial(self._out.put, envelope.token)
        await ask_patiently(ask, self._refusal, needs_memory=True)

    async def keep_rest(self, envelope: Envelope) -> None:
        """See `KeyedItems.keep_rest`."""
        ask = partial(self._out.flush, envelope.token)
        await ask_patiently(ask, self._refusal, needs_memory=True)

    async def read(self, key: str, after: str | None) -> AsyncGenerator[Item[Any] | ItemsEnd, None]:
        """See `KeyedItems.read`."""
        reader = Reader(key, parse_position(after))
        place = self._keys.items(key.encode())
        feed: Feed | None = None
        try:
            while True:
                feed, entries = await self._next(reader, feed)
                if isinstance(entries, ItemsEnd):
                    yield entries
                    return
                for entry_id, fields in entries:
                    at = parse_id(entry_id)
                    if at <= reader.cursor:
                        continue
                    if not reader.is_mine(at):
                        if feed is not None:
                            self._tails.leave(feed)  # another call has the key: ask
                            break
                        reader.skip(at)
                        continue
                    found = self._entries.read(place, entry_id, fields)
                    for item in reader.take(found):
                        yield item
                    if found.cancelled:
                        raise was_cancelled(key)
                    if found.reply is not None:
                        yield ItemsEnd(str(at), found.reply)
                        return
                    if found.mark:
                        self._tell(reader, found.mark)
        finally:
            if feed is not None:
                self._tails.leave(feed)

    async def _next(
        self, reader: Reader, feed: Feed | None
    ) -> tuple[Feed | None, list[Entry] | ItemsEnd]:
        """Return what comes next, or nothing yet.

        :param feed: where that comes, if this is known to be all there was
        """
        if self._tails.ended is not None:
            raise fresh_copy(self._tails.ended)
        if feed is not None:
            entries = feed.take()
            if entries:
                return feed, entries
            if feed.error is not None:
                raise self._refusal(feed.error) from feed.error
            if feed.behind:
                self._tails.leave(feed)
                feed = None
        page = await self._page(reader)
        if page.entries:
            if feed is not None:  # it would bring them again
                self._tails.leave(feed)
            return None, page.entries
        if page.known.ended:
            return feed, await self._end_of(reader, page)
        self._look_again(reader, page)
        if feed is None:
            feed = self._tails.join(self._keys.items(reader.key.encode()), reader.cursor)
        if feed is not None:
            await feed.wait(_pause(reader))
        return feed, []

    async def _page(self, reader: Reader) -> _Page:
        """Return what is there behind the last entry that was read. The first page is a small one.

        :raises CallNotFoundError: if there is no such call
        :raises StreamRestartedError: if what was read isn't there
        """
        name, cursor = reader.key.encode(), reader.cursor
        keys = self._keys.call(name), self._keys.items(name)
        start = b"%d-%d" % (cursor.epoch, cursor.number + 1)
        count = PAGE if reader.met else SOME
        args = (READ, keys, start, b"%d" % count, b"%d" % LARGE_PAGE)
        ask = partial(run_script, self._link, *args)
        kept, entries, last, mark = await ask_patiently(ask, self._refusal)
        if not kept:
            raise not_found(reader.key)
        page = _Page(parse_kept(kept), entries, parse_id(last or b"0-0"), mark)
        reader.meet(page.known.entry_id)
        if not entries and not (page.known.ended and page.last == _NOWHERE):
            reader.meet_end(page.last)
        return page

    def _look_again(self, reader: Reader, page: _Page) -> None:
        """Tell who writes again that all is read: it may wait for that, and what told it may be
        lost, with who did. Ever more rarely, once Redis has taken that from here.
        """
        reader.looks += 1
        often = reader.owed or not reader.looks & (reader.looks - 1)
        if page.mark and page.last == reader.cursor and often:
            self._tell(reader, page.mark)

    async def _end_of(self, reader: Reader, page: _Page) -> ItemsEnd:
        """Return the end of a call all of whose items were read."""
        name, known, last = reader.key.encode(), page.known, page.last
        kept = await self._kept(name)
        if kept is None or kept.entry_id != known.entry_id or not kept.ended:
            raise not_found(reader.key)  # it has gone meanwhile
        reply = self._value_of(reader.key, name, kept)
        if reader.is_mine(last):
            return ItemsEnd(str(last), Reply("", e=reply.e))
        if reply.e is UNSET:
            raise no_stream(reader.key)
        return ItemsEnd(str(Position(epoch_of(known.entry_id, 0), 0)), reply)

    def _tell(self, reader: Reader, session: bytes) -> None:
        """Tell who writes how far this is read. Nobody waits for that; it may be lost."""

        def answered(reply: Any) -> None:
            if isinstance(reply, bytes):
                reader.owed = False

        reader.owed = True
        connection = self._link.connection
        if connection is not None and connection.error is None:
            inbox = self._keys.inbox("") + session
            word = read_word(reader.key.encode(), str(reader.at).encode())
            packed = pack((b"XADD", inbox, b"NOMKSTREAM", b"*", b"hint", word))
            connection.post(packed, 1, answered)
            connection.flush_nowait()


def _pause(reader: Reader) -> float:
    """Return for how many seconds one waits who has looked, and there was nothing."""
    if reader.at is not None and not reader.owed:
        return LOOKS_AFTER
    return min(_SOON * 2.0 ** min(reader.looks, 10), LOOKS_AFTER)
