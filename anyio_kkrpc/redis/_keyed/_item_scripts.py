"""The scripts by which the items of a call with a key are kept and read.

Ids are positions: Redis refuses one that isn't greater than the last. So who was overtaken adds
nothing once the next attempt has added where it begins.
"""

from __future__ import annotations

from ._script import Script
from ._scripts import FINISH, KEPT

__all__ = ("APPEND", "EXPIRE", "FINISH_ITEMS", "OPEN", "READ", "SOME")

# Entries that are asked for before it is known how large they are.
SOME = 8

_LAST = b"""
local function last_of(items)
  local found = redis.call('XREVRANGE', items, '+', '-', 'COUNT', 1)[1]
  return found and found[1] or '0-0'
end
local function epoch_of(position) return string.match(position, '^%d+') end
local function too_small(added) return added.err and string.find(added.err, 'equal or smaller') end
"""

# Adds where an attempt begins, if the request is this worker's. KEYS: stream, call, items. ARGV:
# group, consumer, id, attempt, the last id of what it goes on behind, or nothing if it begins anew,
# milliseconds to keep it, id, fields, of which the second is what it begins behind. Where this very
# attempt was to go on, and begins anew now, that is removed too. Returns 0 if it isn't, -1 if
# something was added since, else the first id.
OPEN = Script(
    KEPT
    + _LAST
    + b"""
local id, items = ARGV[3], KEYS[3]
local function begins()
  return redis.call('XREVRANGE', items, '+', '-', 'COUNT', 1)[1][2][2]
end
local held = holder_of(KEYS[1], ARGV[1], id)
if not held or held[2] ~= ARGV[2] or held[4] ~= tonumber(ARGV[4]) then return 0 end
local known = redis.call('GET', KEYS[2])
if known and (id_of(known) ~= id or has_ended(known)) then return 0 end
local last = last_of(items)
if last ~= ARGV[7] or (ARGV[5] == '' and begins() ~= ARGV[9]) then
  if ARGV[5] == '' then
    redis.call('DEL', items)
  elseif last ~= ARGV[5] then
    return -1
  end
  local added = redis.pcall('XADD', items, ARGV[7], unpack(ARGV, 8))
  if type(added) == 'table' then return too_small(added) and 0 or added end
end
redis.call('PEXPIRE', items, ARGV[6])
return redis.call('XRANGE', items, '-', '+', 'COUNT', 1)[1][1]
"""
)

# KEYS: items. ARGV: id, the first id that is kept still, if what is before is to go, fields. What
# was added before isn't again. Returns 0 if another attempt has begun, -1 if the items are gone.
APPEND = Script(
    _LAST
    + b"""
if redis.replicate_commands then redis.replicate_commands() end
local items = KEYS[1]
local added = redis.pcall('XADD', items, 'NOMKSTREAM', ARGV[1], unpack(ARGV, 3))
if not added then return -1 end
if type(added) == 'table' then
  if not too_small(added) then return added end
  if epoch_of(last_of(items)) ~= epoch_of(ARGV[1]) then return 0 end
end
if ARGV[2] ~= '' then redis.call('XTRIM', items, 'MINID', ARGV[2]) end
return 1
"""
)

# KEYS: call, items. ARGV: the first id that is wanted, how many at most, and after how many bytes
# no more. Returns the beginning of what is kept of the call, and entries; if there are none, the
# last id, and who is to be told when that was read.
READ = Script(
    b"""
local known = string.sub(redis.call('GET', KEYS[1]) or '', 1, 80)
local found, size, from = {}, 0, ARGV[1]
local most, limit = tonumber(ARGV[2]), tonumber(ARGV[3])
local count = math.min(most, SOME)
while true do
  local more = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', count)
  for _, entry in ipairs(more) do
    found[#found + 1] = entry
    for _, field in ipairs(entry[2]) do size = size + #field end
    if size >= limit then return {known, found, '', ''} end
  end
  if #more < count or #found >= most then break end
  local epoch, number = string.match(more[#more][1], '^(%d+)%-(%d+)$')
  from = epoch .. '-' .. string.format('%.0f', number + 1)
  count = math.min(most - #found, math.ceil((limit - size) * #found / size))
end
if #found > 0 then return {known, found, '', ''} end
local last, mark = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1], ''
if not last then return {known, found, '0-0', ''} end
for i = 1, #last[2], 2 do
  if last[2][i] == 'mark' then mark = last[2][i + 1] end
end
return {known, found, last[1], mark}
""".replace(b"SOME", b"%d" % SOME)
)

# As FINISH, and adds the end to the items, if that is the worker's who adds them, and if they are
# there. KEYS: as FINISH, items. ARGV: as FINISH of a failure, the id of the end, what it says.
FINISH_ITEMS = Script(
    KEPT
    + _LAST
    + b"""
local items, end_id = KEYS[#KEYS], ARGV[#ARGV - 1]
local known = redis.call('GET', KEYS[2])
local held = holder_of(KEYS[1], ARGV[1], ARGV[2])
if held and held[2] == ARGV[10] and held[4] == tonumber(ARGV[11])
  and not (known and (id_of(known) ~= ARGV[2] or has_ended(known))) then
  local added = redis.pcall('XADD', items, 'NOMKSTREAM', end_id, 'end', ARGV[#ARGV])
  if type(added) == 'table' and too_small(added) and last_of(items) ~= end_id then return 0 end
  redis.call('PEXPIRE', items, ARGV[6])
end
"""
    + FINISH.source
)

# Has the items of a call go when what it came to does. KEYS: call, items.
EXPIRE = Script(
    b"""
local left = redis.call('PTTL', KEYS[1])
if left > 0 then redis.call('PEXPIRE', KEYS[2], left) end
return left
"""
)
