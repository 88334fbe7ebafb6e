"""Both sides of calls with keys on one stream, and the words that are for either."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from ._calls import RedisCalls
from ._kept import CALL_WORD, split_word
from ._work import Work

__all__ = ("CallKeeping",)


class CallKeeping:
    """What a lane has of them.

    :param consumed: told that a word was read, which may be in the inbox
    :ivar calls: this peer as a caller
    :ivar work: this peer as a worker
    """

    def __init__(self, calls: RedisCalls, work: Work, consumed: Callable[[], object]) -> None:
        self.calls = calls
        self.work = work
        self._consumed = consumed

    def tasks(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        """Return what runs as long as the lane does, with the names of the tasks."""
        work = partial(self.work.run, self.calls.ask)
        return [("keyed", work), ("keyed waits", self.calls.timer.run)]

    def take_word(self, word: bytes) -> None:
        """Take a hint.

        :raises ProtocolError: if it isn't valid
        """
        self._consumed()
        if word.startswith(CALL_WORD):
            self.calls.waiting.tell(*split_word(word))
        else:
            self.work.take_word(word)
