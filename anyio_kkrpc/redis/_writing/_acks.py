"""Which entries of the group are to be acknowledged, and when, without any I/O.

While nothing is amiss, the acknowledgement of an entry leaves in one write with its reply, behind
it. Redis may then refuse the reply and take the acknowledgement: it takes no XADD when its memory
is used up, but XACK. Such an entry is *brought back* at once: it is pending again, so that another
worker takes it over should this one die; and the reply is repeated.

From the first refusal on replies are written *carefully*: an entry is acknowledged only once its
reply was taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ("Acknowledgements",)


class Acknowledgements:
    """What one worker has to acknowledge.

    :ivar settled: entries whose acknowledgement goes with the next write
    :ivar careful: whether a reply must be taken before its entry is acknowledged
    """

    def __init__(self) -> None:
        self.settled: list[bytes] = []
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

    def write(self, entry: bytes, attempt: int) -> None:
        """Note that the reply to an entry is being written."""
        if self.careful or entry in self._unanswered:
            self._unanswered[entry] = attempt
        else:
            self.settled.append(entry)

    def hold(self, entry: bytes, attempt: int) -> None:
        """Note that the reply to an entry waits, or was refused and will be written again."""
        self._unanswered[entry] = attempt

    def answer(self, entry: bytes) -> None:
        """Note that the reply to an entry was taken, or will never be needed."""
        if self._unanswered.pop(entry, None) is not None:
            self._lost.pop(entry, None)
            self.settled.append(entry)

    def abandon(self, entry: bytes) -> None:
        """Note that an entry won't be answered here: once it is surely pending, it is given up."""
        if entry in self._unanswered:
            self._abandoned.add(entry)
            self._lost[entry] = None

    def take(self) -> list[bytes]:
        """Take what is to be acknowledged now."""
        settled, self.settled = self.settled, []
        if self._unanswered:
            settled = [entry for entry in settled if entry not in self._unanswered]
        return settled

    def acknowledged(self, entries: Iterable[bytes]) -> bool:
        """Note that Redis took an acknowledgement; return whether some are to be brought back."""
        self._lost.update((entry, None) for entry in entries if entry in self._unanswered)
        return bool(self._lost)

    def not_acknowledged(self, entries: Iterable[bytes]) -> None:
        """Note that Redis refused an acknowledgement."""
        self.settled += [entry for entry in entries if entry not in self._unanswered]

    def lose(self, entries: Iterable[bytes], replies: Iterable[tuple[bytes, int]]) -> None:
        """Note that a connection was lost.

        :param entries: what was being acknowledged; nobody knows whether it was
        :param replies: the entries whose reply isn't known to be there, with their deliveries
        """
        self._unanswered.update(replies)
        entries = [*entries]
        self.settled += entries
        self.settled = self.take()
        self.acknowledged(entries)

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
