"""Looking at a stream and trimming it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from redis.exceptions import ResponseError

from ._connection._errors import Meaning, meaning_of
from ._connection._link import Command, Link
from ._connection._portion import Portion

# Entries fetched by one XRANGE.
PAGE = 500


class StreamInfo(Struct, frozen=True):
    """A stream as it is now.

    :ivar length: number of entries
    :ivar groups: number of consumer groups
    :ivar last_entry: the newest entry, ``None`` if there is none
    """

    length: int
    groups: int
    last_entry: StreamEntry | None


class StreamEntry(Struct, frozen=True):
    """An entry of a stream, as it is in Redis.

    :ivar id: its id, such as ``"1795420521577-0"``
    :ivar fields: its fields as bytes, in their order
    """

    id: str
    fields: dict[str, bytes]


async def stream_info(link: Link, stream: bytes) -> StreamInfo:
    """Return what XINFO STREAM tells. A stream that doesn't exist is empty."""
    try:
        what, command = "the stream's first and last entry", (b"XINFO", b"STREAM", stream)
        reply = await link.ask(what, Portion(1), lambda _: command)
    except ResponseError as exc:
        if meaning_of(exc) is not Meaning.GONE:
            raise
        return StreamInfo(0, 0, None)
    info = pairs(reply)
    last = info[b"last-entry"]
    return StreamInfo(info[b"length"], info[b"groups"], None if last is None else to_entry(last))


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


async def trim(link: Link, stream: bytes, max_len: int) -> int:
    """Trim to exactly ``max_len`` entries, read by all or not; return how many went."""
    removed: int = await link.request(b"XTRIM", stream, b"MAXLEN", b"%d" % max_len)
    return removed


def pages(*command: bytes, most: int = PAGE) -> Callable[[int], Command]:
    """Return what makes a command ask for so many entries, but not more than ``most``."""
    return lambda count: (*command, b"COUNT", b"%d" % min(count, most))


def pairs(flat: list[Any]) -> dict[bytes, Any]:
    """Return the mapping that RESP2 sends as a flat list."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def to_entry(item: Any) -> StreamEntry:
    """Return an entry of an XRANGE reply."""
    entry_id, fields = item
    return StreamEntry(
        entry_id.decode(),
        {key.decode(errors="backslashreplace"): value for key, value in pairs(fields).items()},
    )


def after(entry_id: bytes) -> bytes:
    """Return the smallest id that is greater."""
    ms, _, seq = entry_id.partition(b"-")
    number = int(seq) + 1
    return b"%d-0" % (int(ms) + 1) if number == 2**64 else b"%s-%d" % (ms, number)
