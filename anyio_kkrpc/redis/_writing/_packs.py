"""Records that leave together for the same inbox, as one entry; without any I/O.

What is posted while nothing is amiss is packed only when it leaves: with the next write. So one
entry takes all that came up for a peer since the last one. Each record keeps a post, and a number,
of its own. What becomes of the entry becomes of each of them, and what has to be written again is
written alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .._connection._address import Address
from .._connection._resp import Connection
from ._commands import Commands
from ._ledger import Ledger, Post

__all__ = ("Packs",)

logger = logging.getLogger("anyio_kkrpc")

# What is packed together at most: records of one entry, and bytes of all that is open.
_MOST = 128
_MOST_BYTES = 32 * 1024


class Packs:
    """Open entries, one for each inbox, that are sealed when a write leaves.

    :param commands: packs them
    :param ledger: gets the posts when they leave, in that order
    :param unanswered: the entries whose replies are looked for among what is answered
    :param on_answer: given Redis' answer, once for each post, unless nothing depends on it
    :ivar open: what is to leave, by where it goes
    """

    def __init__(
        self,
        commands: Commands,
        ledger: Ledger,
        unanswered: Mapping[bytes, int],
        on_answer: Callable[[Any], None],
    ) -> None:
        self.open: dict[Any, list[Post]] = {}
        self._commands = commands
        self._ledger, self._written = ledger, ledger.written
        self._unanswered = unanswered
        self._on_answer = on_answer
        self._weight = 0

    def add(self, post: Post, connection: Connection) -> None:
        """Let a post leave with the next write."""
        opened, inbox = self.open, post.inbox
        posts = opened.get(inbox)
        if posts is not None and posts[-1].count + 1 != post.count:
            self.seal(connection)
            opened, posts = self.open, None
        if posts is None:
            if not opened:
                connection.late = partial(self.seal, connection)
            posts = opened[inbox] = []
        posts.append(post)
        self._weight += len(post.packed)
        if self._weight > _MOST_BYTES or len(posts) >= _MOST:
            self.seal(connection)

    def seal(self, connection: Connection | None) -> None:
        """Let what is open leave with this write."""
        if connection is None or connection.error is not None:
            return
        connection.late = None
        opened, self.open, self._weight = self.open, {}, 0
        for posts in opened.values():
            self._written.extend(posts)
            count = len(posts)
            on_answer = (
                self._on_answer if count == 1 else partial(self._answer, count, connection.address)
            )
            connection.post(self._commands.join(posts), 1, on_answer)

    def take(self) -> list[Post]:
        """Take what hasn't left; what has will be written alone, should it be written again."""
        for post in self._written:
            self._commands.alone(post)
        opened, self.open, self._weight = self.open, {}, 0
        return [post for posts in opened.values() for post in posts]

    def _answer(self, count: int, address: Address, answer: Any) -> None:
        written = self._written
        if answer.__class__ is bytes and self._ledger.flowing and not self._unanswered:
            for _ in range(min(count, len(written))):
                written.popleft()
            return
        for _ in range(count):
            try:
                self._on_answer(answer)
            except Exception:  # the next answers are other posts'
                logger.exception("handling a reply of %s failed", address)
