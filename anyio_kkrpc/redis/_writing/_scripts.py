"""What a writer has the server do in one step."""

from __future__ import annotations

from .._stream._scripts import BACKLOG, BY_NAME

__all__ = ("ADD_BOUNDED", "BRING_BACK")

# Adds a request unless the group has too much to do already; returns its id, or the backlog.
ADD_BOUNDED = (
    BY_NAME
    + BACKLOG
    + b"""
if redis.replicate_commands then redis.replicate_commands() end
local limit = tonumber(ARGV[2])
local backlog = backlog_of(KEYS[1], ARGV[1], limit)
if backlog >= limit then return backlog end
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
