"""Who waits at this peer for what a call comes to."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from ..._exceptions import ProtocolError
from ..._runtime._clock import OneShot
from ._kept import Kept, parse_kept

__all__ = ("ASK", "Waiter", "Waiting")

# Seconds after which one who waits asks again: a hint may be lost, with a worker that is killed or
# a server that fails over.
ASK = 5.0


class Waiter:
    """One that waits for a word.

    :ivar word: wakes it; it is to be renewed once it came
    :ivar kept: what the call came to, if that came along
    :ivar failed: why nothing can be told any more
    :ivar since: since when it waits, or has asked
    :ivar claimed: what Redis has answered to its claim, if that is for it to see
    :ivar entry_id: of the request that it has claimed, once that is known
    :ivar late: whether nothing was told for as long as one waits before one asks
    """

    __slots__ = ("_one_shot", "claimed", "entry_id", "failed", "kept", "late", "since", "word")

    def __init__(self, one_shot: Callable[[], OneShot], now: float) -> None:
        self._one_shot = one_shot
        self.word = one_shot()
        self.kept: Kept | None = None
        self.failed: Exception | None = None
        self.since = now
        self.late = False
        self.claimed: Any = None
        self.entry_id: bytes | None = None

    def take_claim(self, reply: Any) -> None:
        """Take Redis' answer to its claim: for a new one, it goes on waiting."""
        if reply.__class__ is bytes and reply[:1].isdigit():
            self.entry_id = reply
        else:
            self.claimed = reply
            self.word.set()

    def wake(self) -> None:
        """Have it look whether it is out of time."""
        self.word.set()

    def renew(self, now: float) -> None:
        """Wait for the next word."""
        self.word = self._one_shot()
        self.since, self.kept, self.late = now, None, False


class Waiting:
    """All that wait, by key. It has no clock."""

    def __init__(self) -> None:
        # Who waits for a key is in a dict for its order: any of very many may leave.
        self._waiters: dict[bytes, dict[Waiter, None]] = {}
        self._ended: Exception | None = None

    def join(self, key: bytes, one_shot: Callable[[], OneShot], now: float) -> Waiter:
        """Return one more that waits for a key."""
        waiter = Waiter(one_shot, now)
        self._waiters.setdefault(key, {})[waiter] = None
        if self._ended is not None:
            waiter.failed = self._ended
            waiter.word.set()
        return waiter

    def leave(self, key: bytes, waiter: Waiter) -> bool:
        """Note that one waits no more; return whether it was the last for its key."""
        waiters = self._waiters[key]
        del waiters[waiter]
        if not waiters:
            del self._waiters[key]
        return not waiters

    def tell(self, key: bytes, value: bytes) -> None:
        """Take a word about a key.

        :param value: what is known of the call, if that came along; else it is to be asked for
        """
        waiters = self._waiters.get(key)
        if waiters is None:
            return
        kept: Kept | None = None
        if value:
            try:
                kept = parse_kept(value)
            except ProtocolError:
                kept = None
        for waiter in waiters:
            waiter.kept = kept
            waiter.word.set()

    def ask(self, now: float) -> float:
        """Wake those who have waited long enough to ask; return when to do so again."""
        oldest = inf
        for waiters in self._waiters.values():
            for waiter in waiters:
                if waiter.since + ASK <= now:
                    waiter.late = True
                    waiter.word.set()
                else:
                    oldest = min(oldest, waiter.since)
        return now + ASK if self._waiters and oldest == inf else oldest + ASK

    def end(self, reason: Exception) -> None:
        """Let nobody wait any more."""
        self._ended = reason
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.failed = reason
                waiter.word.set()
