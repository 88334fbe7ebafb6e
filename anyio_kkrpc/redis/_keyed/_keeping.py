"""Both sides of calls with keys on one stream, and the words that are for either."""

from __future__ import annotations

from collections.abc import Callable

from anyio import create_task_group

from ..._runtime._lone import lone_error
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

    async def run(self) -> None:
        """Do what is to be done beside. Goes on for ever."""
        with lone_error():
            async with create_task_group() as group:
                group.start_soon(self.calls.timer.run, name="anyio_kkrpc redis keyed waits")
                await self.work.run(self.calls.ask)

    def take_word(self, word: bytes) -> None:
        """Take a hint.

        :raises ProtocolError: if it isn't valid
        """
        self._consumed()
        if word.startswith(CALL_WORD):
            self.calls.waiting.tell(*split_word(word))
        else:
            self.work.take_word(word)
