"""The scripts by which a worker takes, keeps, finds and gives back entries of a consumer group.

Each decides at one moment what it acts upon, and is bounded, so that it doesn't hold up the server.
`Groups` gives them their arguments.
"""

from __future__ import annotations

from ._dead_letters import WRITE_LETTER

_PREAMBLE = b"""
if redis.replicate_commands then redis.replicate_commands() end
local stream, group, me = KEYS[1], ARGV[1], ARGV[2]
"""

TOUCH = (
    _PREAMBLE
    + b"""
local kept, lost = {'XCLAIM', stream, group, me, 0}, {}
for i = 3, #ARGV do
  if #redis.call('XPENDING', stream, group, ARGV[i], ARGV[i], 1, me) > 0 then
    kept[#kept + 1] = ARGV[i]
  else
    lost[#lost + 1] = ARGV[i]
  end
end
if #kept > 5 then
  kept[#kept + 1] = 'JUSTID'
  redis.call(unpack(kept))
end
return lost
"""
)

# Entries not taken here yet keep their number of deliveries; see `Groups.hand_back`.
HAND_BACK = (
    _PREAMBLE
    + b"""
local done = 0
for i = 5, #ARGV, 2 do
  if #redis.call('XPENDING', stream, group, ARGV[i], ARGV[i], 1, me) > 0 then
    redis.call('XCLAIM', stream, group, ARGV[3], 0, ARGV[i], 'IDLE', ARGV[4],
      'RETRYCOUNT', ARGV[i + 1], 'JUSTID')
    done = done + 1
  end
end
return done
"""
)

# How long, in milliseconds, a request has to be idle before it is delivered once more. One that was
# delivered twice may have ended two workers: each further one comes after twice the time.
_PAUSE = b"""
local function pause(deliveries, idle, longest)
  return math.min(idle * 2 ^ math.max(deliveries - 1, 0), math.max(idle, longest))
end
"""

# Removes one of the consumers that are no worker once it owns nothing.
_TIDY = b"""
local function tidy(consumer)
  if #redis.call('XPENDING', stream, group, '-', '+', 1, consumer) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
  end
end
"""

# What is taken over; what was delivered too often, and is a dead letter now; and what should be one
# and can't. The last goes to those who wait, and its turn comes again.
_GIVE = (
    WRITE_LETTER
    + b"""
local taken, dead, kept = {}, {}, {}
local size, most = 0, tonumber(ARGV[3])
local function measure(fields)
  for _, value in ipairs(fields) do size = size + #value end
end
local function give_up(id, deliveries, fields, now, delayed)
  local refusal = write_letter(KEYS[2], id, group, deliveries, now, fields)
  if refusal then
    redis.call('XCLAIM', stream, group, delayed, 0, id, 'IDLE', 0, 'JUSTID')
    kept[#kept + 1] = {id, deliveries, fields, refusal}
  else
    redis.call('XACK', stream, group, id)
    dead[#dead + 1] = {id, deliveries, fields}
  end
end
"""
)

# Tells that this worker lives, as XINFO CONSUMERS shows it: before Redis 7.2 a read for which there
# is nothing doesn't. What it reads is what this consumer owns at the end of all ids, nothing.
_LIVE = b"""
redis.pcall('XREADGROUP', 'GROUP', group, me, 'COUNT', 1, 'STREAMS', stream,
  '18446744073709551615-18446744073709551614')
"""

# Takes entries that are there for anybody. ARGV: ..., bytes, wanted, limit, now, handed back,
# delayed. Returns at last whether there is more, and whether anything is pending, whoever has it.
TAKE = (
    _PREAMBLE
    + _TIDY
    + _GIVE
    + _LIVE
    + b"""
local wanted, limit, now = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local pending = redis.call('XPENDING', stream, group, '-', '+', wanted, ARGV[7])
local left = #pending == wanted
for _, item in ipairs(pending) do
  local id, deliveries = item[1], item[4]
  if size >= most then
    left = true
    break
  end
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if not entry then
    redis.call('XACK', stream, group, id)
  else
    measure(entry[2])
    if deliveries >= limit then
      give_up(id, deliveries, entry[2], now, ARGV[8])
    else
      redis.call('XCLAIM', stream, group, me, 0, id)
      taken[#taken + 1] = {id, deliveries + 1, entry[2]}
    end
  end
end
if #pending > 0 then tidy(ARGV[7]) end
local any = #redis.call('XPENDING', stream, group, '-', '+', 1)
return {taken, dead, kept, left and 1 or 0, any}
"""
)

# Takes what this consumer owns and doesn't know of, a page of it. If that counts as a delivery,
# what was delivered twice already waits, with the idle time that it has. ARGV: ..., bytes, start,
# count, counted, limit, now, idle, longest, delayed, then what it knows of.
RECOVER = (
    _PREAMBLE
    + _PAUSE
    + _GIVE
    + b"""
local start, count, counted = ARGV[4], tonumber(ARGV[5]), ARGV[6] == '1'
local limit, now, delayed = tonumber(ARGV[7]), ARGV[8], ARGV[11]
local idle, longest = tonumber(ARGV[9]), tonumber(ARGV[10])
local known = {}
for i = 12, #ARGV do known[ARGV[i]] = true end
local pending = redis.call('XPENDING', stream, group, start, '+', count, me)
local last = ''
if #pending == count then last = pending[#pending][1] end
for i, item in ipairs(pending) do
  local id, idle_now, deliveries = item[1], item[3], item[4]
  if size >= most then
    last = pending[i - 1][1]
    break
  end
  local entry = not known[id] and redis.call('XRANGE', stream, id, id)[1]
  if known[id] then
  elseif not entry then
    redis.call('XACK', stream, group, id)
  elseif counted and deliveries >= limit then
    measure(entry[2])
    give_up(id, deliveries, entry[2], now, delayed)
  elseif counted and deliveries > 1 and idle_now < pause(deliveries, idle, longest) then
    redis.call('XCLAIM', stream, group, delayed, 0, id, 'IDLE', idle_now, 'JUSTID')
  else
    measure(entry[2])
    if counted then
      redis.call('XCLAIM', stream, group, me, 0, id)
      deliveries = deliveries + 1
    else
      redis.call('XCLAIM', stream, group, me, 0, id, 'JUSTID')
    end
    taken[#taken + 1] = {id, deliveries, entry[2]}
  end
end
return {taken, dead, kept, last}
"""
)

# Looks at what is pending between two ids and has been idle for so long, no more than a page of
# it, and lets anybody take what is due. ARGV: ..., start, end, least, count, idle, longest, limit,
# handed back, delayed, long idle. Returns how many these are, in how many milliseconds the next one
# is due (or -1), and the last id of a page after which there may be more.
LOOK = (
    _PREAMBLE
    + _PAUSE
    + _TIDY
    + b"""
local count, limit = tonumber(ARGV[6]), tonumber(ARGV[9])
local idle, longest = tonumber(ARGV[7]), tonumber(ARGV[8])
local handed_back, delayed = ARGV[10], ARGV[11]
local pending = redis.call('XPENDING', stream, group, 'IDLE', ARGV[5], ARGV[3], ARGV[4], count)
local claim = {'XCLAIM', stream, group, handed_back, 0}
local soonest, was_delayed = -1, false
for _, item in ipairs(pending) do
  if item[2] ~= handed_back then
    -- What becomes a dead letter ends nobody, and need not wait.
    local deliveries = item[4] < limit and item[4] or 1
    local left = pause(deliveries, idle, longest) - item[3]
    if left <= 0 then
      claim[#claim + 1] = item[1]
      was_delayed = was_delayed or item[2] == delayed
    elseif soonest < 0 or left < soonest then
      soonest = left
    end
  end
end
local due = #claim - 5
if due > 0 then
  claim[#claim + 1] = 'IDLE'
  claim[#claim + 1] = ARGV[12]
  claim[#claim + 1] = 'JUSTID'
  redis.call(unpack(claim))
end
if was_delayed then tidy(delayed) end
return {due, math.ceil(soonest), #pending == count and pending[count][1] or ''}
"""
)

# Makes this consumer the one that looks, unless another one is. What Redis refuses is the script's
# reply: `Groups.lead` decides what it means. Only commands for streams are used, which are all that
# peers may do with keys.
LEAD = b"""
if redis.replicate_commands then redis.replicate_commands() end
local lease, me = KEYS[1], ARGV[1]
local last = redis.pcall('XREVRANGE', lease, '+', '-', 'COUNT', 1)
if last.err then return last end
if last[1] and last[1][2][2] ~= me then return 0 end
if not last[1] then
  local made = redis.pcall('XADD', lease, '*', 'claimer', me)
  if type(made) == 'table' then return made end
end
local kept = redis.pcall('PEXPIRE', lease, ARGV[2])
if type(kept) == 'table' then
  redis.pcall('XTRIM', lease, 'MAXLEN', 0)  -- nobody may have it for ever
  return kept
end
return 1
"""

RESIGN = b"""
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last and last[2][2] == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

# Gives what this consumer owns to anybody, a page of it, and removes it once it owns nothing.
# ARGV: ..., handed back, long idle, just now, count.
LEAVE = (
    _PREAMBLE
    + b"""
local count = tonumber(ARGV[6])
local pending = redis.call('XPENDING', stream, group, '-', '+', count, me)
for _, item in ipairs(pending) do
  local deliveries = item[4]
  if item[3] <= tonumber(ARGV[5]) then deliveries = math.max(deliveries - 1, 0) end
  redis.call('XCLAIM', stream, group, ARGV[3], 0, item[1], 'IDLE', ARGV[4],
    'RETRYCOUNT', deliveries, 'JUSTID')
end
if #pending < count then redis.call('XGROUP', 'DELCONSUMER', stream, group, me) end
return #pending
"""
)

# Removes other consumers that hold nothing.
REMOVE = b"""
if redis.replicate_commands then redis.replicate_commands() end
local removed = 0
for i = 2, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[i]) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[i])
    removed = removed + 1
  end
end
return removed
"""
