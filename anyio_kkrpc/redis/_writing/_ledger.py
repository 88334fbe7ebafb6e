"""What is written and not yet answered, and what waits to be written: go-back-N, without any I/O.

Redis answers in the order of writing, so an answer always is that to the oldest post that is
written. A post that Redis refuses for now *stops* the ledger: nothing more is written until the
outstanding answers have come. Then the first one refused is written alone, as a probe; once it was
taken, the others follow in their order, and what is new behind them. What was taken though
something before it was refused keeps its result, and isn't written again.

So the order of posts is theirs at first, except towards those that Redis took behind a refused one,
which were on their way already. Their readers see to that: a stream's items and what is in an inbox
are numbered without gaps.

When the connection is lost, what was written and not answered has an unknown outcome. With what
was refused and what waits, it waits for the next connection, again in the order of before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any

from anyio import Event
from msgspec import Struct

from ...abc import Envelope
from ...records import Cancel

__all__ = ("Ledger", "Phase", "Post")

# Posts taken away that stay in the queue until it is looked through for them, at least.
_FEW = 100


class Post(Struct, eq=False):
    """Commands that are written together, once or again, until their outcome is known.

    :ivar packed: the commands
    :ivar envelope: what is in them, if that is a record of ours
    :ivar replies: how many commands these are; the first one's answer counts
    :ivar left: how many of the answers are outstanding, if some have come
    :ivar result: the first answer, if there are several, or somebody waits for it
    :ivar to_stream: whether it adds to the stream that all peers share
    :ivar inbox: of what may leave together with other records: what `Commands` knows of the inbox.
        ``packed`` isn't a command then, but codec and record; it becomes one, with a number, if it
        is written alone.
    :ivar count: the last part of the number that it has then
    :ivar answers: the entry of the group that this is the reply to
    :ivar attempt: how often that entry has been delivered
    :ivar data: the value that tells it from other entries of the stream, if it isn't a request
    :ivar number: what tells it from other entries of an inbox, and in which order they are. None is
        left out, so that nobody waits for it.
    :ivar forwarded_to: the peer whose inbox it hands an entry on to
    :ivar ids: the entries that it acknowledges, or brings back, with what their replies were. Such
        a post isn't written again; what it is about may have changed.
    :ivar brings_back: which of the two
    :ivar cancels: those of requests whose holders it asks for
    :ivar event: set once the outcome is known, if somebody waits for that
    :ivar written_at: when it was first written, on AnyIO's clock
    :ivar unknown: whether it may have arrived over a connection that was lost
    :ivar waits: whether it is to be written, for the first time or again
    :ivar signed: if the commands have a signature: what packs them with a new one, and when they
        were signed, in seconds, on Redis' clock
    :ivar instead: what is written in its place
    :ivar entry_id: of a request: its id in the stream, empty if it won't be there
    :ivar cancel: of a request that isn't answered yet: what cancels it
    :ivar refused_since: when Redis first said that the user lacks the right, on AnyIO's clock
    """

    packed: bytes
    envelope: Envelope | None = None
    replies: int = 1
    to_stream: bool = False
    inbox: Any = None
    count: int = 0
    answers: bytes | None = None
    attempt: int = 1
    data: bytes | None = None
    number: bytes | None = None
    forwarded_to: str | None = None
    ids: Mapping[bytes, Post | None] | None = None
    brings_back: bool = False
    cancels: Sequence[Cancel] | None = None
    event: Event | None = None
    result: Any = None
    left: int = 0
    written_at: float | None = None
    unknown: bool = False
    waits: bool = False
    signed: tuple[Callable[[], bytes], float] | None = None
    instead: Post | None = None
    entry_id: bytes | None = None
    cancel: Cancel | None = None
    refused_since: float | None = None


class Phase(Enum):
    """What may be written.

    :cvar CLOSED: nothing: there is no connection
    :cvar FLOWING: what is new; nothing waits
    :cvar FEEDING: what waits, as the connection has room for it
    :cvar STOPPED: nothing: something was refused for now
    :cvar PROBING: the first of what waits, and nothing behind it until it is answered
    """

    CLOSED = auto()
    FLOWING = auto()
    FEEDING = auto()
    STOPPED = auto()
    PROBING = auto()


class Ledger:
    """The posts of one writer, in their order. It is told what is written and what is answered.

    :ivar written: what is on its way. Where nothing is amiss, its user appends and takes away.
    :ivar weight: the bytes that wait
    :ivar count: the posts that wait
    :ivar flowing: whether the phase is `Phase.FLOWING`
    """

    def __init__(self) -> None:
        self.written: deque[Post] = deque()
        self.weight = self.count = 0
        self.flowing = False
        self._waiting: deque[Post] = deque()
        self._dropped = 0
        self._refused: list[Post] = []
        self._probe: Post | None = None
        self._phase = Phase.CLOSED

    @property
    def phase(self) -> Phase:
        """What may be written."""
        return self._phase

    @property
    def drained(self) -> bool:
        """Whether it was stopped, and nothing is outstanding any more."""
        return self._phase is Phase.STOPPED and not self.written

    def waiting(self) -> list[Post]:
        """Return what is to be written, in order."""
        posts = (post.instead or post for post in (*self._refused, *self._waiting))
        return [post for post in posts if post.waits]

    def open(self) -> None:
        """Note that there is a connection."""
        self._enter(Phase.FEEDING)

    def crowd(self) -> None:
        """Note that the connection has no room: what is new waits."""
        if self._phase is Phase.FLOWING:
            self._enter(Phase.FEEDING)

    def flow(self) -> None:
        """Note that the connection has room. If nothing waits, what is new need not wait."""
        probing = self._phase is Phase.PROBING and self._probe is None
        if (probing or self._phase is Phase.FEEDING) and not self._waiting:
            self._enter(Phase.FLOWING)

    def hold(self, post: Post) -> None:
        """Let a new post wait."""
        self.crowd()
        self._keep(post)
        self._waiting.append(post)

    def next(self) -> Post | None:
        """Take the next post to be written, if one may be; `write` or nothing follows."""
        if self._phase is not Phase.FEEDING and (
            self._phase is not Phase.PROBING or self._probe is not None
        ):
            return None
        while self._waiting:
            post = self._waiting.popleft()
            post = post.instead or post
            if post.waits:
                self._let_go(post)
                return post
        return None

    def write(self, post: Post) -> None:
        """Note that a post is being written: one from `next`, or one that is beside the order."""
        if self._phase is Phase.PROBING and self._probe is None and post.ids is None:
            self._probe = post
        post.left, post.result = 0, None
        self.written.append(post)

    def done(self, post: Post) -> bool:
        """Note that a post was answered, and taken from `written`: it needs no repetition.

        :return: whether it was the probe
        """
        if post is not self._probe:
            return False
        self._probe = None
        self._enter(Phase.FEEDING)
        return True

    def refuse(self, post: Post) -> None:
        """Note that a post was answered, and taken from `written`: Redis refused it for now."""
        self._probe = None
        self._enter(Phase.STOPPED)
        if post.ids is None:
            self._keep(post)
            self._refused.append(post)

    def probe(self) -> None:
        """Let the first of what waits be written, to see whether Redis takes it; when drained."""
        self._waiting.extendleft(reversed(self._refused))
        self._refused.clear()
        self._enter(Phase.PROBING)

    def drop(self, post: Post) -> bool:
        """Take away a post that waits; return false if it doesn't, or may have arrived before."""
        if not post.waits or post.unknown:
            return False
        self._let_go(post)
        self._dropped += 1
        if self._dropped > max(_FEW, len(self._waiting) // 2):
            self._waiting = deque(one for one in self._waiting if (one.instead or one).waits)
            self._dropped = 0
        return True

    def replace(self, post: Post, other: Post) -> bool:
        """Write another post in place of one that waits; return false as `drop` does."""
        if not post.waits or post.unknown:
            return False
        self._let_go(post)
        post.instead = other
        self._keep(other)
        return True

    def rewrite(self, post: Post, change: Callable[[Post], object]) -> None:
        """Change the commands of a post that waits."""
        self._let_go(post)
        change(post)
        self._keep(post)

    def remove(self, posts: Iterable[Post]) -> None:
        """Take away posts that wait, though they may have arrived: now it is known."""
        for post in posts:
            self._let_go(post)

    def repeat(self, posts: Sequence[Post]) -> None:
        """Let posts wait, before all others, that the server before had taken; this one may lack
        them.
        """
        for post in posts:
            post.unknown = True
            self._keep(post)
        self._waiting.extendleft(reversed(posts))

    def lost(self, leaving: Iterable[Post] = ()) -> list[Post]:
        """Note that the connection was lost.

        :param leaving: what was to be written next, before all that waits
        :return: what was written and isn't written again as it is
        """
        once: list[Post] = []
        unknown: list[Post] = []
        for post in self.written:
            if post.ids is not None:
                once.append(post)
            else:
                post.unknown = True
                self._keep(post)
                unknown.append(post)
        left = [*leaving]
        for post in left:
            self._keep(post)
        # All of those refused were written before those that weren't answered.
        self._waiting.extendleft(reversed((*self._refused, *unknown, *left)))
        self._refused.clear()
        self.written.clear()
        self._probe = None
        self._enter(Phase.CLOSED)
        return once

    def clear(self) -> list[Post]:
        """Let nothing wait; return what is open. What was written may be answered still."""
        posts = [*self.written, *self.waiting()]
        self._refused.clear()
        self._waiting.clear()
        self.weight = self.count = 0
        return posts

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self.flowing = phase is Phase.FLOWING

    def _keep(self, post: Post) -> None:
        post.waits = True
        self.count += 1
        self.weight += len(post.packed)

    def _let_go(self, post: Post) -> None:
        post.waits = False
        self.count -= 1
        self.weight -= len(post.packed)
