"""Requests that can be taken back, and cancels of those that can't; without any I/O.

What waits to be written is taken back. A cancel names the request by its id in the stream, which
Redis tells in its answer. Until that has come the cancel waits with the request; one that isn't in
the stream, and won't be, needs none.

Another server may have lost what was cancelled lately, and its cancel, too, or have given its id to
another request. So then those cancels go to all peers, and nothing is looked for. Those of requests
to one peer go to that one again, and those of a broadcast to all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from ...abc import Envelope
from ...records import Cancel, Request
from .._connection._command import pack
from .._stream._holders import MOST, find_holders
from ._commands import Commands
from ._ledger import Post

__all__ = ("Cancels",)

# In place of the id of what isn't in the stream.
_NOWHERE = b""
# For how many seconds cancels are remembered, and how many. What a failover loses is younger.
_LATELY = 10.0
_MOST_LATELY = 100


class Cancels:
    """Cancels of one writer's requests. It is told what becomes of these.

    :param commands: makes what is written
    :param withdraw: takes back a post, or returns false
    :param stir: has `posts` called
    :param now: tells the time in seconds
    :ivar waiting: the requests that wait and may be taken back, by their ids
    """

    def __init__(
        self,
        commands: Commands,
        withdraw: Callable[[Post], bool],
        stir: Callable[[], object],
        now: Callable[[], float],
    ) -> None:
        self._commands = commands
        self._withdraw = withdraw
        self._stir = stir
        self.waiting: dict[str, Post] = {}
        self._due: list[tuple[bytes, Cancel]] = []
        # Of requests of which nothing is known here.
        self._unplaced: list[Envelope] = []
        self._now = now
        self._lately: deque[tuple[float, Envelope]] = deque(maxlen=_MOST_LATELY)

    def let_wait(self, request_id: str, post: Post) -> None:
        """Note that a request waits."""
        self.waiting[request_id] = post

    def forget(self, post: Post) -> None:
        """Note that a post doesn't wait any more."""
        envelope = post.envelope
        if self.waiting and envelope is not None and isinstance(envelope.record, Request):
            self.waiting.pop(envelope.record.id, None)

    def take_back(self, cancel: Envelope) -> bool:
        """Take back the request that a cancel is for, if it waits; return whether it did."""
        record = cancel.record
        request = self.waiting.get(record.id) if isinstance(record, Cancel) else None
        return request is not None and self._withdraw(request)

    def add(self, envelope: Envelope) -> None:
        """Take the cancel of a request to the group, whose token is that of the request: its post,
        and once it is in the stream its id.
        """
        cancel = envelope.record
        assert isinstance(cancel, Cancel)
        waits = self.waiting.get(cancel.id)
        if self.take_back(envelope):
            if waits is not None and _may_run(waits.envelope):
                self._unplaced.append(Envelope(cancel))
                self._stir()
            return
        place = envelope.token
        self._stir()
        if place.__class__ is Post:
            if place.entry_id is None:
                place.cancel = cancel
                return
            place = place.entry_id
        if place is None:
            self._unplaced.append(Envelope(cancel))
        elif place != _NOWHERE:
            self._due.append((place, cancel))

    def place(self, post: Post, entry_id: bytes) -> None:
        """Note where in the stream a request is."""
        assert post.envelope is not None
        post.envelope.token = post.entry_id = entry_id
        if post.cancel is not None:
            self._due.append((entry_id, post.cancel))
            self._stir()

    def leave(self, post: Post) -> None:
        """Note that what a post holds won't be in the stream."""
        if post.envelope is not None and isinstance(post.envelope.record, Request):
            post.envelope.token = post.entry_id = _NOWHERE
            if post.cancel is not None and _may_run(post.envelope):
                self._unplaced.append(Envelope(post.cancel))
                post.cancel = None
                self._stir()

    def remember(self, cancel: Envelope) -> None:
        """Note that a cancel of a request to one peer, or in a broadcast, was written."""
        self._lately.append((self._now(), cancel))

    def repeat(self) -> None:
        """Note that another server answers: it may have lost what was cancelled lately."""
        since = self._now() - _LATELY
        again = [cancel for at, cancel in self._lately if at >= since]
        self._lately.clear()
        if again:
            self._unplaced += again
            self._stir()

    def posts(self) -> Iterator[Post]:
        """Take what may be written."""
        unplaced, self._unplaced = self._unplaced, []
        due, self._due = self._due, []
        if unplaced or due:
            now = self._now()
            self._lately.extend((now, envelope) for envelope in unplaced)
            self._lately.extend((now, Envelope(cancel)) for _, cancel in due)
        for envelope in unplaced:
            if envelope.recipient is None:
                yield self._commands.make_control(envelope)
            elif (post := self._commands.make(envelope)) is not None:
                yield post
        for start in range(0, len(due), MOST):
            ids, cancels = zip(*due[start : start + MOST], strict=True)
            command = find_holders(self._commands.keys, ids)
            yield Post(pack(command), cancels=cancels)


def _may_run(request: Envelope | None) -> bool:
    """Whether somebody who had a request from the server before may run it, wherever it is now."""
    return request is not None and request.attempt > 1
