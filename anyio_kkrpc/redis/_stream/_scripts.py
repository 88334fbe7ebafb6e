"""Lua scripts for streams, and what they share."""

from __future__ import annotations

from .._connection._command import Argument

# Whether an id is less than another one. Their numbers have 64 bits, which Lua's don't.
BEFORE = b"""
local function less(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end
local function before(a, b)
  local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
  if a_ms == b_ms then return less(a_seq, b_seq) end
  return less(a_ms, b_ms)
end
"""

# What XINFO tells as names and values in turn, by name.
BY_NAME = b"""
local function by_name(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
"""

# How many requests a group has to do, of which no more than limit + 1 need be counted. Without that
# group, by the one that has least to do; without any, all entries wait for it. After BY_NAME.
BACKLOG = b"""
local function backlog_of(stream, name, limit)
  if redis.call('EXISTS', stream) == 0 then return 0 end
  local backlog = redis.call('XLEN', stream)
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = by_name(flat)
    local waiting = group['lag']
    if not waiting then
      local start = '(' .. group['last-delivered-id']
      waiting = #redis.call('XRANGE', stream, start, '+', 'COUNT', limit + 1)
    end
    backlog = math.min(backlog, waiting + group['pending'])
    if group['name'] == name then return waiting + group['pending'] end
  end
  return backlog
end
"""

# Returns the last id of a stream; `0-0` of one that isn't there.
LAST_ID = b"""
if redis.call('EXISTS', KEYS[1]) == 0 then return '0-0' end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then return info[i + 1] end
end
"""

# Adds an entry to a stream that is gone after some time, also if it is made by that: in one step,
# for a stream that lives for ever is left behind by who is killed between two. Who may not say for
# how long, adds nothing.
ADD_BRIEFLY = b"""
if redis.replicate_commands then redis.replicate_commands() end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return id
"""


def add_briefly(key: bytes, ttl: bytes, *entry: bytes) -> tuple[Argument, ...]:
    """Return the command that adds an entry; ``ttl`` is in milliseconds."""
    return (b"EVAL", ADD_BRIEFLY, b"1", key, ttl, *entry)
