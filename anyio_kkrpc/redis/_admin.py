"""Looking at a stream and its dead letters, and trimming it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from msgspec import Struct

from .._exceptions import ProtocolError
from .._runtime._log import quoted
from ._connection._errors import Meaning, RedisError, ResponseError, meaning_of
from ._connection._link import Link
from ._connection._portion import Portion
from ._group._dead_letters import DeadLetter, dead_letters, purge_dead_letters, retry_dead_letter
from ._keyed._retrying import retry_command
from ._stream._entries import PAGE, after, pages, pairs
from ._stream._keys import Keys
from .dialects._signing import Signer


class StreamInfo(Struct, frozen=True):
    """A stream as it is now.

    :ivar length: number of entries
    :ivar groups: number of consumer groups
    :ivar last_entry: the newest entry, ``None`` if there is none, after all were trimmed, say
    :ivar last_generated_id: the greatest id that an entry had, also if that is gone; ``"0-0"`` if
        there was none
    :ivar shards: the same of each shard, if it has several; the numbers above are of all together,
        but for ``groups``, of which each has its own
    """

    length: int
    groups: int
    last_entry: StreamEntry | None
    last_generated_id: str
    shards: tuple[StreamInfo, ...] = ()


class StreamEntry(Struct, frozen=True):
    """An entry of a stream, as it is in Redis.

    :ivar id: its id, such as ``"1795420521577-0"``
    :ivar fields: its fields as bytes, in their order
    """

    id: str
    fields: dict[str, bytes]


class Admin:
    """What the methods of `RedisStreamsTransport` do that are named so; see there.

    :param link: sends the commands
    :param skip: told of what is no dead letter, with its key, id and the reason
    :param refusal: returns the error of this library for what Redis refuses
    :ivar signer: checks dead letters, and signs what is put back
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        signer: Signer | None,
        skip: Callable[[bytes, bytes, ProtocolError], object],
        refusal: Callable[[Exception], Exception],
    ) -> None:
        self._link = link
        self._keys = keys
        self._skip = skip
        self._refusal = refusal
        self.signer = signer

    async def get_stream_info(self) -> StreamInfo:
        """Return what XINFO STREAM tells."""
        with self._asking() as link:
            return await stream_info(link, self._keys.stream)

    async def trim_stream(self, max_len: int) -> int:
        """Trim to so many entries; return how many went."""
        with self._asking() as link:
            return await trim(link, self._keys.stream, max_len)

    async def get_all_entries(self) -> list[StreamEntry]:
        """Return the entries."""
        with self._asking() as link:
            return await all_entries(link, self._keys.stream)

    async def delete_stream(self) -> None:
        """Delete all that isn't one peer's."""
        keys = self._keys
        with self._asking() as link:
            await link.request(b"DEL", keys.stream, keys.control, keys.dead)

    async def dead_letters(self, count: int) -> list[DeadLetter]:
        """Return the oldest ones."""
        keys, skip = self._keys, partial(self._skip, self._keys.dead)
        with self._asking() as link:
            return await dead_letters(link, keys.stream, keys.dead, count, self.signer, skip)

    async def retry_dead_letter(self, letter_id: str) -> str:
        """Put one back; return its new id."""
        keys = self._keys
        new: str | None = None
        with self._asking() as link:
            try:
                letter = (keys.stream, keys.dead, letter_id, self.signer)
                new = await retry_dead_letter(link, *letter, partial(retry_command, keys))
            except ProtocolError as exc:
                raise LookupError(f"{quoted(letter_id)} is no dead letter: {quoted(exc)}") from exc
            except ResponseError as exc:
                if "Invalid stream ID" not in str(exc):
                    raise
        if new is None:
            raise LookupError(f"there is no dead letter {letter_id!r:.80}")
        return new

    async def purge_dead_letters(self) -> int:
        """Remove all; return how many there were."""
        with self._asking() as link:
            return await purge_dead_letters(link, self._keys.dead)

    @contextmanager
    def _asking(self) -> Iterator[Link]:
        """Raise what Redis refuses as an error of this library."""
        try:
            yield self._link
        except RedisError as exc:
            raise self._refusal(exc) from exc


async def stream_info(link: Link, stream: bytes) -> StreamInfo:
    """Return what XINFO STREAM tells. A stream that doesn't exist is empty."""
    try:
        what, command = "the stream's first and last entry", (b"XINFO", b"STREAM", stream)
        reply = await link.ask(what, Portion(1), lambda _: command)
    except ResponseError as exc:
        if meaning_of(exc) is not Meaning.GONE:
            raise
        return StreamInfo(0, 0, None, "0-0")
    info = pairs(reply)
    last = info[b"last-entry"]
    return StreamInfo(
        info[b"length"],
        info[b"groups"],
        None if last is None else to_entry(last),
        info[b"last-generated-id"].decode(),
    )


async def all_entries(link: Link, stream: bytes) -> list[StreamEntry]:
    """Return the entries from the first to what was the last when this began, page by page."""
    what, portion = "the stream's entries", Portion(PAGE)
    newest = await link.ask(what, Portion(1), pages(b"XREVRANGE", stream, b"+", b"-"))
    if not newest:
        return []
    end = newest[0][0]
    entries: list[StreamEntry] = []
    start = b"-"
    while True:
        page = await link.ask(what, portion, pages(b"XRANGE", stream, start, end))
        entries.extend(to_entry(item) for item in page)
        if not page or page[-1][0] == end:
            return entries
        start = after(page[-1][0])


def check_max_len(max_len: int) -> None:
    """Raise what is wrong with a number of entries to keep."""
    if isinstance(max_len, bool) or not isinstance(max_len, int):
        raise TypeError(f"max_len: needs an int, not {max_len!r:.80}")
    if max_len < 0:
        raise ValueError(f"max_len: must not be negative, not {max_len}")


async def trim(link: Link, stream: bytes, max_len: int) -> int:
    """Trim to exactly ``max_len`` entries, read by all or not; return how many went."""
    removed: int = await link.request(b"XTRIM", stream, b"MAXLEN", b"%d" % max_len)
    return removed


def to_entry(item: Any) -> StreamEntry:
    """Return an entry of an XRANGE reply."""
    entry_id, fields = item
    return StreamEntry(
        entry_id.decode(),
        {key.decode(errors="backslashreplace"): value for key, value in pairs(fields).items()},
    )
