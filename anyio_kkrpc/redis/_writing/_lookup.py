"""What became of writes to the stream whose connection was lost: the stream tells."""

from __future__ import annotations

from collections import deque
from typing import Any

from ..._exceptions import ProtocolError, TransportClosedError, TransportConnectionError
from ...records import Request
from .._connection._portion import Portion
from .._connection._resp import Connection
from .._stream._entries import order
from .._stream._scripts import LAST_ID
from ..dialects.native import NativeDialect
from ._ledger import Post

__all__ = ("Lookup",)

_PAGE = 500
# How often one entry is asked for that can't be had.
_ATTEMPTS = 5

# Returns the id of the next entry, which is too large to be sent.
_NEXT_ID = b"""
local entries = redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', 1)
return entries[1] and entries[1][1]
"""


class _Search:
    """What is still looked for, and where.

    :ivar start: the id from which on
    :ivar found: what was found
    """

    def __init__(self, posts: list[Post], start: bytes, last_added: bytes) -> None:
        self.posts = posts
        self.requests: dict[str, Post] = {}
        self.others: dict[bytes, deque[Post]] = {}
        for post in posts:
            if post.data is not None:
                self.others.setdefault(post.data, deque()).append(post)
            elif post.envelope is not None and isinstance(post.envelope.record, Request):
                self.requests[post.envelope.record.id] = post
        # What isn't answered was written behind what is. An item of a stream may look like the one
        # before, which was answered.
        behind = last_added and (self.others or order(last_added) >= order(start))
        self.start = b"(" + last_added if behind else start
        self.found: list[tuple[Post, bytes]] = []


class Lookup:
    """Looks for posts in the stream. If a connection is lost meanwhile, it goes on with the next.

    :param stream: its key
    """

    def __init__(self, stream: bytes, native: NativeDialect) -> None:
        self._stream = stream
        self._native = native
        self._search: _Search | None = None
        self._portion = Portion(_PAGE)
        self._lost = 0

    async def find(
        self, connection: Connection, posts: list[Post], start: bytes, last_added: bytes
    ) -> list[tuple[Post, bytes]]:
        """Return those of the posts that are in the stream, with the ids of their entries.

        :param connection: used by nobody else
        :param posts: of unknown outcome
        :param start: the time, in milliseconds on Redis' clock, from which on they may be there
        :param last_added: the last id that this peer knows to be of its own, if any
        """
        search = self._search
        if search is None or search.posts != posts:
            search = self._search = _Search(posts, start, last_added)
        while search.requests or search.others:
            size = self._portion.size
            entries = await self._page(connection, search.start)
            for entry_id, fields in entries:
                search.start = b"(" + entry_id
                same = _find(self._native, fields, search.requests, search.others)
                if same is not None:
                    search.found.append((same, entry_id))
            if len(entries) < size:
                break
        self._search = None
        return search.found

    def begin_anew(self) -> None:
        """Note that another server answers: what was found so far was found on the one before."""
        self._search = None

    async def last_id(self, connection: Connection) -> bytes:
        """Return the last id of the stream.

        :param connection: used by nobody else
        """
        return bytes(await connection.execute(b"EVAL", LAST_ID, b"1", self._stream))

    async def _page(self, connection: Connection, start: bytes) -> list[tuple[bytes, list[bytes]]]:
        """Return the next entries; one that can't be sent without its fields."""
        if self._lost == _ATTEMPTS:
            found = await connection.execute(b"EVAL", _NEXT_ID, b"1", self._stream, start)
            self._lost = 0
            return [] if found is None else [(found, [])]
        size = self._portion.size
        try:
            entries: Any = await connection.execute(
                b"XRANGE", self._stream, start, b"+", b"COUNT", b"%d" % size
            )
        except (TransportConnectionError, TransportClosedError):
            self._lost = self._lost + 1 if self._portion.is_least else 0
            self._portion.cut("the stream after a reconnect")
            raise
        self._lost = 0
        if size < _PAGE:
            self._portion.came(len(entries))
        return [(entry_id, fields) for entry_id, fields in entries]


def _find(
    native: NativeDialect,
    fields: list[bytes],
    requests: dict[str, Post],
    others: dict[bytes, deque[Post]],
) -> Post | None:
    """Return the post that an entry is of, and take it from those that are looked for."""
    same = others.get(fields[1]) if len(fields) > 1 else None
    if same:
        post = same.popleft()
        if not same:
            del others[fields[1]]
        return post
    # Another peer's entry isn't decoded, nor one that isn't valid.
    if not requests or native.sender not in fields or not native.matches(fields):
        return None
    try:
        record = native.decode(fields).record
    except ProtocolError:
        return None
    return requests.pop(record.id, None) if isinstance(record, Request) else None
