"""Streams among the items of a stream: how many of them may wait to be read, and for how long."""

from __future__ import annotations

from typing import final

from .._exceptions import OverloadedError

# Streams of one family that nobody has begun to read; a reader of this library lets its source be
# one ahead.
MOST_UNREAD = 1000


@final
class Family:
    """A stream and all that are among its items, or among theirs.

    Whoever reads one of them may begin with the next one when it has come to its end.

    It begins with one that is read.
    """

    __slots__ = ("_reading", "_still_since", "_unread")

    def __init__(self) -> None:
        self._unread = 0
        self._reading = 1
        self._still_since = 0.0

    def add(self) -> None:
        """Note that there is one more, which nobody reads yet.

        :raises OverloadedError: if there are too many of those
        """
        if self._unread >= MOST_UNREAD:
            raise OverloadedError(f"{MOST_UNREAD} streams of a stream wait to be read")
        self._unread += 1

    def begin(self) -> None:
        """Note that somebody begins to read one of them, or that it ends unread."""
        self._unread -= 1
        self._reading += 1

    def end(self, now: float) -> None:
        """Note that one of those has come to its end."""
        self._reading -= 1
        self._still_since = now

    def patience(self, now: float, seconds: float) -> float:
        """Return how much longer one waits to be read.

        :param seconds: for how long it does when none of them is read
        """
        return seconds if self._reading else max(self._still_since + seconds - now, 0.0)
