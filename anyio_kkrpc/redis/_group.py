"""What keeps a consumer group's requests from being lost: claims, leases, dead letters.

A worker that has taken an entry holds it until it is acknowledged, and says so to Redis now and
then (*touch*), which resets the entry's idle time. An entry idle for ``claim_idle`` belongs
to a worker that is gone: another one claims it. Each step that looks before it acts is one script,
so that Redis decides it at one moment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from ._dead_letters import WRITE_LETTER
from ._link import Link

logger = logging.getLogger("anyio_kkrpc")

# Owns, in Redis, what workers that left in good order handed back.
HANDED_BACK = b"kkrpc-handed-back"
# Ids that one script touches or hands back.
_CHUNK = 500
# An idle time, in milliseconds, that is more than any claim_idle.
_LONG_IDLE = b"2147483647"

_PREAMBLE = b"""
if redis.replicate_commands then redis.replicate_commands() end
local stream, group, me = KEYS[1], ARGV[1], ARGV[2]
"""

_TOUCH = (
    _PREAMBLE
    + b"""
local lost = {}
for i = 3, #ARGV do
  if #redis.call('XPENDING', stream, group, ARGV[i], ARGV[i], 1, me) > 0 then
    redis.call('XCLAIM', stream, group, me, 0, ARGV[i], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)

# Entries not taken here yet keep their number of deliveries; see `Groups.hand_back`.
_HAND_BACK = (
    _PREAMBLE
    + b"""
local done = 0
for i = 5, #ARGV, 2 do
  if #redis.call('XPENDING', stream, group, ARGV[i], ARGV[i], 1, me) > 0 then
    redis.call('XCLAIM', stream, group, ARGV[3], 0, ARGV[i], 'IDLE', ARGV[4],
      'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
    done = done + 1
  end
end
return done
"""
)

# Takes entries over: of others that were idle for long, or (mode own) of this consumer that it
# doesn't know of. Those delivered too often become dead letters. Tells how long the longest of the
# others has been idle.
_TAKE_OVER = (
    _PREAMBLE
    + WRITE_LETTER
    + b"""
local mode, idle, wanted = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local limit, now, handed_back = tonumber(ARGV[6]), ARGV[7], ARGV[8]
local taken, dead, oldest = {}, {}, -1
local known = {}
for i = 9, #ARGV do known[ARGV[i]] = true end
local pending
if mode == 'others' then
  pending = redis.call('XPENDING', stream, group, 'IDLE', math.floor(idle / 2), '-', '+', 1000)
else
  pending = redis.call('XPENDING', stream, group, '-', '+', 10000, me)
end
local from_handed_back = false
for _, item in ipairs(pending) do
  local id, owner, idle_now, deliveries = item[1], item[2], item[3], item[4]
  local mine = owner == me
  if mode == 'others' and (mine or idle_now < idle or #taken >= wanted) then
    if not mine and idle_now > oldest then oldest = idle_now end
  elseif not known[id] then
    local entry = redis.call('XRANGE', stream, id, id)
    if owner == handed_back then from_handed_back = true end
    if #entry == 0 then
      redis.call('XACK', stream, group, id)
    elseif mode ~= 'own' and deliveries >= limit then
      write_letter(KEYS[2], id, group, deliveries, now, entry[1][2])
      redis.call('XACK', stream, group, id)
      dead[#dead + 1] = {id, deliveries, entry[1][2]}
    else
      if mode == 'own' then
        redis.call('XCLAIM', stream, group, me, 0, id, 'JUSTID')
        taken[#taken + 1] = {id, deliveries, entry[1][2]}
      else
        redis.call('XCLAIM', stream, group, me, 0, id)
        taken[#taken + 1] = {id, deliveries + 1, entry[1][2]}
      end
    end
  end
end
if from_handed_back and #redis.call('XPENDING', stream, group, '-', '+', 1, handed_back) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', stream, group, handed_back)
end
return {taken, dead, oldest}
"""
)

# Removes a consumer only if it holds nothing.
_REMOVE_CONSUMER = (
    _PREAMBLE
    + b"""
if #redis.call('XPENDING', stream, group, '-', '+', 1, me) > 0 then return 0 end
return redis.call('XGROUP', 'DELCONSUMER', stream, group, me) + 1
"""
)

# Removes consumers that have been idle for long and hold nothing.
_SWEEP = (
    _PREAMBLE
    + b"""
local removed = 0
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local consumer = {}
  for i = 1, #flat, 2 do consumer[flat[i]] = flat[i + 1] end
  if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[3])
      and consumer['name'] ~= me then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer['name'])
    removed = removed + 1
  end
end
return removed
"""
)


class Taken(Struct):
    """An entry that was taken over, or given up.

    :ivar attempt: how often it has been delivered
    """

    id: bytes
    attempt: int
    fields: list[bytes]


class Claims(Struct):
    """What `Groups.claim` found.

    :ivar oldest: seconds that the longest-idle entry of another worker has been idle, of those that
        have been for half of ``claim_idle`` at least; ``None`` if there is none
    """

    taken: list[Taken]
    dead: list[Taken]
    oldest: float | None


class Groups:
    """One worker's scripts on one group."""

    def __init__(
        self,
        link: Link,
        stream: bytes,
        dead: bytes,
        group: bytes,
        consumer: bytes,
        *,
        claim_idle: float,
        max_deliveries: int,
    ) -> None:
        self._link = link
        self._stream = stream
        self._dead = dead
        self._group = group
        self._consumer = consumer
        self._idle = b"%d" % max(round(claim_idle * 1000), 1)
        self._limit = b"%d" % max_deliveries

    async def claim(self, count: int, now: float) -> Claims:
        """Take over at most ``count`` entries of workers that are gone.

        :param now: Redis' time in seconds
        """
        return await self._take_over(b"others", count, now, ())

    async def recover(self, now: float, known: Iterable[bytes], *, counted: bool) -> Claims:
        """Take what this consumer holds and doesn't know of: its read was cut, or its process died.

        :param known: ids that it does know of
        :param counted: whether that is one more delivery, because the process died
        """
        return await self._take_over(b"own counted" if counted else b"own", 10_000, now, known)

    async def _take_over(
        self, mode: bytes, count: int, now: float, known: Iterable[bytes]
    ) -> Claims:
        taken, dead, oldest = await self._link.request(
            b"EVAL",
            _TAKE_OVER,
            b"2",
            self._stream,
            self._dead,
            self._group,
            self._consumer,
            mode,
            self._idle,
            b"%d" % count,
            self._limit,
            b"%d" % max(round(now * 1000), 0),
            HANDED_BACK,
            *known,
        )
        return Claims(
            [Taken(*item) for item in taken],
            [Taken(*item) for item in dead],
            None if oldest < 0 else oldest / 1000,
        )

    async def touch(self, ids: list[bytes]) -> list[bytes]:
        """Keep these entries; return those that another worker has taken over meanwhile."""
        lost: list[bytes] = []
        for start in range(0, len(ids), _CHUNK):
            lost += await self._eval(_TOUCH, *ids[start : start + _CHUNK])
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
            done += await self._eval(_HAND_BACK, HANDED_BACK, _LONG_IDLE, *flat)
        return done

    async def remove_consumer(self) -> None:
        """Remove this consumer from the group, unless it holds something."""
        await self._eval(_REMOVE_CONSUMER)

    async def sweep(self, idle: float) -> int:
        """Remove consumers that did nothing for ``idle`` seconds and hold nothing."""
        return int(await self._eval(_SWEEP, b"%d" % round(idle * 1000)))

    async def _eval(self, script: bytes, *args: bytes) -> Any:
        return await self._link.request(
            b"EVAL", script, b"1", self._stream, self._group, self._consumer, *args
        )
