"""Who has a request of a group, as its canceller asks, and what is left of it in Redis.

XPENDING tells the consumer, and that one's name the session, unless it was chosen by the user: then
a key of the worker's own does. Whoever has it, the request is removed from the stream, so that
nobody takes it over later, should that worker be killed.
"""

from __future__ import annotations

from collections.abc import Sequence

from .._connection._command import Argument
from ._keys import DELAYED, HANDED_BACK, Keys
from ._scripts import BEFORE, BY_NAME, add_briefly

__all__ = ("MOST", "PREFIX", "REMOVE_REQUESTS", "find_holders", "introduction")

# Requests that one script removes, which takes Redis about half a millisecond.
MOST = 50
# What comes before the session id in the name of a consumer that was given no name.
PREFIX = b"consumer-"

# Removes requests. Returns for each the sessions of the workers that have it. An empty one stands
# for all peers: where nothing tells the session; where the request was delivered again or is lost,
# since a worker that was only paused runs it still; where it is gone from the stream already.
#
# Who may not acknowledge leaves that to the workers: nothing is left of the request to be run.
# Redis doesn't count what is removed before a group has read it: from then on it doesn't know how
# much is left for that group. It is told that the entry never was, in the stream and for the groups
# that have read it (from Redis 7.0 on; before that there is no such number).
# KEYS: the stream. ARGV: beginnings of the keys of inboxes and of workers, of names of consumers,
# the names of consumers that are no workers, then ids.
REMOVE_REQUESTS = (
    BEFORE
    + BY_NAME
    + b"""
if redis.replicate_commands then redis.replicate_commands() end
local stream, inboxes, workers, prefix = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local function session_of(group, consumer)
  local key = workers .. group .. ':' .. consumer
  local told = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  local session = told and told[2][2]
  if not session and string.sub(consumer, 1, #prefix) == prefix then
    session = string.sub(consumer, #prefix + 1)
  end
  if session and redis.call('EXISTS', inboxes .. session) == 1 then return session end
  return ''
end
local function has_nothing(group, consumer)
  return #redis.call('XPENDING', stream, group, '-', '+', 1, consumer) == 0
end
local function add_holders(sessions, group, id)
  local held = redis.call('XPENDING', stream, group, id, id, 1)[1]
  if not held then return end
  local consumer, deliveries = held[2], held[4]
  if consumer == ARGV[4] or consumer == ARGV[5] then
    if redis.pcall('XACK', stream, group, id) == 1 and has_nothing(group, consumer) then
      redis.pcall('XGROUP', 'DELCONSUMER', stream, group, consumer)
    end
    if deliveries > 0 then sessions[#sessions + 1] = '' end
  else
    sessions[#sessions + 1] = session_of(group, consumer)
    if deliveries > 1 then sessions[#sessions + 1] = '' end
  end
end
local groups, info, uncounted, holders = {}, nil, 0, {}
if redis.call('EXISTS', stream) == 1 then
  for i, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do groups[i] = by_name(flat) end
end
for i = 6, #ARGV do
  local id, sessions, read = ARGV[i], {}, {}
  for _, group in ipairs(groups) do
    if not before(group['last-delivered-id'], id) then
      read[#read + 1] = group
      add_holders(sessions, group['name'], id)
    end
  end
  local waits = #read < #groups
  if waits and not info then info = by_name(redis.call('XINFO', 'STREAM', stream)) end
  if redis.call('XDEL', stream, id) == 0 then
    if #sessions == 0 then sessions[1] = '' end
  elseif waits then
    uncounted = uncounted + 1
    for _, group in ipairs(read) do group.uncounted = (group.uncounted or 0) + 1 end
  end
  holders[#holders + 1] = sessions
end
if uncounted > 0 and info['entries-added'] then
  local removed = info['max-deleted-entry-id']
  if removed == '0-0' then removed = '0-1' end
  local told = redis.pcall('XSETID', stream, info['last-generated-id'],
    'ENTRIESADDED', info['entries-added'] - uncounted, 'MAXDELETEDID', removed)
  for _, group in ipairs(told.err and {} or groups) do
    if group.uncounted and group['entries-read'] then
      redis.pcall('XGROUP', 'SETID', stream, group['name'], group['last-delivered-id'],
        'ENTRIESREAD', group['entries-read'] - group.uncounted)
    end
  end
end
return holders
"""
)


def find_holders(keys: Keys, ids: Sequence[bytes]) -> tuple[Argument, ...]:
    """Return the command that removes requests, at most `MOST`, and tells who has each."""
    beginnings = (keys.inbox(""), keys.worker(b"", b""), PREFIX)
    nobodies = (HANDED_BACK, DELAYED)
    return (b"EVAL", REMOVE_REQUESTS, b"1", keys.stream, *beginnings, *nobodies, *ids)


def introduction(
    keys: Keys, group: bytes, consumer: bytes, session_id: str, ttl: float
) -> tuple[Argument, ...] | None:
    """Return the command that tells whose a consumer is; ``None`` if its name does.

    :param ttl: seconds for which it is told
    """
    session = session_id.encode()
    if consumer == PREFIX + session:
        return None
    entry = (b"MAXLEN", b"1", b"*", b"session", session)
    return add_briefly(keys.worker(group, consumer), b"%d" % round(ttl * 1000), *entry)
