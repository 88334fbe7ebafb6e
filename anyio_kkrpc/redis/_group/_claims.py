"""What keeps a consumer group's requests from being lost: claims, leases, dead letters.

A worker that has taken an entry holds it until it is acknowledged, and says so to Redis now and
then (*touch*), which resets the entry's idle time. An entry idle for ``claim_idle`` belongs
to a worker that is gone. One worker at a time looks for such entries, page by page, and moves them
to the consumer ``HANDED_BACK``, where all workers take what they have room for; what a worker hands
back when it leaves is there, too. Each step that looks before it acts is one script, so that Redis
decides it at one moment, and each is bounded, so that no script holds up the server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from ..._exceptions import TransportClosedError, TransportConnectionError
from ..._runtime._log import quoted
from .._connection._command import Command, Execute
from .._connection._errors import Meaning, ResponseError, meaning_of, reason
from .._connection._link import Link
from .._connection._portion import Portion
from .._connection._resp import Connection
from .._reading._reader import Decoder, GroupReader, create_group
from .._stream._entries import pairs
from .._stream._keys import DELAYED, HANDED_BACK, Keys
from .._stream._rights import check_rights
from ._scripts import HAND_BACK, LEAD, LEAVE, LOOK, RECOVER, REMOVE, RESIGN, TAKE, TOUCH

logger = logging.getLogger("anyio_kkrpc")

# Pending entries that one script looks at, which takes Redis about half a millisecond.
PAGE = 500
# Ids that one script touches or hands back.
_CHUNK = 250
# Consumers that one script removes.
_SWEEP_CHUNK = 100
# Entries in one reply are hardly more than so many bytes, or one: what is larger than
# client-output-buffer-limit of the server would never arrive. If it doesn't, it becomes less.
_REPLY_BYTES = 128 * 1024
_LEAST_BYTES = 1024
# What a leaving consumer owns for no longer than that, in seconds, came by its last read.
_JUST_NOW = 5
# An idle time, in milliseconds, that is more than any claim_idle.
_LONG_IDLE = b"2147483647"
# The longest pause, in milliseconds, before a request is delivered again; or claim_idle, if longer.
_LONGEST_PAUSE = b"300000"
# How long nobody else looks after a claimer was last heard of, as a part of claim_idle.
_LEASE = 0.6


class Taken(Struct):
    """An entry that was taken over, or given up.

    :ivar attempt: how often it has been delivered
    :ivar refusal: why it could not become a dead letter
    """

    id: bytes
    attempt: int
    fields: list[bytes]
    refusal: bytes = b""


class Claims(Struct):
    """What `Groups.take` and `Groups.recover` found.

    :ivar dead: given up; they are dead letters now
    :ivar kept: given up, but they could not become dead letters, and will be tried again
    :ivar more: whether there is more to take
    :ivar pending: whether the group has anything to finish, whoever has it
    :ivar after: where `Groups.recover` goes on, ``None`` at the end
    """

    taken: list[Taken]
    dead: list[Taken]
    kept: list[Taken]
    more: bool = False
    pending: bool = True
    after: bytes | None = None


class Look(Struct):
    """What `Groups.look` found.

    :ivar due: how many entries are for anybody now that belonged to workers that are gone
    :ivar soonest: seconds until the next one of this page is due, ``None`` if there is none
    :ivar last: the last id of a page after which there may be more, ``None`` if there isn't
    """

    due: int
    soonest: float | None
    last: bytes | None


class Groups:
    """One worker's scripts on one group.

    :ivar stream: key of the stream
    :param claim_idle: seconds after which an entry that is held and not touched is lost
    :param max_deliveries: how often an entry is delivered
    :param introduction: the command that tells whose the consumer is, if its name doesn't
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        group: bytes,
        consumer: bytes,
        *,
        claim_idle: float,
        max_deliveries: int,
        introduction: Command | None = None,
    ) -> None:
        self._link = link
        self._introduction = introduction
        self._keys = keys
        self.stream = keys.stream
        self._dead = keys.dead
        self._lease = keys.claimer(group)
        self._group = group
        self._consumer = consumer
        self._idle = b"%d" % max(round(claim_idle * 1000), 1)
        self._half_idle = b"%d" % (claim_idle * 500)
        self._lease_ms = b"%d" % max(round(claim_idle * _LEASE * 1000), 1)
        self._limit = b"%d" % max_deliveries
        self._leaseless = self._unknown = self._introduced = False
        self._namesake = b""
        self._reply = Portion(_REPLY_BYTES, _LEAST_BYTES)

    async def introduce(self, execute: Execute) -> None:
        """Tell whose this consumer is, so that cancels find the way.

        Where that can't be told they go to all peers.
        """
        if self._introduction is None:
            return
        if self._introduced:
            await self._look_for_namesake(execute, self._introduction)
        try:
            await execute(*self._introduction)
        except ResponseError as exc:
            if meaning_of(exc) not in (Meaning.RIGHTS, Meaning.REFUSED):
                raise
            if not self._unknown:
                self._unknown = True
                logger.warning(
                    "cancels for this worker go to all peers, since nothing tells whose its "
                    "consumer is: %s",
                    reason(exc),
                )
        else:
            self._unknown = False
            self._introduced = True

    async def _look_for_namesake(self, execute: Execute, introduction: Command) -> None:
        """Warn if another worker has the name of this one: it has introduced itself since.

        One that had it before does so no more.
        """
        try:
            found = await execute(b"XREVRANGE", introduction[3], b"+", b"-", b"COUNT", b"1")
        except ResponseError:
            return  # whoever may write it and not read it isn't told
        for _, fields in found:
            session = pairs(fields).get(b"session")  # a newer version may tell more
            if session not in (None, introduction[-1], self._namesake):
                self._namesake = session
                logger.warning(
                    "the worker %r of the group %r lives twice: peer %r has this consumer_name, "
                    "too. Each takes what the other one holds for its own, and runs it a second "
                    "time; give each worker a name of its own",
                    self._consumer.decode(errors="backslashreplace"),
                    self._group.decode(errors="backslashreplace"),
                    quoted(session.decode(errors="backslashreplace"), 200),
                )

    # The group

    async def create(self, execute: Execute) -> bool:
        """Create the group; return false if it is there.

        :param execute: sends a command
        """
        return await create_group(execute, self.stream, self._group)

    async def check_rights(self, connection: Connection) -> None:
        """Raise if the user lacks rights that a worker needs; see there."""
        await check_rights(connection.execute_many, self._keys, self._group, self._consumer)

    def reader(self, decoder: Decoder, block_timeout: float) -> GroupReader:
        """Return what takes entries that nobody has had yet."""
        return GroupReader(self.stream, self._group, self._consumer, decoder, block_timeout)

    # Entries

    async def take(self, count: int, now: float) -> Claims:
        """Take at most ``count`` entries that were handed back or lost.

        What is taken and lost with its connection is lost once more, and found by `look`.

        :param now: Redis' time in seconds
        """
        what = (b"%d" % count, self._limit, _ms(now), HANDED_BACK, DELAYED)
        command = self._take_over(TAKE, self._reply.size, *what)
        try:
            taken, dead, kept, more, pending = _claims(await self._link.attempt(*command))
        except (TransportConnectionError, TransportClosedError):
            if self._link.ended:
                raise
            self._reply.cut("what was handed back")
            return Claims([], [], [], more=True)
        self._reply.came(self._reply.size)
        return Claims(taken, dead, kept, more=bool(more), pending=bool(pending))

    async def recover(
        self,
        now: float,
        known: Iterable[bytes],
        *,
        counted: bool,
        start: bytes = b"-",
        count: int = PAGE,
    ) -> Claims:
        """Take what this consumer holds and doesn't know of: its read was cut, or its process died.

        :param now: Redis' time in seconds
        :param known: ids that it does know of
        :param counted: whether that is one more delivery, because the process died
        :param start: `Claims.after` of the page before
        :param count: entries to look at
        """
        bounds = (self._limit, _ms(now), self._idle, _LONGEST_PAUSE, DELAYED)
        deliveries = iter((b"%d" % counted,))

        def command(size: int) -> Command:
            # One that was lost may have been carried out, and is not to be counted again.
            page = (start, b"%d" % count, next(deliveries, b"0"))
            return self._take_over(RECOVER, size, *page, *bounds, *known)

        reply = await self._link.ask("what this worker holds", self._reply, command)
        taken, dead, kept, last = _claims(reply)
        self._reply.came(self._reply.size)
        return Claims(taken, dead, kept, after=_after(last))

    async def touch(self, ids: list[bytes]) -> list[bytes]:
        """Keep these entries; return those that another worker has taken over meanwhile."""
        lost: list[bytes] = []
        for start in range(0, len(ids), _CHUNK):
            lost += await self._eval(TOUCH, *ids[start : start + _CHUNK])
        return lost

    async def hand_back(self, entries: list[tuple[bytes, int]]) -> int:
        """Give entries back so that others take them at once.

        :param entries: ids with the number of deliveries that is to count from now on
        """
        done = 0
        for start in range(0, len(entries), _CHUNK):
            flat: list[bytes] = []
            for entry_id, deliveries in entries[start : start + _CHUNK]:
                flat += (entry_id, b"%d" % deliveries)
            done += await self._eval(HAND_BACK, HANDED_BACK, _LONG_IDLE, *flat)
        return done

    # What was lost

    async def lead(self) -> bool:
        """Become, or stay, the one who looks for what was lost; return whether that is so.

        That lasts for a part of ``claim_idle``. Where it can't be kept, everybody looks.
        """
        try:
            leads = await self._link.request(
                b"EVAL", LEAD, b"1", self._lease, self._consumer, self._lease_ms
            )
        except ResponseError as exc:
            if meaning_of(exc) not in (Meaning.RIGHTS, Meaning.REFUSED):
                raise
            if not self._leaseless:
                self._leaseless = True
                logger.warning(
                    "each worker of the group looks for lost requests, since who does can't be "
                    "kept in the key %r: %s",
                    self._lease.decode(errors="backslashreplace"),
                    reason(exc),
                )
            return True
        self._leaseless = False
        return bool(leads)

    async def resign(self) -> None:
        """Let somebody else look."""
        await self._link.request(b"EVAL", RESIGN, b"1", self._lease, self._consumer)

    async def look(self, start: bytes = b"-", end: bytes | None = None) -> Look:
        """Look at one page of what is pending, and let anybody take what was lost.

        :param start: id to begin with, or ``(`` and the one before
        :param end: the last id to look at. Then only what has been idle for half of ``claim_idle``
            is looked at, which takes Redis a tenth of the time, if there isn't much of it.
        """
        due, soonest, last = await self._eval(
            LOOK,
            start,
            b"+" if end is None else end,
            b"0" if end is None else self._half_idle,
            b"%d" % PAGE,
            self._idle,
            _LONGEST_PAUSE,
            self._limit,
            HANDED_BACK,
            DELAYED,
            _LONG_IDLE,
        )
        return Look(due, None if soonest < 0 else soonest / 1000, last or None)

    # Consumers

    async def leave(self) -> int:
        """Remove this consumer from the group, and give what it still owns to others; return how
        much that was.

        That is what its last read took whose reply didn't come: it doesn't count as delivered.
        """
        just_now, given, last = b"%d" % (_JUST_NOW * 1000), 0, _CHUNK
        while last == _CHUNK:
            last = await self._eval(LEAVE, HANDED_BACK, _LONG_IDLE, just_now, b"%d" % _CHUNK)
            given += last
        if self._introduction is not None:
            await self._link.request(b"DEL", self._introduction[3])
        return given

    async def sweep(self, idle: float) -> int:
        """Remove consumers that did nothing for ``idle`` seconds and hold nothing."""
        reply = await self._link.request(b"XINFO", b"CONSUMERS", self.stream, self._group)
        consumers = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in reply]
        names = [
            consumer[b"name"]
            for consumer in consumers
            if not consumer[b"pending"]
            and consumer[b"idle"] > idle * 1000
            and consumer[b"name"] != self._consumer
        ]
        removed = 0
        for start in range(0, len(names), _SWEEP_CHUNK):
            chunk = names[start : start + _SWEEP_CHUNK]
            command = (b"EVAL", REMOVE, b"1", self.stream, self._group, *chunk)
            removed += int(await self._link.request(*command))
        return removed

    async def _eval(self, script: bytes, *args: bytes) -> Any:
        return await self._link.request(
            b"EVAL", script, b"1", self.stream, self._group, self._consumer, *args
        )

    def _take_over(self, script: bytes, size: int, *args: bytes) -> Command:
        keys = (b"2", self.stream, self._dead, self._group, self._consumer)
        return (b"EVAL", script, *keys, b"%d" % size, *args)


def _claims(reply: Any) -> tuple[Any, ...]:
    taken, dead, kept = ([Taken(*item) for item in items] for items in reply[:3])
    return taken, dead, kept, *reply[3:]


def _after(last: bytes) -> bytes | None:
    return b"(" + last if last else None


def _ms(now: float) -> bytes:
    return b"%d" % max(round(now * 1000), 0)
