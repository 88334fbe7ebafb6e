"""What Lua scripts for streams share."""

from __future__ import annotations

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
