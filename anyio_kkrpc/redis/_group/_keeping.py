"""Redis is told what this worker holds, and gets back what it doesn't want; see `Held`."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from anyio import Event, Lock, move_on_after

from .._connection._errors import Meaning, RedisError, meaning_of
from .._connection._patience import Outages, Patience
from .._writing._writer import Writer
from ._claims import Groups
from ._held import Held, HeldEntry, Standing
from ._room import Room, SharedRoom

__all__ = ("KEEP", "LIVES", "Keeper", "waking_clock")

logger = logging.getLogger("anyio_kkrpc")

# How often Redis is told what is held, as a part of claim_idle, which is also how long one read may
# take.
KEEP = 1 / 3
# Seconds in which a worker does something, at the latest, by which others see that it lives.
LIVES = 15.0
# How often an entry is confirmed before it begins all the same, since each answer comes too late.
_CONFIRMATIONS = 3


def waking_clock() -> Callable[[], float]:
    """Return a clock, in seconds, that goes on while the machine sleeps, where there is one."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic if boot is None else partial(time.clock_gettime, boot)


class Keeper:
    """Keeps what one worker holds, or gives it back. `run` must run beside it.

    :param claim_idle: seconds after which an entry that wasn't kept belongs to anybody
    :param queue_room: how many more entries the queue takes
    :param tell: tells the other workers that there is something to take
    :param now: see there
    :param shared: the room, if what is held of other streams takes of the same
    :ivar held: what it holds
    :ivar room: how much more it may take
    :ivar now: seconds on a clock that goes on whatever happens to this process
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
        shared: SharedRoom | None = None,
    ) -> None:
        self._groups = groups
        self._writer = writer
        self._outages = outages
        self._interval = min(claim_idle * KEEP, LIVES)
        self._tell = tell
        self.now = now or waking_clock()
        self.held = Held(claim_idle)
        entries = self.held.entries
        self.room = Room(entries, queue_room) if shared is None else shared.holding(entries)
        self._handing_back = Lock()
        self._stirred: Event | None = None
        self._kept: Event | None = None

    def sure_until(self) -> float:
        """Return until when what a command takes that is sent now is surely held."""
        return self.now() + self.held.sure_for

    async def confirm(self, entry: HeldEntry) -> bool:
        """Return whether an entry that isn't surely held may begin here.

        If this is cancelled, it goes back to the group.
        """
        held = self.held
        try:
            for _ in range(_CONFIRMATIONS):
                standing = held.standing(entry, self.now())
                if standing is not Standing.UNSURE:
                    return standing is Standing.SURE
                self.stir()
                kept = self._kept = self._kept or Event()
                await kept.wait()
            return held.standing(entry, self.now()) is not Standing.NO
        except BaseException:
            held.drop(entry)
            self.stir()
            raise

    # What goes back

    def give_back(self, entry_id: bytes, deliveries: int) -> None:
        """Hand back an entry that isn't held any more, now."""
        self.held.give_back({entry_id: deliveries})
        self.stir()

    def release(self, *, begun: bool) -> None:
        """Hand back what was not begun, or everything if also what was ``begun``, now."""
        self.held.release(begun=begun)
        self.stir()

    def end(self) -> None:
        """Note that nothing will be begun or settled here any more."""
        self.held.end()
        self.room.notify()
        self._notify_kept()

    async def hand_back(self) -> None:
        """Give what isn't wanted here, or at the end everything, to the other workers."""
        held = self.held
        if held.ended:
            held.release(begun=True)
            held.give_back(self._writer.unanswered)
        if not held.dropped:
            return
        async with self._handing_back:
            entries = list(held.dropped.items())
            if not entries:
                return
            held.handed_over(entries, await self._groups.hand_back(entries))
        await self._tell()

    # What is kept

    async def keep(self) -> None:
        """Tell Redis that what this worker holds isn't lost, and learn what is all the same."""
        known = self.held.to_keep()
        ids = [*known, *self._writer.unfinished()]
        if not ids:
            return
        sure_until = self.sure_until()
        lost = self.held.keep(known, set(await self._groups.touch(ids)), sure_until)
        if lost:
            logger.warning(
                "%d entries were taken over by other workers meanwhile, or cancelled; %d of them "
                "run here, the others are not begun",
                len(lost),
                sum(entry.started for entry in lost),
            )
            self.room.notify()

    def stir(self) -> None:
        """Have `run` look now at what is to be kept and handed back."""
        if self._stirred is not None:
            self._stirred.set()

    async def run(self) -> None:
        """Keep what is held, often enough, and hand back what isn't wanted. Goes on for ever.

        :raises RedisError: if no further attempt is of use
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
