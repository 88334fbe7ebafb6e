"""What this worker has taken from the group and not finished, and what is to be given back.

Redis gives an entry to another worker once it wasn't kept for ``claim_idle``. A worker that stands
still for as long, because it is stopped, its machine sleeps, or a handler blocks its event loop,
isn't told; it only sees that time has passed. So each entry has a time until which it surely is
this worker's: ``claim_idle`` after the command was *sent* that took it or kept it, and a little
less. What is to begin later is confirmed before. What another worker has got is not begun here.

One that runs already goes on: its reply is as good as the other run's, and acknowledges the
request because it is done.

Here is what is known and what follows from it; `Keeper` tells Redis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum, auto

from msgspec import Struct

from ...records import Record, Request
from ..dialects._keyed import Keyed

__all__ = ("GONE", "STARTED", "Held", "HeldEntry", "Standing")

# How long an entry is surely held, as a part of claim_idle: those who look for lost ones round
# their times.
_SURE = 0.9
# In place of the time until which an entry is surely held, less than any time: so whoever would
# begin such an entry asks.
STARTED = -1.0
GONE = -2.0
_FOR_EVER = float("inf")


class HeldEntry(Struct, gc=False):
    """An entry of the group that was taken and not yet acknowledged.

    :ivar attempt: how often it has been delivered
    :ivar sure_until: until when no other worker has got it, on the clock of `Keeper`; `STARTED`
        once it runs, `GONE` once it is to run elsewhere
    :ivar sender: whose it is
    :ivar lost: whether another worker has got it all the same
    :ivar record: the request
    :ivar keyed: what is known of its key, if it has one
    :ivar shard: of the stream, that it was taken from
    """

    id: bytes
    attempt: int
    sure_until: float
    sender: str | None = None
    lost: bool = False
    record: Record | None = None
    keyed: Keyed | None = None
    shard: int = 0

    def holds(self, sender: str, record: Record) -> bool:
        """Whether it is the request that a record is, of a sender. An id names an entry on one
        server only.
        """
        mine = self.record
        return (
            isinstance(mine, Request)
            and isinstance(record, Request)
            and (self.sender, mine.id) == (sender, record.id)
        )

    @property
    def started(self) -> bool:
        """Whether it runs."""
        return self.sure_until == STARTED

    def start(self) -> None:
        """Note that it runs."""
        self.sure_until = STARTED


class Standing(Enum):
    """Whether an entry may begin here."""

    SURE = auto()
    UNSURE = auto()  # Redis is to be asked
    NO = auto()


class Held:
    """What one worker holds.

    :param claim_idle: seconds after which an entry that wasn't kept belongs to anybody
    :ivar entries: what is held, by id; to be added and removed by who takes and settles
    :ivar dropped: what is to be handed back, with the number of deliveries that count
    :ivar sure_for: seconds for which an entry is surely held from when a command is sent that takes
        or keeps it
    :ivar ended: whether nothing will be begun or settled here any more
    :ivar handed_back: how many entries were given back
    :ivar lost: how many entries other workers have got
    """

    def __init__(self, claim_idle: float) -> None:
        self.sure_for = claim_idle * _SURE
        self.entries: dict[bytes, HeldEntry] = {}
        self.dropped: dict[bytes, int] = {}
        self.ended = False
        self.handed_back = self.lost = 0
        self._displaced = 0

    # Whose an entry is

    def standing(self, entry: HeldEntry, now: float) -> Standing:
        """Return whether an entry that was taken may begin at a time."""
        if self.ended or entry.started or self.entries.get(entry.id) is not entry:
            return Standing.NO
        return Standing.SURE if now < entry.sure_until else Standing.UNSURE

    def regain(self, entry_id: bytes, sure_until: float) -> None:
        """Note that what is held here was delivered here once more."""
        entry = self.entries[entry_id]
        entry.lost = False
        if not entry.started:
            entry.sure_until = sure_until

    def displace(self, entry: HeldEntry) -> None:
        """Note that the server has another request under the id of one that is held.

        So it has lost that, and nobody else there will run it. From now on it has an id that no
        server gives: it isn't kept, and what runs is acknowledged in vain.
        """
        del self.entries[entry.id]
        self._displaced += 1
        entry.id, entry.lost = b"0-%d" % self._displaced, True
        if not entry.started:
            entry.sure_until = _FOR_EVER
        self.entries[entry.id] = entry

    def own_all(self) -> None:
        """Note that the group was made anew: what is held here is nobody else's."""
        for entry in self.entries.values():
            if not entry.started:
                entry.sure_until = _FOR_EVER

    def to_keep(self) -> dict[bytes, HeldEntry]:
        """Return what Redis is to be told that it isn't lost."""
        return {
            entry_id: entry
            for entry_id, entry in self.entries.items()
            if not entry.lost and entry.sure_until != _FOR_EVER
        }

    def keep(
        self, kept: Mapping[bytes, HeldEntry], lost: Collection[bytes], sure_until: float
    ) -> list[HeldEntry]:
        """Take Redis' answer.

        :param kept: what `to_keep` returned. Since then some were finished, or were lost and came
            here again.
        :param lost: which of them other workers have got
        :param sure_until: until when the others are surely held
        :return: those that are lost; those that don't run aren't held any more
        """
        gone = []
        for entry_id, entry in kept.items():
            if self.entries.get(entry_id) is not entry:
                continue
            if entry_id in lost:
                gone.append(entry)
            elif not entry.started:
                entry.sure_until = max(entry.sure_until, sure_until)
        for entry in gone:
            if entry.started:
                entry.lost = True
            else:
                self._let_go(entry)
        self.lost += len(gone)
        return gone

    # What goes back

    def drop(self, entry: HeldEntry) -> None:
        """Note that an entry that was not begun isn't wanted here."""
        if self.entries.get(entry.id) is entry:
            # One that was not started here doesn't count as delivered.
            self.dropped[entry.id] = entry.attempt - (not entry.started)
            self._let_go(entry)

    def release(self, *, begun: bool) -> None:
        """Note that what was not begun isn't wanted here, or nothing is, if also what was."""
        for entry in list(self.entries.values()):
            if begun or not entry.started:
                self.drop(entry)

    def give_back(self, entries: Mapping[bytes, int]) -> None:
        """Note that entries that aren't held any more are to go back.

        :param entries: with the number of deliveries that count
        """
        self.dropped.update(entries)

    def end(self) -> None:
        """Note that nothing will be begun or settled here any more."""
        self.ended = True

    def handed_over(self, entries: Iterable[tuple[bytes, int]], done: int) -> None:
        """Note that entries were handed back, and ``done`` of them were still this worker's."""
        self.handed_back += done
        for entry_id, deliveries in entries:
            if self.dropped.get(entry_id) == deliveries:
                del self.dropped[entry_id]

    def _let_go(self, entry: HeldEntry) -> None:
        del self.entries[entry.id]
        entry.sure_until = GONE
