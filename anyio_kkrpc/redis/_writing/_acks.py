"""Which entries of the group are to be acknowledged, and when, without any I/O.

While nothing is amiss, the acknowledgement of an entry leaves in one write with its reply, behind
it. Redis may then refuse the reply and take the acknowledgement: it takes no XADD when its memory
is used up, but XACK. Such an entry is *brought back* at once: it is pending again, so that another
worker takes it over should this one die; and the reply is repeated.

From the first refusal on replies are written *carefully*: an entry is acknowledged only once its
reply was taken.

A reply is kept until Redis has answered the acknowledgement. If the connection is lost before that,
and another server answers, which may lack the reply, that is written there first, under its number.
Then it makes no difference what that server has: its reader knows the reply already, or gets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ._ledger import Post

__all__ = ("Acknowledgements",)

# Bytes of replies that are kept when acknowledgements have failed, where each has some more than is
# written.
_MOST_BYTES = 16 * 1024 * 1024
_OVERHEAD = 512
# In place of a reply that isn't kept.
_TOO_MUCH = Post(b"")


class Acknowledgements:
    """What one worker has to acknowledge.

    :ivar settled: entries whose acknowledgement goes with the next write, with their replies, if
        there are any
    :ivar careful: whether a reply must be taken before its entry is acknowledged
    """

    def __init__(self) -> None:
        self.settled: dict[bytes, Post | None] = {}
        self.careful = False
        self._unanswered: dict[bytes, int] = {}
        # Of the unanswered: those that were, or may have been, acknowledged all the same.
        self._lost: dict[bytes, None] = {}
        self._abandoned: set[bytes] = set()

    @property
    def unanswered(self) -> Mapping[bytes, int]:
        """The entries whose reply isn't taken yet, with the number of their deliveries."""
        return self._unanswered

    def be_careful(self, careful: bool) -> None:
        """Note whether replies may be refused."""
        self.careful = careful

    def write(self, entry: bytes, reply: Post) -> None:
        """Note that the reply to an entry is being written."""
        if self.careful or entry in self._unanswered:
            self._unanswered[entry] = reply.attempt
        else:
            self.settled[entry] = reply

    def hold(self, entry: bytes, attempt: int) -> None:
        """Note that the reply to an entry waits, or was refused and will be written again."""
        self._unanswered[entry] = attempt

    def answer(self, entry: bytes, reply: Post | None = None) -> None:
        """Note that the reply to an entry was taken; without one, that it will never be needed."""
        if self._unanswered.pop(entry, None) is not None:
            self._lost.pop(entry, None)
            self.settled[entry] = reply

    def abandon(self, entry: bytes) -> None:
        """Note that an entry won't be answered here: once it is surely pending, it is given up."""
        if entry in self._unanswered:
            self._abandoned.add(entry)
            self._lost[entry] = None

    def take(self) -> dict[bytes, Post | None]:
        """Take what is to be acknowledged now, with the replies."""
        settled, self.settled = self.settled, {}
        return self._answered(settled) if self._unanswered else settled

    def acknowledged(self, entries: Iterable[bytes]) -> bool:
        """Note that Redis took an acknowledgement; return whether some are to be brought back."""
        self._lost.update((entry, None) for entry in entries if entry in self._unanswered)
        return bool(self._lost)

    def not_acknowledged(self, entries: Mapping[bytes, Post | None]) -> None:
        """Note that Redis refused an acknowledgement."""
        self.settled = {**self._answered(entries), **self.settled}
        weight = 0
        for entry, reply in self.settled.items():
            if reply is not None:
                weight += len(reply.packed) + _OVERHEAD
                if weight > _MOST_BYTES:
                    self.settled[entry] = _TOO_MUCH

    def lose(
        self,
        unknown: Iterable[Mapping[bytes, Post | None]],
        replies: Iterable[tuple[bytes, int]],
    ) -> None:
        """Note that a connection was lost.

        :param unknown: what was being acknowledged; nobody knows whether it was
        :param replies: the entries whose reply isn't known to be there, with their deliveries
        """
        self._unanswered.update(replies)
        entries: dict[bytes, Post | None] = {}
        for one in unknown:
            entries.update(one)
        self.settled = self.take()
        self.not_acknowledged(entries)
        self.acknowledged(entries)

    def doubt(self) -> list[Post]:
        """Note that another server answers, which may lack replies that were taken.

        :return: these replies, in their order: they are to be written again. What too much was kept
            of isn't acknowledged there: where it is pending, it runs once more.
        """
        replies = []
        for entry, reply in self.take().items():
            if reply is None:
                self.settled[entry] = None
            elif reply is not _TOO_MUCH:
                self.hold(entry, reply.attempt)
                replies.append(reply)
        return replies

    def _answered(self, entries: Mapping[bytes, Post | None]) -> dict[bytes, Post | None]:
        """Return those that aren't unanswered."""
        unanswered = self._unanswered
        return {entry: reply for entry, reply in entries.items() if entry not in unanswered}

    def to_bring_back(self) -> list[tuple[bytes, int]]:
        """Return the entries that may not be pending, with the number of their deliveries."""
        return [(entry, self._unanswered[entry]) for entry in self._lost]

    def brought_back(self, entries: Iterable[bytes]) -> list[tuple[bytes, int]]:
        """Note that entries are pending again; return those to be given up, with deliveries."""
        given_up = []
        for entry in entries:
            self._lost.pop(entry, None)
            if entry in self._abandoned:
                self._abandoned.remove(entry)
                given_up.append((entry, self._unanswered.pop(entry)))
        return given_up
