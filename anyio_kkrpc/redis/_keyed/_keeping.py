"""Both sides of calls with keys on one stream, and the words that are for either."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..._runtime._bell import Beside
from ._calls import RedisCalls
from ._kept import CALL_WORD, split_word
from ._tails import Tails
from ._work import Work

__all__ = ("CallKeeping",)


class CallKeeping:
    """What a lane has of them.

    :param consumed: told that a word was read, which may be in the inbox
    :param tails: waits for items
    :ivar calls: this peer as a caller
    :ivar work: this peer as a worker
    """

    def __init__(
        self, calls: RedisCalls, work: Work, tails: Tails, consumed: Callable[[], object]
    ) -> None:
        self.calls = calls
        self.work = work
        self._tails = tails
        self._consumed = consumed

    def tasks(self) -> list[Beside]:
        """Return what runs as long as the lane does."""
        work = partial(self.work.run, self.calls.ask)
        timer, tails = self.calls.timer, self._tails
        return [
            ("keyed", work, self.work.bell),
            ("keyed waits", timer.run, timer.bell),
            ("items", tails.run, tails.bell),
        ]

    def end(self, reason: Exception) -> None:
        """Let nobody wait any more."""
        self.calls.end(reason)
        self._tails.end(reason)

    def take_word(self, word: bytes) -> None:
        """Take a hint.

        :raises ProtocolError: if it isn't valid
        """
        self._consumed()
        if word.startswith(CALL_WORD):
            self.calls.waiting.tell(*split_word(word))
        else:
            self.work.take_word(word)
