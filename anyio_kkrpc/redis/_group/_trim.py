"""Keeping a stream at about ``max_len`` entries, without those that a group hasn't acknowledged."""

from __future__ import annotations

from anyio import Event, move_on_after, sleep

from ..._exceptions import TransportClosedError, TransportConnectionError
from .._connection._errors import RedisError
from .._connection._link import Link
from .._connection._patience import Outages, Patience
from .._stream._scripts import BEFORE, BY_NAME

# Entries that are counted between two trims, where max_len is larger.
_TRIM_AT_MOST = 1000
# Seconds after which fewer are reason enough.
_TRIM_AFTER = 10.0
# What one script removes, and the bytes of what it looks at.
_PAGE = b"1000"
_PAGE_BYTES = b"1048576"
# Between two of them Redis has so many seconds for others.
_BREATH = 0.01

# Removes the oldest entries, but none that a group has not read and acknowledged. If there is no
# group yet, and ARGV[2] is 'group', all is for its first worker. Returns how many went, and whether
# there may be more to remove. What it looks at is not needed, but there is no other way to know how
# many entries are before an id.
_TRIM = (
    BEFORE
    + BY_NAME
    + b"""
local stream, wanted, mode = KEYS[1], tonumber(ARGV[1]), ARGV[2]
local length = redis.call('XLEN', stream)
local count = math.min(length - wanted, tonumber(ARGV[3]))
if count <= 0 then return {0, 0} end
local groups = redis.call('XINFO', 'GROUPS', stream)
if #groups == 0 then
  if mode == 'group' then return {0, 0} end
  redis.call('XTRIM', stream, 'MAXLEN', length - count)
  return {count, count < length - wanted and 1 or 0}
end
local last, is_done  -- what comes before it may go, and so may itself if it is done
for _, flat in ipairs(groups) do
  local group = by_name(flat)
  local id, done = group['last-delivered-id'], true
  if group['pending'] > 0 then
    id, done = redis.call('XPENDING', stream, group['name'], '-', '+', 1)[1][1], false
  end
  if not last or before(id, last) or (id == last and not done) then last, is_done = id, done end
end
local removed, bytes, start, more = 0, 0, '-', 1
while removed < count and bytes < tonumber(ARGV[4]) do
  local page = redis.call('XRANGE', stream, start, '+', 'COUNT', math.min(count - removed, 10))
  for _, entry in ipairs(page) do
    local id = entry[1]
    if not before(id, last) and not (is_done and id == last) then
      count, more = removed, 0
      break
    end
    for _, value in ipairs(entry[2]) do bytes = bytes + #value end
    removed, start = removed + 1, '(' .. id
  end
end
if removed > 0 then redis.call('XTRIM', stream, 'MAXLEN', length - removed) end
return {removed, removed < length - wanted and more or 0}
"""
)


class Trim:
    """Trims a stream when enough has been added to it or finished.

    Who adds counts, and so does who serves: clients may come and go, and need not know ``max_len``.

    :param stream: its key
    :param max_len: how many entries it is to keep
    :param grouped: whether, without any group, all entries wait for the first worker of one
    :param outages: told of what is refused
    """

    def __init__(self, stream: bytes, max_len: int, grouped: bool, outages: Outages) -> None:
        mode = b"group" if grouped else b"broadcast"
        self._command = (b"EVAL", _TRIM, b"1", stream, b"%d" % max_len, mode, _PAGE, _PAGE_BYTES)
        self._each = min(max(max_len // 10, 1), _TRIM_AT_MOST)
        self._counted = 0
        self._wanted = Event()
        self._patience = Patience("trimming", outages, spare=True)

    def count(self, number: int = 1) -> None:
        """Note that entries were added to the stream, or finished."""
        self._counted += number
        if self._counted >= self._each:
            self._wanted.set()

    async def run(self, link: Link) -> None:
        """Trim until the link ends.

        :raises RedisError: if no further attempt is of use
        """
        try:
            while True:
                with move_on_after(_TRIM_AFTER):
                    await self._wanted.wait()
                try:
                    pause = _BREATH if await self._trim(link) else 0
                except RedisError as exc:
                    pause = self._patience.pause(exc)
                await sleep(pause)
        except (TransportClosedError, TransportConnectionError):
            return

    async def finish(self, link: Link) -> None:
        """Trim once more, if anything was counted: this peer may not have lived for long."""
        await self._trim(link)

    async def _trim(self, link: Link) -> bool:
        """Trim, unless there is no reason; return whether there is more to do."""
        if not self._counted:
            return False
        counted, self._counted = self._counted, 0
        self._wanted = Event()
        try:
            _, more = await link.request(*self._command)
        except RedisError:
            self.count(max(counted, self._each))
            raise
        if not self._patience.calm:
            self._patience.worked()
        if more:
            self.count(max(counted, self._each))
        return bool(more)
