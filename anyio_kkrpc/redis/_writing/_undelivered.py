"""What found no inbox, and waits until the owner of that had the chance to make it again.

A server that was away for longer than inboxes live, was emptied or came back without its data has
no inboxes. Each peer makes its own again once it is connected; whoever is connected before would
write to nobody. So what finds no inbox is kept for a while after this peer was connected again, or
found its own inbox gone; whatever else is for the same peer waits behind it. At any other time, a
peer without an inbox has left, and nothing is kept for it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from math import inf
from typing import Any

from anyio import current_time, sleep
from msgspec import Struct

from ..._runtime._bell import Bell
from ...records import Cancel, Request
from .._connection._errors import RedisError, meaning_of
from ._acks import Acknowledgements
from ._commands import Commands
from ._ledger import Ledger, Post
from ._numbers import Numbers

__all__ = ("Undelivered",)

logger = logging.getLogger("anyio_kkrpc")

# What may wait, for all peers together: posts, and bytes, where each has some more than is written.
_MOST = 10_000
_MOST_BYTES = 16 * 1024 * 1024
_OVERHEAD = 512
# Seconds between two looks for the inboxes.
_FIRST_LOOK = 0.01
_LONGEST_LOOK = 0.5
# Inboxes that one command asks for.
_CHUNK = 100


class _Gone(Struct):
    """What waits for one peer.

    :ivar returned: what found no inbox
    :ivar behind: what came after that, and wasn't written
    """

    returned: deque[Post]
    behind: deque[Post]


class Undelivered:
    """Keeps posts for inboxes that are gone. `run` must run beside it.

    :param commands: gives what has waited new numbers
    :param ledger: gets what has waited and is to be written
    :param acks: told what isn't answered yet
    :param numbers: told what is left out
    :param finish: given what nobody will read
    :param too_late: whether a post isn't worth being written any more; it has been let go then
    :param stir: called when there is something to be written
    :param chance: seconds in which owners make their inboxes again
    :ivar peers: the peers that something waits for
    :ivar until: when owners have had their chance, on AnyIO's clock
    :ivar bell: set once there is something for `run` to do
    """

    def __init__(
        self,
        commands: Commands,
        ledger: Ledger,
        acks: Acknowledgements,
        numbers: Numbers,
        finish: Callable[[Post], object],
        too_late: Callable[[Post], bool],
        stir: Callable[[], object],
        chance: float,
    ) -> None:
        self.peers: dict[str, _Gone] = {}
        self.until = -inf
        self._commands = commands
        self._ledger = ledger
        self._acks = acks
        self._numbers = numbers
        self._finish = finish
        self._too_late = too_late
        self._stir = stir
        self._chance = chance
        self._weights: dict[Post, int] = {}
        self._weight = 0
        self._soonest = inf
        self._complained = self._lost = False
        self.bell = Bell()

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[Post]:
        return iter([*self._weights])

    def disconnected(self) -> None:
        """Note that the connection was lost."""
        self._lost = True

    def connected(self, now: float) -> None:
        """Note that there is a connection. What was lost with the one before is found now."""
        if self._lost:
            self._lost = False
            self.open(now)

    def open(self, now: float) -> None:
        """Note that inboxes may have been lost: from now on their owners have their chance.

        Meanwhile a reply must be taken before its request is acknowledged.
        """
        self.until, self._complained = now + self._chance, False
        self._acks.be_careful(True)
        for post in self._weights:
            if post.answers is not None:
                # It may have been acknowledged in the same write.
                self._acks.hold(post.answers, post.attempt)
                self._acks.acknowledged([post.answers])
        if self._weights:
            self._stir()

    def keep(self, post: Post, now: float) -> bool:
        """Keep a post that found no inbox; return false if it is given up."""
        recipient = _recipient(post)
        if recipient is None or not self._add(post, recipient):
            return False
        self.peers[recipient].returned.append(post)
        if now < self.until and post.answers is not None:
            self._acks.hold(post.answers, post.attempt)
        return True

    def take(self, post: Post) -> bool:
        """Let a new post wait behind what is kept for the same peer; return false if nothing is."""
        recipient = _recipient(post)
        if recipient is None or recipient not in self.peers:
            return False
        record = None if post.envelope is None else post.envelope.record
        if isinstance(record, Cancel) and self._take_back(self.peers[recipient], record.id):
            return True
        if post.answers is not None:
            self._acks.hold(post.answers, post.attempt)
        if self._add(post, recipient):
            self.peers[recipient].behind.append(post)
        else:
            self._let_fail(post)
        return True

    def withdraw(self, post: Post) -> bool:
        """Take back what waits here; return false if it doesn't."""
        if post not in self._weights:
            return False
        self._let_go(post)
        return True

    def clear(self) -> list[Post]:
        """Empty it; return what it had."""
        posts = [*self._weights]
        self.peers.clear()
        self._weights.clear()
        self._weight = 0
        return posts

    async def run(
        self,
        request: Callable[..., Awaitable[Any]],
        keep_own: Callable[[Callable[..., Awaitable[Any]]], Awaitable[object]],
    ) -> None:
        """Write what waits once its inbox is there, or give it up.

        :param request: `Link.request`
        :param keep_own: `Inbox.keep`: if this peer's own inbox is gone, others may be lost as well,
            and `open` is called
        """
        pause = _FIRST_LOOK
        while True:
            if not self.peers:
                self.bell.clear()
                pause = _FIRST_LOOK
                await self.bell.wait()
            await sleep(pause)
            pause = min(pause * 2, _LONGEST_LOOK)
            try:
                if current_time() >= self.until:
                    await self._judge(request, keep_own)
                await self._look(request)
            except RedisError as exc:
                if not meaning_of(exc).passes:
                    logger.warning("what waits for inboxes that are gone is given up: %s", exc)
                    self._give_up(self.peers)
            if current_time() >= self._soonest:
                self._expire()

    async def _judge(
        self,
        request: Callable[..., Awaitable[Any]],
        keep_own: Callable[[Callable[..., Awaitable[Any]]], Awaitable[object]],
    ) -> None:
        """Give up what waits unless this peer's own inbox is gone, too."""
        peers = [*self.peers]
        await keep_own(request)
        if current_time() >= self.until:
            self._give_up(peers)

    async def _look(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Write to the inboxes that are there again."""
        keys = {recipient: self._commands.keys.inbox(recipient) for recipient in self.peers}
        recipients = [*keys]
        for start in range(0, len(recipients), _CHUNK):
            chunk = recipients[start : start + _CHUNK]
            found = await request(b"EXISTS", *(keys[one] for one in chunk))
            for one in chunk if found else ():
                if len(chunk) == 1 or await request(b"EXISTS", keys[one]):
                    self._write(one)

    def _write(self, recipient: str) -> None:
        """Let what waits for a peer be written, in its order, with numbers that have no gaps."""
        gone = self.peers.pop(recipient, None)
        if gone is None:
            return
        self._commands.begin_anew(recipient)
        for post in (*gone.returned, *gone.behind):
            if not self._forget(post) or self._too_late(post):
                continue
            if _is_renumbered(post):
                self._commands.number_anew(post)
            self._ledger.hold(post)
        self._stir()

    def _add(self, post: Post, recipient: str) -> bool:
        """Count a post among those that wait, if there is room."""
        weight = len(post.packed) + _OVERHEAD
        if len(self._weights) >= _MOST or self._weight + weight > _MOST_BYTES:
            if not self._complained:
                self._complained = True
                logger.warning("too much waits for inboxes that are gone: no more is kept")
            return False
        if recipient not in self.peers:
            self.peers[recipient] = _Gone(deque(), deque())
            self.bell.set()
        self._weights[post] = weight
        self._weight += weight
        if post.envelope is not None and post.envelope.deadline is not None:
            self._soonest = min(self._soonest, post.envelope.deadline)
        return True

    def _forget(self, post: Post) -> bool:
        weight = self._weights.pop(post, None)
        self._weight -= weight or 0
        return weight is not None

    def _let_go(self, post: Post) -> None:
        """Take a post away from those that wait for its peer."""
        self._forget(post)
        recipient = _recipient(post)
        gone = None if recipient is None else self.peers.get(recipient)
        for posts in () if gone is None else (gone.returned, gone.behind):
            if post in posts:
                posts.remove(post)

    def _take_back(self, gone: _Gone, request_id: str) -> bool:
        """Take back a request whose cancel comes; return false if it isn't here."""
        for post in (*gone.returned, *gone.behind):
            record = None if post.envelope is None else post.envelope.record
            if isinstance(record, Request) and record.id == request_id:
                self._let_go(post)
                return True
        return False

    def _give_up(self, peers: Any) -> None:
        for recipient in [*peers]:
            gone = self.peers.pop(recipient, None)
            for post in () if gone is None else (*gone.returned, *gone.behind):
                if self._forget(post):
                    self._let_fail(post)

    def _expire(self) -> None:
        """Give up what nobody waits for any more."""
        now, self._soonest = current_time(), inf
        for post in [*self._weights]:
            deadline = None if post.envelope is None else post.envelope.deadline
            if deadline is None:
                continue
            if deadline <= now:
                self._let_go(post)
                if not self._too_late(post):
                    self._let_fail(post)
            else:
                self._soonest = min(self._soonest, deadline)

    def _let_fail(self, post: Post) -> None:
        post.result = None
        self._numbers.leave_out(post)
        self._finish(post)
        if post.answers is not None:
            self._acks.answer(post.answers)
            self._stir()


def _recipient(post: Post) -> str | None:
    """Return the peer whose inbox a post is for, if it is for one."""
    if post.number is None or post.envelope is None:
        return post.forwarded_to
    return post.envelope.recipient


def _is_renumbered(post: Post) -> bool:
    """Whether it is written under another number. What may have been read keeps the one by which it
    is recognized.
    """
    return post.number is not None and not post.unknown
