"""Whether the shard that new calls go to is far behind, so that others answer sooner.

Nothing is asked while calls there are answered. If none was for a second though some are open, or
one waits for long, its group is asked how far it has come: what has waited for seconds, and is
still read by nobody, or waits though for seconds nobody has read anything, is far behind. New calls
then go to a shard whose workers live and read, and where nothing has waited for half as long. The
one that was left is asked now and then, and gone back to once nothing waits there, after a time
that becomes longer each time that it is left again soon: so nobody goes to and fro. All these times
differ from peer to peer, so that not all go at once: those who stay see whether that was enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import uniform
from typing import Protocol

from anyio import current_time, move_on_after, sleep
from msgspec import Struct

from ..._exceptions import RPCError
from ...abc import Envelope
from .._connection._errors import RedisError
from .._group._reasons import ALIVE, entry_id_of
from .._options import Options
from .._stream._entries import order
from .._stream._keys import DELAYED, HANDED_BACK
from .._stream._scripts import BY_NAME
from ._home import Home
from ._lanes import Lanes

__all__ = ("Behind", "Progress", "Shown")

# Seconds between two looks, and that a group has to tell.
_INTERVAL = 1.0
_WITHIN = 1.0
# Seconds between two answers for which something is taken to have waited in between.
_GAP = 5.0
# Seconds after which what waits is far behind: between these, so that not all peers go at once.
_LEAST, _MOST = 2.0, 4.0
# What waits for less, in seconds, in a shard that was left is no reason to stay away.
_CAUGHT_UP = 0.5
# Seconds after which one that was left is asked, at first and at most; and within which it is left
# again if it was gone back to too early.
_BACK, _LONGEST = 5.0, 300.0
_SOON = 60.0
_PART = "looking how far a shard has come"

# Returns up to where a group has read a stream, for how many milliseconds the first request behind
# that has waited, and how many workers live. KEYS: the stream. ARGV: the group, milliseconds, and
# the names of consumers that are no workers.
_PROGRESS = (
    BY_NAME
    + b"""
local last, waited, workers = '0-0', 0, 0
if redis.call('EXISTS', KEYS[1]) == 0 then return {last, waited, workers} end
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = by_name(flat)
  if group['name'] == ARGV[1] then
    last = group['last-delivered-id']
    for _, other in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
      local one = by_name(other)
      local counts = one['name'] ~= ARGV[3] and one['name'] ~= ARGV[4]
      if counts and one['idle'] < tonumber(ARGV[2]) then workers = workers + 1 end
    end
  end
end
local first = redis.call('XREAD', 'COUNT', 1, 'STREAMS', KEYS[1], last)
if first then
  local time = redis.call('TIME')
  waited = time[1] * 1000 + math.floor(time[2] / 1000) - string.match(first[1][2][1][1], '^%d+')
end
return {last, math.max(waited, 0), workers}
"""
)


class Progress(Struct, frozen=True):
    """How far the group of a shard has come.

    :ivar last: id of the last entry that somebody has read
    :ivar waited: seconds for which the first one behind that has waited, 0 if there is none
    :ivar workers: how many live
    """

    last: bytes
    waited: float
    workers: int


class Shows(Protocol):
    """What tells how far shards have come."""

    def oldest(self, shard: int, after: bytes) -> float | None:
        """Return how many seconds the oldest unanswered request of this peer has waited that is in
        a shard, behind an entry; ``None`` if there is none.
        """
        ...

    def received(self, shard: int) -> int:
        """Return how many records came from a shard."""
        ...

    async def ask(self, shard: int) -> Progress | None:
        """Ask the group of a shard; return ``None`` if it doesn't tell."""
        ...


class Behind:
    """Has new calls go elsewhere, and back.

    :param home: says where they go
    :param open: has this peer connect to a shard
    :param shown: tells how far shards have come
    """

    def __init__(self, home: Home, open: Callable[[int], object], shown: Shows) -> None:
        self._home = home
        self._open = open
        self._shown = shown
        self._stands_since: float | None = None
        self._seen_at = 0.0
        self._arrive()
        self._pause = _BACK
        self._gone_back_at = float("-inf")
        self._ask_at = 0.0
        self._caught_up = False

    async def run(self) -> None:
        """Look again and again. Goes on for ever."""
        while True:
            await sleep(_INTERVAL)
            await self.look(current_time())

    async def look(self, now: float) -> None:
        """Move, if that is called for.

        :param now: on AnyIO's clock, in seconds
        """
        home = self._home
        if home.behind and home.shard != home.first:
            await self._look_back(now)
        if home.shard != self._shard:
            self._arrive()
        if not home.connected(self._shard) or not self._suspects():
            return
        here = await self._shown.ask(self._shard)
        if here is None:
            return
        waited = self._waited(here, now)
        self._read = here.last
        if waited >= self._limit and home.shard == self._shard:
            await self._leave(waited, now)

    def _arrive(self) -> None:
        """Note that new calls go to another shard."""
        self._shard = self._home.shard
        self._limit = uniform(_LEAST, _MOST)
        # Up to where the group is known to have read; since when it stands there though something
        # waits; and how many records had come from there at the last look.
        self._read, self._stands_since = b"0-0", None
        self._came = -1
        # What others told when they were asked before.
        self._others: dict[int, Progress] = {}
        # When another shard is opened, since none of those that are open is better.
        self._open_at, self._tried = 0.0, set[int]()

    def _suspects(self) -> bool:
        """Whether the group is to be asked."""
        came, before = self._shown.received(self._shard), self._came
        self._came = came
        oldest = self._shown.oldest(self._shard, self._read)
        return oldest is not None and (came == before or oldest >= self._limit)

    def _waited(self, here: Progress, now: float) -> float:
        """Return for how many seconds something has waited, whatever its place.

        Requests whose time is over are taken back, and so may be young for ever.
        """
        if not here.waited:
            self._stands_since = None
            return 0.0
        since, seen = self._stands_since, self._seen_at
        if since is None or here.last != self._read or now - seen > _GAP:
            since = self._stands_since = now
        self._seen_at = now
        return max(here.waited, now - since)

    async def _leave(self, waited: float, now: float) -> None:
        """Go to a shard that is better, if there is one; if none is among those that are open, open
        one more.
        """
        home = self._home
        for shard in home.order:
            if shard == self._shard or not home.connected(shard):
                continue
            there, before = await self._shown.ask(shard), self._others.get(shard)
            if there is None:
                continue
            self._others[shard] = there
            reads = not there.waited or (before is not None and before.last != there.last)
            if there.workers and reads and there.waited * 2 <= waited:
                if self._shard == home.first:
                    again = now - self._gone_back_at < _SOON
                    self._pause = min(self._pause * 2, _LONGEST) if again else _BACK
                    self._put_off(now)
                home.leave_behind(shard)
                return
        if now >= self._open_at:
            tried = self._tried
            closed = (one for one in home.order if not home.connected(one) and one not in tried)
            for one in closed:
                tried.add(one)
                self._open_at = now + 2 ** len(tried)
                self._open(one)
                return

    def _put_off(self, now: float) -> None:
        self._ask_at = now + self._pause * uniform(1.0, 2.0)
        self._caught_up = False

    async def _look_back(self, now: float) -> None:
        """Go back to the first one if it has caught up, and had when it was asked before."""
        home = self._home
        if now < self._ask_at or not home.connected(home.first):
            return
        before = self._caught_up
        self._put_off(now)
        there = await self._shown.ask(home.first)
        self._caught_up = there is not None and there.workers > 0 and there.waited < _CAUGHT_UP
        if self._caught_up and before:
            self._gone_back_at = now
            home.go_back()


class Shown:
    """Asks the groups, and looks at this peer's own requests.

    :param waiting: returns the requests that wait for a reply
    :param place: returns the shard that a request was sent in
    """

    def __init__(
        self,
        options: Options,
        lanes: Lanes,
        waiting: Callable[[], Sequence[Envelope]],
        place: Callable[[Envelope], int | None],
    ) -> None:
        self._group = options.consumer_group.encode()
        self._options = options
        self._lanes = lanes
        self._waiting = waiting
        self._place = place

    def oldest(self, shard: int, after: bytes) -> float | None:
        """See `Shows`; one of which it isn't known yet whether Redis has it doesn't count."""
        behind, lane = order(after), self._lanes.make(shard)
        for request in self._waiting():
            if request.recipient is None and self._place(request) == shard:
                entry_id = entry_id_of(request)
                if entry_id and order(entry_id) > behind:
                    return lane.clock.now() - order(entry_id)[0] / 1000
        return None

    def received(self, shard: int) -> int:
        """Return how many records came from a shard."""
        return self._lanes.make(shard).addressed.received

    async def ask(self, shard: int) -> Progress | None:
        """Ask the group of a shard, which may be away."""
        lane = self._lanes.make(shard)
        command = (b"EVAL", _PROGRESS, b"1", self._options.of_shard(shard).stream.encode())
        about = (self._group, b"%d" % (ALIVE * 1000), HANDED_BACK, DELAYED)
        with move_on_after(_WITHIN):
            try:
                found = await lane.link.attempt(*command, *about)
            except RPCError:
                return None
            except RedisError as exc:
                lane.outages.leave_out(_PART, exc)
                return None
            lane.outages.end(_PART)
            return Progress(found[0], found[1] / 1000, found[2])
        return None
