"""Which workers of a group wait at the stream while there is little to do.

Redis looks at everybody who waits at a key each time something is added there, so that a lone call
would cost it more, the more workers are idle. So `MOST` of them wait there, and the others *rest*:

- Who has waited for a while asks whether it is to go on. That is decided by a script, which knows
  from a key who waits and who rests, each until a time by which it is to have asked again.
- Who rests asks again the sooner, the fewer do. If requests wait then, those at the stream have
  more to do than they can: so it goes there, however many do, and has two more come. What waits is
  taken at once then, and where nobody is left at the stream it is taken all the same.
- Who can take no more, or leaves, has one come in its place, by a word to its inbox.

A worker that was just started waits, and asks a little later. Where the key can't be written
everybody waits. No request depends on a turn: it only says who looks first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import uniform
from typing import Any

from anyio import move_on_after

from ..._runtime._bell import Bell
from .._connection._command import Execute
from .._connection._errors import RedisError
from .._connection._patience import Outages
from .._stream._keys import Keys

__all__ = ("Turns",)

# Workers of a group that wait at the stream. With 16 a lone call costs Redis a third more than with
# one, says its CPU, and with 64 twice as much.
MOST = 16
# Seconds, the least and the most, after which who was just started asks; after which it asks
# again; and for which it counts as waiting, or resting.
_FIRST = 1.0, 5.0
_AGAIN = 10.0
_COUNTS = 30.0
# Seconds for which who is told to come counts, until it has asked itself.
_COMES = 2.0
# Those who rest look, all together, after so many seconds each time; none does more often than
# after the second number, nor more rarely than a blocking read would end.
_TOGETHER = 0.1
_LEAST = 0.25
_PART = "a turn at the stream"

_PREAMBLE = b"""
if redis.replicate_commands then redis.replicate_commands() end
local turns, me, most, inbox = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3]
local counts, comes = tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local gone = redis.call('ZRANGEBYSCORE', turns, -now, now, 'LIMIT', 0, 100)
redis.call('ZREM', turns, me, unpack(gone))
local function resting() return redis.call('ZCOUNT', turns, '-inf', -now) end
local function waiting() return redis.call('ZCOUNT', turns, now, '+inf') end
local function have_come(number)
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', turns, '-inf', -now, 'LIMIT', 0, 10)) do
    if number == 0 then return end
    redis.call('ZREM', turns, other)
    if redis.call('EXISTS', inbox .. other) == 1 then
      redis.call('XADD', inbox .. other, '*', 'hint', 'turn')
      redis.call('ZADD', turns, now + comes, other)
      number = number - 1
    end
  end
end
"""

# Returns whether this worker is to wait at the stream, and how many rest. Scores are times, in
# milliseconds, until which that counts; those of who rests are negative.
_TAKE_TURN = (
    _PREAMBLE
    + b"""
local stream, group = KEYS[2], ARGV[6]
local function requests_wait()
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  for _, found in ipairs(groups.err and {} or groups) do
    local about = {}
    for i = 1, #found, 2 do about[found[i]] = found[i + 1] end
    if about['name'] == group then
      local last = about['last-delivered-id']
      local reply = redis.pcall('XREAD', 'COUNT', 1, 'STREAMS', stream, last)
      return reply and not reply.err
    end
  end
  return false
end
local goes = waiting() < most
if not goes and requests_wait() then
  goes = true
  have_come(2)
end
redis.call('ZADD', turns, goes and now + counts or -now - counts, me)
redis.call('PEXPIRE', turns, 2 * counts)
return {goes and 1 or 0, resting()}
"""
)

# Returns how many rest.
_PASS_TURN = (
    _PREAMBLE
    + b"""
if waiting() < most then have_come(1) end
return resting()
"""
)


class Turns:
    """One worker's turn to wait at the stream.

    :param request: `Link.request`
    :param session_id: this peer's
    :param longest: seconds for which it rests at most
    :param outages: told that the key can't be written
    :param now: a clock, in seconds
    :ivar resting: how many rested when this worker asked last
    :ivar ask_at: when it is to ask again, on that clock
    """

    def __init__(
        self,
        request: Callable[..., Awaitable[Any]],
        keys: Keys,
        group: bytes,
        session_id: str,
        longest: float,
        outages: Outages,
        now: Callable[[], float],
    ) -> None:
        self._request = request
        self._longest = longest
        self._outages = outages
        self._now = now
        self._told = Bell()
        # Whether the key may have this worker, and whether that counts on it at the stream.
        self._known = self._counts = False
        self.resting = 0
        self.ask_at = now() + uniform(*_FIRST)
        key, times = keys.turns(group), (b"%d" % (_COUNTS * 1000), b"%d" % (_COMES * 1000))
        common = (session_id.encode(), b"%d" % MOST, keys.inbox(""), *times)
        self._ask = (b"EVAL", _TAKE_TURN, b"2", key, keys.stream, *common, group)
        self._pass = (b"EVAL", _PASS_TURN, b"1", key, *common)

    def come(self) -> None:
        """Note that another worker has this one come."""
        self._told.set()

    async def wait(self, execute: Execute) -> None:
        """Wait until it is this worker's turn to wait at the stream, as far as it isn't now.

        :param execute: sends a command
        """
        while not await self._is_to_go(execute):
            pause = min(max(_TOGETHER * self.resting, _LEAST), self._longest)
            with move_on_after(pause * uniform(0.75, 1.0)):
                await self._told.wait()
            if self._told.is_set():
                self._counts = True
                break
        self._told.clear()
        self.ask_at = self._now() + _AGAIN * uniform(0.75, 1.0)

    async def _is_to_go(self, execute: Execute) -> bool:
        # If this is cancelled, or the connection lost, the key may have it all the same.
        known, self._known = self._known, True
        try:
            goes, self.resting = await execute(*self._ask)
        except RedisError as exc:
            self._outages.leave_out(_PART, exc)
            self.resting, self._counts, self._known = 0, False, known
            return True
        self._outages.end(_PART)
        self._counts = bool(goes)
        return self._counts

    async def hand_over(self, execute: Execute) -> None:
        """Have another worker come in place of this one, which can take no more for now.

        :param execute: sends a command
        """
        if self._counts and self.resting:
            self._counts = False
            try:
                self.resting = int(await execute(*self._pass))
            except RedisError as exc:
                self._outages.leave_out(_PART, exc)

    async def leave(self) -> None:
        """Have another worker come in place of this one, for good."""
        if self._known:
            await self._request(*self._pass)
