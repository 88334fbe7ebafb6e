"""What became of writes to the stream whose connection was lost: the stream tells."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from .._exceptions import ProtocolError
from .._protocol._records import Request
from ._connection import Connection
from ._ledger import Post
from .dialects.native import NativeDialect

__all__ = ("look_up",)

_PAGE = b"500"


async def look_up(
    connection: Connection,
    stream: bytes,
    native: NativeDialect,
    posts: Iterable[Post],
    start: bytes,
    last_added: bytes,
) -> list[tuple[Post, bytes]]:
    """Return those of the posts that are in the stream, with the ids of their entries.

    :param posts: of unknown outcome
    :param start: the id from which on they may be there
    :param last_added: the last id that this peer knows to be of its own, if any
    """
    requests: dict[str, Post] = {}
    others: dict[bytes, deque[Post]] = {}
    for post in posts:
        if post.data is not None:
            others.setdefault(post.data, deque()).append(post)
        elif post.envelope is not None and isinstance(post.envelope.record, Request):
            requests[post.envelope.record.id] = post
    if others and last_added:
        # An item of a stream may look like the one before, which was answered.
        start = b"(" + last_added
    found: list[tuple[Post, bytes]] = []
    while requests or others:
        entries: Any = await connection.execute(b"XRANGE", stream, start, b"+", b"COUNT", _PAGE)
        for entry_id, fields in entries:
            start = b"(" + entry_id
            same = _find(native, fields, requests, others)
            if same is not None:
                found.append((same, entry_id))
        if len(entries) < int(_PAGE):
            break
    return found


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
