"""One worker of a group: it reads what nobody has had, and takes over what others had.

Each entry that it takes is held until it is acknowledged. What isn't for a worker to run is
acknowledged at once, or forwarded to the peer that it is for.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Literal, TypeAlias

from anyio import move_on_after
from anyio.abc import TaskGroup

from .._connection._command import Execute
from .._connection._patience import Patience
from .._connection._portion import ReadPortion
from .._connection._resp import Connection
from .._reading._arrivals import id_of
from .._reading._common import Common
from .._reading._hints import TURN_WORD, Hints
from .._reading._intake import letting_others_run
from .._writing._writer import Writer
from ..dialects import Entry
from ._claiming import Claimer
from ._claims import Groups
from ._findings import Died
from ._held import HeldEntry
from ._keeping import KEEP, Keeper
from ._takeover import Takeover
from ._turns import Turns

__all__ = ("Worker",)

logger = logging.getLogger("anyio_kkrpc")

# Seconds for which it is known what was held when another server answered than before.
_REMEMBER = 60.0
# Seconds after which a worker that has no room lets another one wait at the stream.
_SOON = 0.01
# A request: who sent it, and the id that it has among those of this peer.
_Named: TypeAlias = tuple[str | None, str | None]
Run: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
Beside: TypeAlias = Callable[[Run], Coroutine[Any, Any, None]]


class Worker:
    """Takes entries of the group, as many as there is room for.

    :param groups: its scripts
    :param keeper: keeps what it holds
    :param writer: acknowledges
    :param now: Redis' time in seconds
    :param claim_idle: seconds after which an entry that wasn't kept belongs to anybody
    :param died: told of requests with keys that are dead letters now
    :param shard: of the stream, from which it takes
    :param beside: runs what runs beside the reader; an error that ends it ends all
    :ivar turns: whether it waits at the stream while there is nothing to do
    :ivar groups: the same
    :ivar keeper: the same
    :ivar held: what it holds
    :ivar takeover: takes what others had
    :ivar made: whether this worker has seen to it that there is a group
    :ivar received: entries that were taken
    """

    def __init__(
        self,
        groups: Groups,
        keeper: Keeper,
        writer: Writer,
        common: Common,
        *,
        hints: Hints,
        now: Callable[[], float],
        claim_idle: float,
        beside: Beside,
        died: Callable[[Died], object],
        turns: Turns,
        shard: int = 0,
    ) -> None:
        self.groups, self.turns = groups, turns
        self.keeper, self.held = keeper, keeper.held
        self._entries = self.held.entries
        self._writer = writer
        self._common = common
        self._arrivals, self._deliver = common.arrivals, common.arrivals.deliver
        self._is_for_others = common.shared.is_for_others
        self._hints = hints
        self._idle = claim_idle
        self._shard = shard
        # What a read took is surely held from when it was sent, so it is not to take long.
        self._reader = groups.reader(common.decoder, min(common.block_timeout, claim_idle * KEEP))
        self._beside = beside
        self._claimer: Claimer | None = None
        self._skipped = False
        rest = (common.outages, common.decoder, now, self.take, self._admit, died)
        self.takeover = Takeover(groups, writer, keeper, *rest)
        # What was held, or answered and not written yet, when another server answered than before,
        # by whose the requests are, and their ids.
        self._before: dict[_Named, HeldEntry | Literal[True]] = {}
        self._forget_at = 0.0
        self.made = False
        self.received = 0
        # What is read on; and that, its bytes and what was taken, as they were at the last `idles`.
        self._reads: Connection | None = None
        self._seen: tuple[Connection | None, int, int] | None = None

    # The group

    async def make(self, execute: Execute) -> None:
        """Make the group unless it is there. A client doesn't: nobody would read what is in it.

        :param execute: sends a command
        """
        if await self.groups.create(execute) and self.made:
            logger.warning("the consumer group was gone from Redis, and was made again")
            self.held.own_all()
            self._seen = None
        self.made = True
        self._writer.will_acknowledge()
        await self.groups.introduce(execute)

    def take_word(self, word: bytes) -> None:
        """Take what is said to workers."""
        if word == TURN_WORD:
            self.turns.come()
        else:
            self.wake()

    def wake(self) -> None:
        """Note that somebody has handed something back."""
        if self._claimer is not None:
            self._claimer.wake()

    def farewell(self) -> list[Callable[[], Awaitable[object]]]:
        """Return what is to be done in order, once nothing is read any more, before it leaves."""
        if not self.made:
            return []
        first = [] if self._claimer is None else [self._claimer.resign]
        return [*first, self.turns.leave, self.keeper.hand_back, self._leave]

    async def _leave(self) -> None:
        if await self.groups.leave():
            await self._hints.tell_claim()  # others may rest

    # Reading

    def idles(self) -> bool:
        """Whether Redis has said that nothing came, and so that the group is there, since this was
        asked last.
        """
        reads, before = self._reads, self._seen
        seen = self._seen = reads, 0 if reads is None else reads.received, self.received
        if before is None or self._entries:
            return False
        return before[0] is reads and before[1] != seen[1] and before[2] == seen[2]

    def begin(self, tasks: TaskGroup) -> Callable[[], Awaitable[None]]:
        """Return what reads requests.

        :param tasks: where what takes over runs beside it
        """
        common = self._common
        claimer = self._claimer = Claimer(
            self.groups,
            self.takeover,
            self.keeper,
            self._idle,
            tell=self._hints.tell_claim,
            patience=Patience("claims", common.outages, spare=True),
        )
        tasks.start_soon(self._beside, claimer.run, name="anyio_kkrpc redis claims")
        patience = Patience("reading requests", common.outages, heals=())  # it needs rights at once
        return partial(common.loop.run, "requests", partial(self._read, patience), patience)

    async def _read(self, patience: Patience, connection: Connection, portion: ReadPortion) -> None:
        keeper, reader, common = self.keeper, self._reader, self._common
        follow_up, intake = common.follow_up, common.arrivals.intake
        let_others_run = letting_others_run(common.arrivals.queue)
        now, sure_for, turns = keeper.now, keeper.held.sure_for, self.turns
        self._reads = connection
        await self.make(connection.execute)
        if not patience.calm:
            await self.groups.check_rights(connection)
        await self.takeover.recover()
        self.wake()  # now there is a group
        connection.silence = common.silence(connection.role)
        with common.loop.flow.through(patience):
            while True:
                room = keeper.room.now()
                if room <= 0:
                    room = await self._wait_room(connection)
                began = now()
                if began >= turns.ask_at:
                    await turns.wait(connection.execute)
                    began, room = now(), keeper.room.now()
                    if room <= 0:
                        continue
                sure_until = began + sure_for  # as `Keeper.sure_until`, without a call each time
                for entry_id in await reader.read(connection, portion, room, self.take, sure_until):
                    self._skip(entry_id)
                if not patience.calm:
                    patience.worked()
                if reader.count > 1:
                    common.expect_more()
                if self._before and self.keeper.now() > self._forget_at:
                    self._before = {}
                if self._skipped:
                    self._skipped = False
                    await self._writer.flush()
                await follow_up()
                if intake.waiting:
                    await intake.wait()
                await let_others_run()

    async def _wait_room(self, connection: Connection) -> int:
        """Wait for room, and return for how much; if it takes a while another worker comes."""
        room, turns = self.keeper.room, self.turns
        if turns.resting:
            with move_on_after(_SOON):
                return await room.wait()
            await turns.hand_over(connection.execute)
        return await room.wait()

    def take(self, entry_id: bytes, entry: Entry, attempt: int, sure_until: float) -> None:
        """Take an entry.

        :param attempt: how often it has been delivered
        :param sure_until: until when it is surely held
        """
        self.received += 1
        if entry.sender.__class__ is not str and self._is_for_others(entry):
            if entry.recipient is None or entry.fields is None:
                self._skip(entry_id)
                return
            # A Python worker of this group wouldn't see it; TypeScript peers read the stream.
            self._writer.forward(entry_id, attempt, entry.recipient, entry.fields)
            self._skipped = True
            return
        if entry.again and self._goes_on(entry_id, entry, attempt):
            return
        entries = self._entries
        if entry_id in entries:
            if entries[entry_id].holds(entry.sender, entry.record):
                # The group was made anew: it waits or runs here already.
                self.held.regain(entry_id, sure_until)
                return
            self.held.displace(entries[entry_id])
        record = entry.record
        held = HeldEntry(entry_id, attempt, sure_until, entry.sender, False, record)
        if entry.keyed is not None:
            held.keyed = entry.keyed
        if self._shard:
            held.shard = self._shard
        entries[entry_id] = held
        if not self._deliver(entry, entry_id, None, held, attempt + entry.again):
            del entries[entry_id]
            self._skip(entry_id)

    def meet_another(self) -> None:
        """Note that another server answers: what runs here it may not have, and get once more."""
        self._before = dict.fromkeys(self._writer.answering(), True)
        self._forget_at = self.keeper.now() + _REMEMBER
        for held in self._entries.values():
            if held.record is not None:
                self._before[held.sender, id_of(held.record)] = held

    def _goes_on(self, entry_id: bytes, entry: Entry, attempt: int) -> bool:
        """Whether a request runs here, or has, that its caller took for lost and has written again.

        What runs holds this entry from now on: that is acknowledged with its reply, not before.
        What waits is forgotten, and waits once more.
        """
        request: _Named = entry.sender, id_of(entry.record)
        for known, held in self._entries.items():
            if held.started and (held.sender, id_of(held.record)) == request:
                del self._entries[known]
                self._skip(known)
                held.id, held.attempt, held.lost = entry_id, attempt, False
                self._entries[entry_id] = held
                return True
        for forgotten in self._arrivals.forget(entry):
            self.finish(forgotten.token)
        before = self._before.get(request)
        if before is None or (before is not True and not before.started):
            return False
        self._skip(entry_id)  # its reply was written to this server, or is about to be
        return True

    def finish(self, held: HeldEntry) -> None:
        """Acknowledge an entry that was taken and turned out to be none to run."""
        if self._entries.pop(held.id, None) is not None:
            self._skip(held.id)
            self._writer.flush_nowait()

    def _skip(self, entry_id: bytes) -> None:
        """Acknowledge an entry that isn't for this worker to run. To be flushed."""
        self._writer.settle(entry_id, None)
        self._skipped = True

    async def _admit(self) -> None:
        """Wait until what was taken over is in the queue, or has gone back."""
        await self._writer.flush()
        await self._common.arrivals.intake.wait()
        await self.keeper.hand_back()
