"""What this worker has taken from the group and not finished: it is kept, or given back.

Redis gives an entry to another worker once it wasn't kept for ``claim_idle``. A worker that stands
still for as long, because it is stopped, its machine sleeps, or a handler blocks its event loop,
isn't told; it only sees that time has passed. So each entry has a time until which it surely is
this worker's: ``claim_idle`` after the command was *sent* that took it or kept it, and a little
less. What is to begin later is confirmed before. What another worker has got is not begun here.

One that runs already goes on: its reply is as good as the other run's, and acknowledges the
request because it is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from anyio import Event, Lock, move_on_after
from msgspec import Struct
from redis.exceptions import RedisError

from .._connection._errors import Meaning, meaning_of
from .._connection._patience import Outages, Patience
from .._writing._writer import Writer
from ._claims import Groups

logger = logging.getLogger("anyio_kkrpc")

# As parts of claim_idle: how often Redis is told what is held, which is also how long one read may
# take; and how long an entry is surely held, since those who look for lost ones round their times.
KEEP = 1 / 3
_SURE = 0.9
# Seconds in which a worker does something, at the latest, by which others see that it lives.
LIVES = 15.0
# How often an entry is confirmed before it begins all the same, since each answer comes too late.
_CONFIRMATIONS = 3
# In place of the time until which an entry is surely held.
STARTED = float("-inf")
_FOR_EVER = float("inf")


class HeldEntry(Struct):
    """An entry of the group that was taken and not yet acknowledged.

    :ivar attempt: how often it has been delivered
    :ivar sure_until: until when no other worker has got it, on the clock of `Held`; `STARTED` once
        it runs, which makes whoever would begin it again ask
    :ivar lost: whether another worker has got it all the same
    """

    attempt: int
    sure_until: float
    lost: bool = False

    @property
    def started(self) -> bool:
        """Whether it runs."""
        return self.sure_until == STARTED

    def start(self) -> None:
        """Note that it runs."""
        self.sure_until = STARTED


def _waking_clock() -> Callable[[], float]:
    """Return a clock, in seconds, that goes on while the machine sleeps, where there is one."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic if boot is None else partial(time.clock_gettime, boot)


class Held:
    """What one worker holds, and how much more it may take.

    :param claim_idle: seconds after which an entry that wasn't kept belongs to anybody
    :param queue_room: how many more entries the queue takes
    :param tell: tells the other workers that there is something to take
    :param now: see there
    :ivar now: seconds on a clock that goes on whatever happens to this process
    :ivar entries: what is held, by id; to be added and removed by who takes and settles
    :ivar dropped: what is to be handed back, with the number of deliveries that count
    :ivar limit: how many entries may be held at a time, 0 for any number
    :ivar wanted: set once there may be room, if somebody waits for that
    :ivar sure_for: seconds for which an entry is surely held from when a command is sent that takes
        or keeps it
    :ivar handed_back: how many entries were given back
    :ivar lost: how many entries other workers have got
    """

    def __init__(
        self,
        groups: Groups,
        writer: Writer,
        outages: Outages,
        claim_idle: float,
        queue_room: Callable[[], int],
        tell: Callable[[], Awaitable[object]],
        now: Callable[[], float] | None = None,
    ) -> None:
        self._groups = groups
        self._writer = writer
        self._outages = outages
        self._interval = min(claim_idle * KEEP, LIVES)
        self.sure_for = claim_idle * _SURE
        self._queue_room = queue_room
        self._tell = tell
        self.now = now or _waking_clock()
        self.entries: dict[bytes, HeldEntry] = {}
        self.dropped: dict[bytes, int] = {}
        self.limit = self.handed_back = self.lost = 0
        self.wanted: Event | None = None
        self._ended = False
        self._handing_back = Lock()
        self._stirred: Event | None = None
        self._kept: Event | None = None

    # Room

    def set_limit(self, limit: int) -> None:
        """Note how many may be held from now on, 0 for any number."""
        self.limit = limit
        if limit:
            self.notify()

    def lend(self, change: int) -> None:
        """Note that more may be held for a while, or fewer again."""
        self.limit += change
        self.notify()

    def room(self) -> int:
        """Return how many entries may be taken now."""
        room = self._queue_room()
        return min(room, self.limit - len(self.entries)) if self.limit else room

    async def wait_room(self) -> int:
        """Return how many entries may be taken now, once that is at least one."""
        while (room := self.room()) <= 0:
            wanted = self.wanted = self.wanted or Event()  # several may wait
            await wanted.wait()
        return room

    def notify(self) -> None:
        """Note that there may be room."""
        if self.wanted is not None:
            self.wanted.set()
            self.wanted = None

    # Whose an entry is

    def regain(self, entry_id: bytes, sure_until: float) -> None:
        """Note that what is held here was delivered here once more."""
        entry = self.entries[entry_id]
        entry.lost = False
        if not entry.started:
            entry.sure_until = sure_until

    def own_all(self) -> None:
        """Note that the group was made anew: what is held here is nobody else's."""
        for entry in self.entries.values():
            if not entry.started:
                entry.sure_until = _FOR_EVER

    async def confirm(self, entry_id: bytes) -> HeldEntry | None:
        """Return an entry that isn't surely held, if it may begin here.

        If this is cancelled, it goes back to the group.
        """
        entry = self.entries.get(entry_id)
        try:
            for _ in range(_CONFIRMATIONS):
                # One that was lost and came here again is in the queue twice, and begins once.
                if self._ended or entry is None or self.entries.get(entry_id) is not entry:
                    return None
                if entry.started:
                    return None
                if self.now() < entry.sure_until:
                    return entry
                self.stir()
                kept = self._kept = self._kept or Event()
                await kept.wait()
            return entry if self.entries.get(entry_id) is entry and not self._ended else None
        except BaseException:
            self.drop(entry_id)
            self.stir()
            raise

    async def keep(self) -> None:
        """Tell Redis that what this worker holds isn't lost, and learn what is all the same."""
        known = {
            entry_id: entry
            for entry_id, entry in self.entries.items()
            if not entry.lost and entry.sure_until != _FOR_EVER
        }
        held = [*known, *self._writer.unfinished()]
        if not held:
            return
        sure = self.now() + self.sure_for
        lost = set(await self._groups.touch(held))
        # Meanwhile some were finished, or were lost and came here again.
        known = {key: entry for key, entry in known.items() if self.entries.get(key) is entry}
        for entry_id, entry in known.items():
            if entry_id not in lost and not entry.started:
                entry.sure_until = max(entry.sure_until, sure)
        self._lose({key: entry for key, entry in known.items() if key in lost})

    def _lose(self, lost: dict[bytes, HeldEntry]) -> None:
        if not lost:
            return
        self.lost += len(lost)
        for entry_id, entry in lost.items():
            if entry.started:
                entry.lost = True
            else:
                del self.entries[entry_id]
        logger.warning(
            "%d entries were taken over by other workers meanwhile, or cancelled; %d of them run "
            "here, the others are not begun",
            len(lost),
            sum(entry.started for entry in lost.values()),
        )
        self.notify()

    # What goes back

    def drop(self, entry_id: bytes) -> None:
        """Hand back an entry that was not begun, when others are."""
        entry = self.entries.pop(entry_id, None)
        if entry is not None:
            self.dropped[entry_id] = entry.attempt - 1

    def give_back(self, entry_id: bytes, deliveries: int) -> None:
        """Hand back an entry that isn't held any more, now."""
        self.dropped[entry_id] = deliveries
        self.stir()

    def release(self, *, begun: bool) -> None:
        """Hand back what was not begun, or everything if also what was ``begun``."""
        for entry_id, entry in list(self.entries.items()):
            if begun or not entry.started:
                # One that was not started here doesn't count as delivered.
                self.give_back(entry_id, entry.attempt - (not entry.started))
                del self.entries[entry_id]

    def end(self) -> None:
        """Note that nothing will be begun or settled here any more."""
        self._ended = True
        self.notify()
        self._notify_kept()

    async def hand_back(self) -> None:
        """Give what isn't wanted here, or at the end everything, to the other workers."""
        if self._ended:
            self.release(begun=True)
            self.dropped.update(self._writer.unanswered)
        if not self.dropped:
            return
        async with self._handing_back:
            entries = list(self.dropped.items())
            if not entries:
                return
            self.handed_back += await self._groups.hand_back(entries)
            for entry_id, deliveries in entries:
                if self.dropped.get(entry_id) == deliveries:
                    del self.dropped[entry_id]
        await self._tell()

    # The task

    def stir(self) -> None:
        """Have `run` look now at what is to be kept and handed back."""
        if self._stirred is not None:
            self._stirred.set()

    async def run(self) -> None:
        """Keep what is held, often enough, and hand back what isn't wanted. Goes on for ever.

        :raises redis.exceptions.RedisError: if no further attempt is of use
        """
        patience = Patience("keeping what it holds", self._outages, spare=True)
        while True:
            pause = self._interval
            stirred = self._stirred = Event()  # before it looks: what comes meanwhile counts
            try:
                await self.hand_back()
                await self.keep()
            except RedisError as exc:
                pause = min(pause, patience.pause(exc))
                if meaning_of(exc) is Meaning.REFUSED:  # for good, maybe; then nothing is sure
                    self._notify_kept()
            else:
                self._notify_kept()
                if not patience.calm:
                    patience.worked()
            with move_on_after(pause):
                await stirred.wait()

    def _notify_kept(self) -> None:
        if self._kept is not None:
            self._kept.set()
            self._kept = None
