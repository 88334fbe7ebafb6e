"""When what Redis refused is tried again, without any I/O.

What a passing state of the server refuses, it refuses to all; a missing right may be about one key.
"""

from __future__ import annotations

from collections import deque
from math import inf

from .._connection._errors import Meaning, meaning_of
from .._connection._patience import HEALING, LONGEST_PAUSE, Patience
from ._ledger import Post

__all__ = ("Again",)

# Seconds between two looks whether a right has come.
_LOOK = 0.25
# Writes that may wait for one.
_MOST_FORBIDDEN = 1000
# Seconds without a refusal after which replies and acknowledgements leave in one write again.
_CAREFUL = 10.0


class Again:
    """What was refused and when, and the posts that wait for a right. Times are on AnyIO's clock.

    :param patience: with what is refused to all
    :ivar refusal: what Redis refuses everything with now
    """

    def __init__(self, patience: Patience) -> None:
        self.refusal: Exception | None = None
        self._patience = patience
        self._forbidden: deque[Post] = deque()
        self._due = self._over_at = inf
        self._last = -inf

    @property
    def next_look(self) -> float:
        """When `look` is to be called."""
        return min(self._due, self._over_at)

    def refuse(self, now: float, exc: Exception | None = None) -> None:
        """Note that something was refused; with ``exc``, for now and everything."""
        self._last = now
        if exc is not None:
            self.refusal, self._over_at = exc, inf

    def is_long_past(self, now: float) -> bool:
        """Whether nothing was refused for a while."""
        return now - self._last > _CAREFUL

    def pause(self) -> float:
        """Return the seconds to wait before what is refused is tried again.

        Meanwhile something else, such as an acknowledgement, may have been taken: then it is 0.

        :raises RedisError: if nothing more can be read
        """
        return 0.0 if self.refusal is None else self._patience.pause(self.refusal)

    def recover(self, now: float) -> None:
        """Note that Redis takes what it refused. It is over once it stays so for a moment."""
        if self.refusal is not None:
            if meaning_of(self.refusal) is Meaning.RIGHTS:
                self._patience.worked()
            else:
                self._over_at = now + LONGEST_PAUSE
            self.refusal = None

    def forbid(self, post: Post, now: float, *, may_wait: bool) -> bool:
        """Keep what the user has no right to write; return false if it is given up.

        :param may_wait: whether the right may have been there before
        """
        if post.refused_since is None:
            post.refused_since = now
            if not may_wait or len(self._forbidden) >= _MOST_FORBIDDEN:
                return False
        if now - post.refused_since >= HEALING:
            return False
        self._forbidden.append(post)
        self._due = min(self._due, now + _LOOK)
        return True

    def look(self, now: float) -> list[Post]:
        """Return what is to be written again because a right may have come."""
        if now >= self._over_at:
            self._over_at = inf
            self._patience.leave()
        if now < self._due:
            return []
        self._due = inf
        posts = [*self._forbidden]
        self._forbidden.clear()
        return posts
