"""Why requests have no answer yet, as far as Redis tells: one look at the groups of the stream."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ..._exceptions import RPCError
from ..._runtime._log import quoted
from ...abc import Envelope, Explanation
from .._connection._errors import RedisError
from .._connection._link import Link
from .._stream._entries import order
from .._stream._keys import DELAYED, HANDED_BACK, Keys
from .._stream._scripts import BEFORE, BY_NAME
from .._writing._ledger import Post
from ._keeping import LIVES

# Requests whose holders one script looks for, which takes Redis about half a millisecond.
MOST = 50
# Seconds without a sign of life after which a worker doesn't count.
ALIVE = 4 * LIVES
# Groups that are looked at, should the stream have several, none of which has the right name.
_GROUPS = 3

# Looks at the group with a name, or the first ones if there is none such: its last id, how many
# workers live, how many of these hold something, and how much; and for each request who has it, how
# many milliseconds ago that was last said, and how often it was delivered; 0 if nobody has read it,
# 1 if it was acknowledged. KEYS: the stream. ARGV: name, groups, milliseconds, the names of
# consumers that are no workers, then ids.
_EXPLAIN = (
    BEFORE
    + BY_NAME
    + b"""
local stream, groups, found = KEYS[1], {}, {}
if redis.call('EXISTS', stream) == 0 then return found end
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local group = by_name(flat)
  if group['name'] == ARGV[1] then
    groups = {group}
    break
  end
  if #groups < tonumber(ARGV[2]) then groups[#groups + 1] = group end
end
for _, group in ipairs(groups) do
  local name, workers, busy, held, holders = group['name'], 0, 0, 0, {}
  for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', stream, name)) do
    local one = by_name(flat)
    if one['name'] ~= ARGV[4] and one['name'] ~= ARGV[5] and one['idle'] < tonumber(ARGV[3]) then
      workers = workers + 1
      if one['pending'] > 0 then busy = busy + 1 end
      held = held + one['pending']
    end
  end
  for i = 6, #ARGV do
    local item, id = 1, ARGV[i]
    if before(group['last-delivered-id'], id) then
      item = 0
    else
      local pending = redis.call('XPENDING', stream, name, id, id, 1)[1]
      if pending then item = {pending[2], pending[3], pending[4]} end
    end
    holders[i - 5] = item
  end
  found[#found + 1] = {name, group['last-delivered-id'], workers, busy, held, holders}
end
return found
"""
)


class _Group(Struct):
    """A group as it was found: see `_EXPLAIN`."""

    name: bytes
    last: bytes
    workers: int
    busy: int
    held: int
    holders: list[int | tuple[bytes, int, int]]

    def explain(self, entry_id: bytes | None, number: int) -> Explanation:
        """Return what is known of one request.

        :param entry_id: its id; ``None`` if that isn't known yet: then nobody has it
        :param number: its place among those that were looked for
        """
        if number < len(self.holders):
            holder = self.holders[number]
        else:
            holder = int(entry_id is not None and order(entry_id) <= order(self.last))
        if holder == 0:
            return self._not_taken()
        if isinstance(holder, int):
            looked = number < len(self.holders)
            return Explanation(
                "a worker had it, and is done" if looked else "a worker has taken it"
            )
        consumer, idle, deliveries = holder
        if consumer == HANDED_BACK:
            return Explanation(f"{self._not_taken().text}; it was given back by another one")
        if consumer == DELAYED:
            return Explanation(
                f"it was delivered {deliveries} times without being finished, and is to wait"
            )
        times = f", delivered {deliveries} times" if deliveries != 1 else ""
        name = quoted(_text(consumer), 200)
        return Explanation(
            f"{name!r} has taken it{times}, and still had it {idle / 1000:.1f} s before"
        )

    def _not_taken(self) -> Explanation:
        group = f"the group {quoted(_text(self.name), 200)!r}"
        if not self.workers:
            return Explanation(f"no worker has taken it: {group} has no workers", unserved=True)
        text = f"no worker has taken it: {group} has {_number(self.workers, 'worker')}, of which "
        if not self.busy:
            return Explanation(text + "none is busy: stopped, or gone less than a minute ago")
        verb, held = "is" if self.busy == 1 else "are", _number(self.held, "request")
        return Explanation(text + f"{self.busy} {verb} busy with {held}")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


class Reasons:
    """Tells why requests have no answer.

    :param group: name of the group that this peer's requests are for, if it knows one
    :param where: the server, for texts
    """

    def __init__(self, link: Link, keys: Keys, group: bytes | None, where: object) -> None:
        self._link = link
        self._stream = keys.stream
        self._group = group
        self._where = where

    async def find(self, requests: Sequence[Envelope]) -> list[Explanation | None]:
        """Return what is known of each; what can't be found out is not."""
        if self._link.connection is None:
            return [Explanation(f"there is no connection to {self._where}", unknown=True)] * len(
                requests
            )
        ids = [None if one.recipient is not None else entry_id_of(one) for one in requests]
        known = [one for one in ids if one][:MOST]
        places = {entry_id: number for number, entry_id in enumerate(known)}
        limits = (b"%d" % _GROUPS, b"%d" % (ALIVE * 1000), HANDED_BACK, DELAYED)
        command = (b"EVAL", _EXPLAIN, b"1", self._stream, self._group or b"", *limits, *known)
        try:
            reply = await self._link.attempt(*command)
        except (RPCError, RedisError):
            return [None] * len(requests)
        groups = [_Group(*flat) for flat in reply]
        return [
            None
            if request.recipient is not None
            else self._explain(groups, entry_id, places.get(entry_id or b"", MOST))
            for request, entry_id in zip(requests, ids, strict=True)
        ]

    def _explain(
        self, groups: list[_Group], entry_id: bytes | None, number: int
    ) -> Explanation | None:
        if not groups:
            if self._group is None:
                return None  # a broadcast
            return Explanation("no worker has ever served the stream", unserved=True)
        found = [group.explain(entry_id, number) for group in groups]
        unserved = self._group is not None and all(one.unserved for one in found)
        if entry_id is None and not unserved:
            return Explanation("Redis has not taken it yet")
        return Explanation("; ".join(one.text for one in found), unserved=unserved)


def entry_id_of(request: Envelope) -> bytes | None:
    """Return the id that a request has in the stream, ``None`` if it isn't known to have one."""
    token = request.token.entry_id if isinstance(request.token, Post) else request.token
    return token if isinstance(token, bytes) and token else None


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
