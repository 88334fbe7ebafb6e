"""What a writer has the server do in one step."""

from __future__ import annotations

from .._stream._scripts import BY_NAME

__all__ = ("ADD_BOUNDED", "BRING_BACK")

# Adds a request unless the group has too much to do already; returns its id, or the backlog.
ADD_BOUNDED = (
    BY_NAME
    + b"""
if redis.replicate_commands then redis.replicate_commands() end
local limit = tonumber(ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- Without that group, by the one that has least to do; without any, all entries wait for it.
  local backlog = redis.call('XLEN', KEYS[1])
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = by_name(flat)
    local waiting = group['lag']
    if not waiting then
      local start = '(' .. group['last-delivered-id']
      waiting = #redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', limit + 1)
    end
    backlog = math.min(backlog, waiting + group['pending'])
    if group['name'] == ARGV[1] then
      backlog = waiting + group['pending']
      break
    end
  end
  if backlog >= limit then return backlog end
end
return redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
"""
)

# Makes entries pending again that were acknowledged though their reply was refused.
BRING_BACK = b"""
if redis.replicate_commands then redis.replicate_commands() end
for i = 3, #ARGV, 2 do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1) == 0 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i],
      'RETRYCOUNT', ARGV[i + 1], 'FORCE', 'JUSTID')
  end
end
return 1
"""
