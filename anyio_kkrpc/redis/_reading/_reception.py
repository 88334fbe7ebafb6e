"""Where what was received waits to be served: in the queue, or aside of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ...abc import Envelope
from ...kit._inbound import Inbound
from ...kit._queue import BoundedQueue, Overflow
from ...records import Record
from .._connection._portion import MOST_ENTRIES
from ._aside import Aside

__all__ = ("Reception",)


class Reception:
    """The room of one peer, and what becomes of what finds none.

    :param size: requests that may wait in the queue
    :param size_bytes: their bytes
    :param decode: returns the record of an entry
    :param dropped: told the token of an entry of a group that found no room
    :param finished: told the token of one that turned out to be no request
    :param answer: sends the answers to what waits beside the queue, in place of `answers`
    :ivar queue: what anybody may serve
    :ivar aside: what waits beside it
    :ivar inbound: has the listener, and gives it what is no request
    :ivar answers: to be sent to those whose requests will not run
    :ivar invalid: requests that turned out to be none
    """

    def __init__(
        self,
        size: int,
        size_bytes: int,
        overflow: Overflow,
        *,
        decode: Callable[[list[bytes]], Record],
        dropped: Callable[[Any], object],
        finished: Callable[[Any], object],
        answer: Callable[[Envelope], object] | None = None,
    ) -> None:
        self._size = size
        self._dropped = dropped
        self._finished = finished
        self.invalid = 0
        self.answers: deque[Envelope] = deque()
        self.queue: BoundedQueue[Envelope]
        self.queue = BoundedQueue(size, size_bytes, overflow, on_drop=self._drop)
        self.inbound = Inbound(self.queue)
        aside = (decode, answer or self.answers.append, self._drop_invalid)
        self.aside = Aside(self.queue, self.inbound, (size, size_bytes), *aside)

    def room(self) -> int:
        """Return how many more requests may be read now."""
        return min(MOST_ENTRIES, self._size - len(self.queue))

    def forget_taken(self) -> None:
        """Forget what waits in the queue and is a group's, which gets it back."""
        self.queue.extract(lambda envelope: envelope.token is not None)

    def end(self, reason: Exception) -> None:
        """Note that nothing more will come, and nothing is served any more."""
        self.inbound.end(reason)
        self.aside.forget(begun=True)

    def _drop(self, envelope: Envelope) -> None:
        """A request found no room: its caller is told. One of a group goes back to the group."""
        if envelope.token is not None:
            self._dropped(envelope.token)
        else:
            self.aside.take_back(envelope)

    def _drop_invalid(self, envelope: Envelope) -> None:
        """A request turned out to be none. One of a group is done with."""
        self.invalid += 1
        if envelope.token is not None:
            self._finished(envelope.token)
