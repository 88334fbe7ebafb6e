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
from itertools import chain
from typing import Any

from .._connection._address import Address
from .._connection._resp import Connection
from ._commands import Commands
from ._inboxes import Inbox
from ._ledger import Ledger, Post

__all__ = ("Packs",)

logger = logging.getLogger("anyio_kkrpc")

# Bytes of what is packed together at most, in all that is open. Each record counts for some more
# than it has, so that their number is bounded, too.
_MOST_BYTES = 48 * 1024
_OVERHEAD = 256


class Packs:
    """Open entries, one for each inbox, that are sealed when a write leaves.

    :param commands: packs them
    :param ledger: gets the posts when they leave, in that order
    :param unanswered: the entries whose replies are looked for among what is answered
    :param on_answer: given Redis' answer, once for each post, unless nothing depends on it
    :ivar open: the inboxes for which something is to leave
    """

    def __init__(
        self,
        commands: Commands,
        ledger: Ledger,
        unanswered: Mapping[bytes, int],
        on_answer: Callable[[Any], None],
    ) -> None:
        self.open: list[Inbox] = []
        self._commands = commands
        self._ledger, self._written = ledger, ledger.written
        self._unanswered = unanswered
        self._on_answer = on_answer
        self._weight = 0

    def add(self, post: Post, connection: Connection) -> None:
        """Let a post leave with the next write."""
        inbox: Inbox = post.inbox
        posts = inbox.open
        if posts is not None and posts[-1].count + 1 == post.count:
            posts.append(post)
        else:
            self._begin(post, inbox, connection)
        self._weight = weight = self._weight + len(post.packed) + _OVERHEAD
        if weight > _MOST_BYTES:
            self.seal(connection)

    def _begin(self, post: Post, inbox: Inbox, connection: Connection) -> None:
        if inbox.open is not None:
            self.seal(connection)
        if not self.open:
            connection.late = partial(self.seal, connection)
        self.open.append(inbox)
        inbox.open = [post]

    def seal(self, connection: Connection | None) -> None:
        """Let what is open leave with this write."""
        if connection is None or connection.error is not None:
            return
        connection.late = None
        for posts in self._close():
            self._written.extend(posts)
            count = len(posts)
            on_answer = (
                self._on_answer if count == 1 else partial(self._answer, count, connection.address)
            )
            connection.post(self._commands.join(posts), 1, on_answer)

    def take(self) -> list[Post]:
        """Take what hasn't left; it is written alone, as what has, should it be written again."""
        opened = [post for posts in self._close() for post in posts]
        for post in chain(self._written, opened):
            self._commands.alone(post)
        return opened

    def _close(self) -> list[list[Post]]:
        """Open nothing any more; return what was."""
        opened, self.open, self._weight = self.open, [], 0
        closed = []
        for inbox in opened:
            if inbox.open is not None:
                closed.append(inbox.open)
                inbox.open = None
        return closed

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
