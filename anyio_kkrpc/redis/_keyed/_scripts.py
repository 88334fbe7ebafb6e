"""The scripts by which a call with a key is claimed, kept, waited for and ended.

What is kept of a call is one string: a letter for its state, 22 characters of its digest, the id of
its entry, ``|``, and the rest. Before the end that is the session of who asked first; of a call
that is to begin later, the fields of its entry; at the end, what it came to.
"""

from __future__ import annotations

from ...kit._keyed import MOST_WAITS
from .._stream._holders import REMOVE_REQUESTS
from .._stream._scripts import BACKLOG, BEFORE, BY_NAME
from ._script import Script

__all__ = (
    "ATTACH",
    "BEGIN",
    "CANCEL_CALL",
    "CHECK",
    "CLAIM",
    "CLAIM_LATER",
    "DIE",
    "DUE",
    "FINISH",
    "FORGET",
    "HINTED",
    "KEPT",
    "LATER",
    "LEAVE_CALL",
    "PROGRESS",
    "RETRY",
    "STATE",
    "TELL",
)


_KEPT = b"""
if redis.replicate_commands then redis.replicate_commands() end
local function state_of(known) return string.sub(known, 1, 1) end
local function digest_of(known) return string.sub(known, 2, 23) end
local function id_of(known) return string.match(string.sub(known, 24, 80), '^%d+%-%d+') end
local function rest_of(known) return string.match(known, '|(.*)$') end
local function holder_of(stream, group, id)
  local held = redis.pcall('XPENDING', stream, group, id, id, 1)
  return not held.err and held[1] or nil
end
local function has_ended(known) return string.find('dfxke', state_of(known), 1, true) ~= nil end
"""
KEPT = _KEPT  # for the scripts of items

# Bytes of what a call came to that are handed on with the hint; of more, who is told asks for it.
HINTED = 16 * 1024
# Who waits is in a set with the time of Redis at which that was said; who has not said it for a
# minute makes room. Who asked first is in it only once somebody else waits, too, or asks again.
_JOIN = b"""
local function add_first(known, call, waits, now)
  if state_of(known) ~= 'w' then return end
  redis.call('ZADD', waits, now, rest_of(known))
  redis.call('SETRANGE', call, 0, 's')
end
local function join(known, call, waits, session)
  local now = redis.call('TIME')[1]
  add_first(known, call, waits, now)
  local is_new = redis.call('ZADD', waits, now, session) == 1
  redis.call('PEXPIRE', waits, 60000)
  if is_new and redis.call('ZCOUNT', waits, '-inf', '+inf') > MOST then
    local oldest = redis.call('ZRANGE', waits, 0, 0, 'WITHSCORES')
    local is_over = tonumber(oldest[2]) < now - 60
    redis.call('ZREM', waits, is_over and oldest[1] or session)
    return is_over
  end
  return true
end
""".replace(b"MOST", b"%d" % MOST_WAITS)

# Ends the script with what is known of the call, if that isn't to be made anew. ARGV: digest,
# session, whether that waits, whether this may have been written before. Returns -1 if it can't
# wait: too many do.
_KNOWN = b"""
local known = redis.call('GET', KEYS[2])
if known then
  local state, same = state_of(known), digest_of(known) == ARGV[1]
  local gone = (state == 'k' or state == 'e') and not (ARGV[4] == '1' and same)
  if not gone then
    if not same then return 0 end
    if ARGV[3] == '1' and not has_ended(known) and not join(known, KEYS[2], KEYS[3], ARGV[2]) then
      return -1
    end
    return known
  end
  redis.call('DEL', KEYS[3], KEYS[4])
end
"""

_ADD = b"""
local id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 7))
local first = ARGV[3] == '1' and 'w' or 's'
redis.call('SET', KEYS[2], first .. ARGV[1] .. id .. '|' .. ARGV[2])
return id
"""

# KEYS: stream, call, waits, progress. ARGV: as above, group, the most that may wait for it, fields.
# Returns the id, or what is known, or 0 if the key is another call's, or how many requests wait.
CLAIM = Script(
    # What most come to is first, before what costs something to be defined.
    b"""
if redis.replicate_commands then redis.replicate_commands() end
if ARGV[6] == '' and redis.call('EXISTS', KEYS[2]) == 0 then
"""
    + _ADD
    + b"""
end
"""
    + _KEPT
    + _JOIN
    + BY_NAME
    + BACKLOG
    + _KNOWN
    + b"""
if ARGV[6] ~= '' then
  local backlog = backlog_of(KEYS[1], ARGV[5], tonumber(ARGV[6]))
  if backlog >= tonumber(ARGV[6]) then return backlog end
end
do
"""
    + _ADD
    + b"""
end
"""
)

# KEYS: stream, call, waits, progress, due. ARGV: as above, milliseconds, whether these are since
# the epoch and not from now on, the key, what its entry is made of.
CLAIM_LATER = Script(
    _KEPT
    + _JOIN
    + _KNOWN
    + b"""
local due, now = tonumber(ARGV[5]), redis.call('TIME')
if ARGV[6] ~= '1' then due = due + now[1] * 1000 + math.floor(now[2] / 1000) end
redis.call('ZADD', KEYS[5], string.format('%.0f', due), ARGV[7])
redis.call('SET', KEYS[2], 'z' .. ARGV[1] .. '0-0|' .. ARGV[8])
return '0-0'
"""
)

# KEYS: call, waits. ARGV: session. Returns what is known, or -1 if too many wait.
ATTACH = Script(
    _KEPT
    + _JOIN
    + b"""
local known = redis.call('GET', KEYS[1])
if known and not has_ended(known) and not join(known, KEYS[1], KEYS[2], ARGV[1]) then return -1 end
return known
"""
)

# Keeps what a request came to, tells who asked first, and acknowledges it, unless somebody else was
# first. A failure counts only if it is from who holds the request now. A server that took the place
# of another one may have given the id to another request, so the entry is looked at unless the call
# itself names the id. KEYS: stream, call, waits, progress, and items if there may be some. ARGV:
# group, id, state, digest, what it came to, milliseconds to keep it, the key, the inbox of who
# asked first: not among the keys, since a user may have rights to write to it only; whether there
# may be these; then of a failure consumer and deliveries. Returns 0 if somebody else was first, 2
# if others wait; and 4 more if another attempt may have left items that this wasn't told of.
FINISH = Script(
    b"""
if redis.replicate_commands then redis.replicate_commands() end
local id, known = ARGV[2], redis.call('GET', KEYS[2])
local head = ARGV[4] .. id .. '|'
local state = known and string.sub(known, 1, 1)
local named = known and string.sub(known, 2, #head + 1) == head
local ended = known and string.find('dfxke', state, 1, true)
local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1)
held = not held.err and held[1]
if not held then
  if named and ended then return redis.call('EXISTS', KEYS[3]) * 2 + (KEYS[5] and 0 or 4) end
  return 0
end
if not named then
  local is_of_call, entry = true, redis.call('XRANGE', KEYS[1], id, id)[1]
  for i = 1, entry and #entry[2] or 0, 2 do
    if entry[2][i] == 'call' then
      local digest, key = string.match(entry[2][i + 1], '^(%S+) %d+ %d+ %d[^ ]* (.*)$')
      is_of_call = digest == ARGV[4] and key == ARGV[7]
      break
    end
    is_of_call = false
  end
  if not is_of_call then return 0 end
end
if ARGV[10] and (held[2] ~= ARGV[10] or held[4] ~= tonumber(ARGV[11])) then return 0 end
if not known or (named and not ended) then
  local value = ARGV[3] .. head .. ARGV[5]
  redis.call('SET', KEYS[2], value, 'PX', ARGV[6])
  for i = 4, ARGV[9] == '1' and #KEYS or 3 do redis.call('PEXPIRE', KEYS[i], ARGV[6]) end
  local word = 'call ' .. #ARGV[7] .. ':' .. ARGV[7]
  if #value <= HINTED then word = word .. value end
  redis.call('XADD', ARGV[8], 'NOMKSTREAM', '*', 'hint', word)
end
redis.call('XACK', KEYS[1], ARGV[1], id)
local more = not KEYS[5] and held[4] > 1 and 4 or 0
return 1 + more + (state == 'w' and 0 or redis.call('EXISTS', KEYS[3]))
""".replace(b"HINTED", b"%d" % HINTED)
)

# Tells who waits. KEYS: waits. ARGV: the word, the beginning of the keys of inboxes, then sessions,
# who wait no more.
TELL = Script(
    b"""
if redis.replicate_commands then redis.replicate_commands() end
for i = 3, #ARGV do
  local inbox = ARGV[2] .. ARGV[i]
  if redis.call('EXISTS', inbox) == 1 then redis.call('XADD', inbox, '*', 'hint', ARGV[1]) end
  redis.call('ZREM', KEYS[1], ARGV[i])
end
return 1
"""
)

# Whether what was taken over may run. KEYS: stream, call, waits. ARGV: group, consumer, id, digest.
# Returns 1 if so, 2 if it was cancelled, 0 if it isn't this worker's, or its key is another call's.
BEGIN = Script(
    _KEPT
    + b"""
local id = ARGV[3]
local held = holder_of(KEYS[1], ARGV[1], id)
if not held or held[2] ~= ARGV[2] then return 0 end
local known = redis.call('GET', KEYS[2])
if not known then
  redis.call('SET', KEYS[2], 's' .. ARGV[4] .. id .. '|')
  return 1
end
if id_of(known) ~= id or has_ended(known) then
  redis.call('XACK', KEYS[1], ARGV[1], id)
  return 0
end
return state_of(known) == 'c' and 2 or 1
"""
)

# Notes that a request is a dead letter. KEYS: call, waits, progress, items. ARGV: id, digest,
# milliseconds, why.
DIE = Script(
    _KEPT
    + _JOIN
    + b"""
local known = redis.call('GET', KEYS[1])
if known and (id_of(known) ~= ARGV[1] or has_ended(known)) then return 0 end
if known then add_first(known, KEYS[1], KEYS[2], redis.call('TIME')[1]) end
redis.call('SET', KEYS[1], 'x' .. ARGV[2] .. ARGV[1] .. '|' .. ARGV[4], 'PX', ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
redis.call('PEXPIRE', KEYS[4], ARGV[3])
redis.call('PEXPIRE', KEYS[2], 60000)
return 1
"""
)

# Forgets a call whose request is gone without an end. KEYS: stream, call, progress, items. ARGV:
# group, id. Returns whether it was.
CHECK = Script(
    _KEPT
    + BEFORE
    + BY_NAME
    + b"""
local known, id = redis.call('GET', KEYS[2]), ARGV[2]
if not known or id_of(known) ~= id or has_ended(known) or id == '0-0' then return 0 end
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = by_name(flat)
    if group['name'] == ARGV[1] then
      if #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1) > 0 then return 0 end
      if not before(group['last-delivered-id'], id) then
        redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
        return 1
      end
    end
  end
  if #redis.call('XRANGE', KEYS[1], id, id) > 0 then return 0 end
end
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
return 1
"""
)


# Cancels a call. What nobody has is removed; who has it is told. KEYS: stream, call, due, waits,
# progress, items. ARGV: beginnings of the keys of inboxes and of workers, of names of consumers,
# names of consumers that are no workers, group, id, the key, the word to who has it, milliseconds.
def _with_cancel(head: bytes) -> Script:
    """Return a script that may cancel a call.

    :param head: what decides that, with ``known`` and ``id``
    """
    return Script(
        _KEPT
        + _JOIN
        + head
        + b"""
if known and id_of(known) == id and not has_ended(known) then
  local state = state_of(known)
  local held = holder_of(KEYS[1], ARGV[6], id)
  if held and held[2] ~= ARGV[4] and held[2] ~= ARGV[5] then
    add_first(known, KEYS[2], KEYS[4], redis.call('TIME')[1])
    redis.call('PEXPIRE', KEYS[4], 60000)
    redis.call('SETRANGE', KEYS[2], 0, 'c')
    local told = redis.pcall('XREVRANGE', ARGV[2] .. ARGV[6] .. ':' .. held[2], '+', '-',
      'COUNT', 1)[1]
    local session = told and told[2][2]
    if not session and string.sub(held[2], 1, #ARGV[3]) == ARGV[3] then
      session = string.sub(held[2], #ARGV[3] + 1)
    end
    if session and redis.call('EXISTS', ARGV[1] .. session) == 1 then
      redis.call('XADD', ARGV[1] .. session, '*', 'hint', ARGV[9])
    end
    return 1
  end
  add_first(known, KEYS[2], KEYS[4], redis.call('TIME')[1])
  redis.call('PEXPIRE', KEYS[4], 60000)
  for i = 5, 6 do redis.call('PEXPIRE', KEYS[i], ARGV[10]) end
  redis.call('SET', KEYS[2], 'k' .. digest_of(known) .. id .. '|', 'PX', ARGV[10])
  if state == 'z' then
    redis.call('ZREM', KEYS[3], ARGV[8])
    return 2
  end
  local ARGV = {ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], id}
"""
        + REMOVE_REQUESTS
        + b"""
end
return 0
"""
    )


CANCEL_CALL = _with_cancel(
    b"""
local id, known = ARGV[7], redis.call('GET', KEYS[2])
"""
)

# Waits no longer; who leaves last, of those that were there in the last 15 seconds, cancels the
# call, if it says so. KEYS and ARGV: as of CANCEL_CALL, then session, whether it cancels, digest.
LEAVE_CALL = _with_cancel(
    b"""
local known = redis.call('GET', KEYS[2])
if not known or has_ended(known) then return 0 end
if ARGV[13] ~= '' and digest_of(known) ~= ARGV[13] then return 0 end
redis.call('ZREM', KEYS[4], ARGV[11])
if state_of(known) == 'w' then
  if rest_of(known) ~= ARGV[11] then return 0 end
  redis.call('SETRANGE', KEYS[2], 0, 's')
  known = redis.call('GET', KEYS[2])
end
if ARGV[12] ~= '1' then return 0 end
local since = redis.call('TIME')[1] - 15
if redis.call('ZCOUNT', KEYS[4], since, '+inf') > 0 then return 0 end
local id = id_of(known)
"""
)

# KEYS: stream, call. ARGV: group. Returns the state, milliseconds until it is gone, and who holds
# it, for how long, and how often it was delivered.
STATE = Script(
    _KEPT
    + b"""
local known = redis.call('GET', KEYS[2])
if not known then return false end
local found = {state_of(known), redis.call('PTTL', KEYS[2])}
local id = id_of(known)
local held = not has_ended(known) and holder_of(KEYS[1], ARGV[1], id)
if held then
  found[3], found[4], found[5] = held[2], held[3], held[4]
end
return found
"""
)

# KEYS: call, waits, progress, items. Returns 0 if there is nothing, -1 if it hasn't ended.
FORGET = Script(
    _KEPT
    + b"""
local known = redis.call('GET', KEYS[1])
if not known then return 0 end
if not has_ended(known) then return -1 end
redis.call('DEL', unpack(KEYS))
return 1
"""
)

# KEYS: stream, progress. ARGV: group, consumer, id, the position, milliseconds, the value. The
# position grows with each attempt: who was overtaken adds nothing.
PROGRESS = Script(
    _KEPT
    + b"""
local held = holder_of(KEYS[1], ARGV[1], ARGV[3])
if not held or held[2] ~= ARGV[2] then return 0 end
local added = redis.pcall('XADD', KEYS[2], 'MAXLEN', 1, ARGV[4], 'told', ARGV[6])
if type(added) == 'table' and added.err then return 0 end
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return 1
"""
)

# What may begin now, and in how many milliseconds the next one may, or -1. KEYS: due. ARGV: count.
LATER = Script(
    b"""
if redis.replicate_commands then redis.replicate_commands() end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now),
  'LIMIT', 0, ARGV[1])
local next = redis.call('ZRANGE', KEYS[1], #found, #found, 'WITHSCORES')[2]
return {found, next and math.max(math.ceil(next - now), 0) or -1}
"""
)

# Adds the request of a call that may begin. KEYS: due, stream, call. ARGV: the key, what is known
# of the call, fields.
DUE = Script(
    _KEPT
    + b"""
local known = redis.call('GET', KEYS[3])
if known ~= ARGV[2] then
  if not known or state_of(known) ~= 'z' then redis.call('ZREM', KEYS[1], ARGV[1]) end
  return 0
end
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 0 end
local id = redis.call('XADD', KEYS[2], '*', unpack(ARGV, 3))
redis.call('SET', KEYS[3], 's' .. digest_of(known) .. id .. '|')
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
"""
)

# Puts a dead letter back, unless another call has its key, or has had it. KEYS: stream, dead
# letters, call, progress. ARGV: id of the letter, digest, fields.
RETRY = Script(
    _KEPT
    + b"""
if #redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1]) == 0 then return false end
local known = redis.call('GET', KEYS[3])
if known and (state_of(known) ~= 'x' or digest_of(known) ~= ARGV[2]) then return 0 end
local id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
redis.call('SET', KEYS[3], 's' .. ARGV[2] .. id .. '|')
redis.call('DEL', KEYS[4])
redis.call('XDEL', KEYS[2], ARGV[1])
return id
"""
)
