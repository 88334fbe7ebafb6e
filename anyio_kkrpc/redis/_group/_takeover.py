"""Taking over entries that this worker hasn't read itself: of others, or from before it lived."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from anyio import Lock

from .._connection._errors import Meaning, RedisError, meaning_of
from .._connection._patience import Outages
from .._reading._reader import Decoder
from .._writing._writer import Writer
from ..dialects import Entry
from ._claims import Claims, Groups, Taken
from ._findings import Died, sort_out
from ._keeping import Keeper

logger = logging.getLogger("anyio_kkrpc")


class Takeover:
    """Takes entries over and hands them on, and tells the callers of those that are given up.

    :param keeper: keeps what this worker holds
    :param outages: told of what is refused
    :param now: Redis' time in seconds
    :param take: is given what was taken over, with the number of its deliveries and until when it
        is surely held
    :param admit: returns when all that is in the queue, and what was written has left
    :param died: told of requests with keys that are dead letters now
    :ivar claimed: entries that were taken over
    :ivar dead_lettered: entries that became dead letters
    :ivar refused: entries that could not become dead letters, each time that was tried
    :ivar pending: whether the group had anything to finish when this worker took last
    """

    def __init__(
        self,
        groups: Groups,
        writer: Writer,
        keeper: Keeper,
        outages: Outages,
        decoder: Decoder,
        now: Callable[[], float],
        take: Callable[[bytes, Entry, int, float], object],
        admit: Callable[[], Awaitable[object]],
        died: Callable[[Died], object],
    ) -> None:
        self._groups = groups
        self._keeper = keeper
        self._outages = outages
        self._decoder = decoder
        self._writer = writer
        self._now = now
        self._take = take
        self._admit = admit
        self._died = died
        # What is being taken over isn't known here yet, and must not be taken over again.
        self._lock = Lock()
        self._recovered = False
        self.pending = True
        self.claimed = self.dead_lettered = self.refused = 0

    async def take(self) -> bool:
        """Take what there is room for of what is for anybody; return whether there may be more."""
        async with self._lock:
            room = self._keeper.room.now()
            if room <= 0:
                return True
            sure_until = self._keeper.sure_until()
            claims = await self._groups.take(room, self._now())
            self.pending = claims.pending
            await self._hand_on(claims, sure_until)
        return claims.more

    async def recover(self) -> None:
        """Take what this worker owns and doesn't know of, page by page, as there is room.

        If Redis refuses it, that is counted and logged: other workers take it when it is due. But
        not the first time, when this worker has yet to show that it can work.
        """
        try:
            await self._recover()
        except RedisError as exc:
            if meaning_of(exc) is not Meaning.REFUSED or not self._recovered:
                raise
            self._outages.leave_out("recovering", exc)
        else:
            self._recovered = True
            self._outages.end("recovering")

    async def _recover(self) -> None:
        # A read that was cut may have been served; a process that died may have had this name.
        counted = not self._recovered
        start: bytes | None = b"-"
        while start is not None:
            async with self._lock:
                held = self._keeper.held
                known = (*held.entries, *held.dropped, *self._writer.unfinished())
                sure_until = self._keeper.sure_until()
                claims = await self._groups.recover(
                    self._now(), known, counted=counted, start=start
                )
                await self._hand_on(claims, sure_until)
            start = claims.after

    async def _hand_on(self, claims: Claims, sure_until: float) -> None:
        held = self._keeper.held
        found = sort_out(claims, held.entries, self._decode)
        for entry_id in found.regained:
            held.regain(entry_id, sure_until)
        for entry_id in found.unreadable:
            self._writer.settle(entry_id, None)
        for item, entry in found.taken:
            self.claimed += 1
            logger.info("took over entry %s, attempt %d", item.id.decode(), item.attempt)
            self._take(item.id, entry, item.attempt, sure_until)
        self._note_given_up(claims)
        for died in found.died:
            self._died(died)
        for answer in found.answers:
            await self._writer.send(answer)
        if claims.taken:
            await self._admit()

    def _note_given_up(self, claims: Claims) -> None:
        self.dead_lettered += len(claims.dead)
        self.refused += len(claims.kept)
        for item in claims.dead:
            logger.error("entry %s became a dead letter", item.id.decode())
        if claims.kept:
            logger.error(
                "%d requests were delivered too often and could not become dead letters, which "
                "is tried again: %s",
                len(claims.kept),
                claims.kept[0].refusal.decode(errors="backslashreplace"),
            )

    def _decode(self, item: Taken) -> Entry | None:
        return self._decoder.decode(self._groups.stream, item.id, item.fields)
