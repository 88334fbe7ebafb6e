"""The loop by which a worker takes what other workers handed back or lost.

All workers take what is there for anybody. One of them, who holds a lease, also looks through what
is pending for what was lost: that costs Redis time that grows with what is pending, and is
therefore done once, however many workers there are, and page by page.

While nothing is pending nothing can be lost, and all of them rest: what somebody takes from then on
is lost after ``claim_idle`` at the soonest, so each looks once in that time whether there is any.
Who hands something back wakes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import uniform

from anyio import Event, current_time, move_on_after, sleep

from .._connection._errors import RedisError
from .._connection._patience import Patience
from ._claims import Groups, Look
from ._keeping import LIVES, Keeper
from ._takeover import Takeover

# As parts of claim_idle: how often the lease is asked for or kept, which has to be more often than
# it ends; how often whether anything is pending; and the shortest time between two searches, which
# is as long as a search, too.
_POLL = 1 / 4
_REST = 7 / 8
_LEAST = 1 / 16
# Full pages of the last search that are looked at together, for what has been idle for long, and
# searches after which there is one that doesn't know of the last one.
_TOGETHER = 8
_SEARCHES = 16
# Between two pages Redis has so many times the time of a page for others, but no more than seconds.
_BREATH = 4
_LONGEST_BREATH = 0.01
# Consumers that hold nothing are removed after so many times claim_idle, or seconds at least. As
# often each worker may look for them, at times of its own.
_SWEEP_FACTOR = 10
_SWEEP_LEAST = 300.0


class Claimer:
    """Takes what was handed back, and, while it is the one to do so, finds what was lost.

    :param takeover: takes what there is room for
    :param keeper: keeps what this worker holds
    :param claim_idle: seconds
    :param tell: tells the other workers that there is something to take
    :param patience: with a server that refuses it
    """

    def __init__(
        self,
        groups: Groups,
        takeover: Takeover,
        keeper: Keeper,
        claim_idle: float,
        *,
        tell: Callable[[], Awaitable[object]],
        patience: Patience,
    ) -> None:
        self._groups = groups
        self._takeover = takeover
        self._take = takeover.take
        self._keep = keeper.keep
        self._idle = claim_idle
        self._poll = min(claim_idle * _POLL, LIVES)
        self._rest = min(claim_idle * _REST, LIVES)
        self._sweep_each = max(claim_idle * _SWEEP_FACTOR, _SWEEP_LEAST)
        self._wait_room = keeper.room.wait
        self._tell = tell
        self._patience = patience
        self._wake = Event()
        self._leads = False
        self._search_at = self._kept_at = self._sweep_at = 0.0
        self._searches = 0
        self._pages: list[bytes] = []  # the last id of each full page of the last searches

    def wake(self) -> None:
        """Note that somebody has handed something back."""
        self._wake.set()

    async def run(self) -> None:
        """Go on for ever.

        :raises RedisError: if no further attempt is of use
        """
        await self._wake.wait()  # for the group
        self._sweep_at = current_time() + uniform(self._idle, self._sweep_each)
        while True:
            await self._wait_room()
            self._wake = Event()
            try:
                if await self._take():
                    continue
                pause = await self._look_after()
            except RedisError as exc:
                # Those who hold entries shall be able to say so before others claim them; and the
                # reader makes the group again.
                pause = max(self._poll, self._patience.pause(exc))
            else:
                if not self._patience.calm:
                    self._patience.worked()
            with move_on_after(pause):
                await self._wake.wait()

    async def resign(self) -> None:
        """Let another worker look at once."""
        if self._leads:
            self._leads = False
            await self._groups.resign()

    async def _look_after(self) -> float:
        """Do what is this worker's turn, if it is; return when to come back, in seconds."""
        now = current_time()
        sweeps = now >= self._sweep_at
        if not self._takeover.pending and not sweeps:
            await self.resign()
            return self._rest
        if sweeps:
            self._sweep_at = now + self._sweep_each * uniform(1.0, 2.0)
        if not await self._keep_lease():
            return self._poll
        if current_time() >= self._search_at:
            await self._search()
        if sweeps and self._leads:
            await self._groups.sweep(self._sweep_each)
        return min(self._poll, max(self._search_at - current_time(), 0.001))

    async def _keep_lease(self) -> bool:
        led, self._leads = self._leads, await self._groups.lead()
        self._kept_at = current_time()
        if not led:
            self._search_at = self._kept_at
        return self._leads

    async def _search(self) -> None:
        """Look through all that is pending."""
        began = current_time()
        # What this worker holds is kept first: an own entry that is due then isn't known here.
        await self._keep()
        if self._searches % _SEARCHES == 0:
            self._pages = []
        self._searches += 1
        # What was there at the last search can only be less by now; what has come since is new.
        ends = self._pages[_TOGETHER - 1 :: _TOGETHER]
        del self._pages[len(ends) * _TOGETHER :]
        soonest = self._idle / 2 if ends else self._idle
        last: bytes | None = None
        for end in (*ends, None):
            while True:
                look = await self._look_on(last, end)
                if look.soonest is not None:
                    soonest = min(soonest, current_time() - began + look.soonest)
                if not self._leads:
                    return
                if look.last is None:
                    break
                last = look.last
                if end is None:
                    self._pages.append(last)
            last = end
        now = current_time()
        pause = min(max(now - began, self._idle * _LEAST), self._idle)
        # Nothing is due before: what workers take from now on isn't for claim_idle.
        self._search_at = max(began + soonest, now + pause)

    async def _look_on(self, last: bytes | None, end: bytes | None) -> Look:
        """Look at what comes behind an id; take what is found, and let others and Redis breathe."""
        before = current_time()
        look = await self._groups.look(b"-" if last is None else b"(" + last, end)
        took = current_time() - before
        if look.due and await self._take():
            await self._tell()
        await sleep(min(took * _BREATH, _LONGEST_BREATH))
        if current_time() - self._kept_at > self._poll:
            await self._keep_lease()
        return look
