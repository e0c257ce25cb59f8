"""The queue's Lua scripts. Each runs as one step on the server and may be repeated after a lost reply.

Keys are passed in the order that the first line of a script names; a payload stands in the field ``rollout``.
"""

from __future__ import annotations

_HELPERS = """
local function payload(fields)
  for i = 1, #fields, 2 do
    if fields[i] == 'rollout' then return fields[i + 1] end
  end
  return table.concat(fields, '\\n')
end

local function deliveries(stream, group, id)
  local row = redis.call('XPENDING', stream, group, id, id, 1)[1]
  return row and row[4] or 0
end
"""

ADMIT = """
-- KEYS: stream ledger seen; ARGV: capacity, then rollout id and payload of each entry
local size = (#ARGV - 1) / 2
for i = 2, #ARGV, 2 do
  if redis.call('SISMEMBER', KEYS[3], ARGV[i]) == 1 then return 'duplicate' end
end
if redis.call('XLEN', KEYS[1]) + size > tonumber(ARGV[1]) then return 'full' end
for i = 2, #ARGV, 2 do
  redis.call('XADD', KEYS[1], '*', 'rollout', ARGV[i + 1])
  redis.call('SADD', KEYS[3], ARGV[i])
end
redis.call('HINCRBY', KEYS[2], 'published', size)
return 'admitted'
"""

OWN_PENDING = (
    _HELPERS
    + """
-- KEYS: stream; ARGV: group consumer after count
-- Returns {last id read, entries}; no last id once all were read. Reading counts as a delivery. What was deleted from
-- the stream is passed over; XAUTOCLAIM removes it.
local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', ARGV[4], 'STREAMS', KEYS[1], ARGV[3])
local rows = reply and reply[1] and reply[1][2] or {}
local entries = {}
for _, entry in ipairs(rows) do
  if entry[2] then
    table.insert(entries, {entry[1], payload(entry[2]), deliveries(KEYS[1], ARGV[1], entry[1])})
  end
end
return {#rows == tonumber(ARGV[4]) and rows[#rows][1], entries}
"""
)

AVAILABLE = (
    _HELPERS
    + """
-- KEYS: stream; ARGV: group consumer idle_ms cursor count
-- Reclaims from the cursor on, and reads new entries once all that are claimed have been looked through: a round trip
-- for both. Returns {cursor, entries, ids that were deleted from the stream}.
local reply = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
local entries = {}
for _, entry in ipairs(reply[2]) do
  table.insert(entries, {entry[1], payload(entry[2]), deliveries(KEYS[1], ARGV[1], entry[1])})
end
local room = tonumber(ARGV[5]) - #entries
if reply[1] == '0-0' and room > 0 then
  local new = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', room, 'STREAMS', KEYS[1], '>')
  for _, entry in ipairs(new and new[1] and new[1][2] or {}) do
    table.insert(entries, {entry[1], payload(entry[2]), 1})
  end
end
return {reply[1], entries, reply[3]}
"""
)

HEARTBEAT = """
-- KEYS: stream; ARGV: group consumer, then entry ids. Returns the ids that are still this consumer's.
local kept = {}
for i = 3, #ARGV do
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])[1]
  if row then
    local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    if claimed[1] then table.insert(kept, ARGV[i]) end
  end
end
return kept
"""

ACKNOWLEDGE = """
-- KEYS: stream ledger; ARGV: group, then entry id and outcome of each. Returns how many were counted.
local by_outcome = {}
for i = 2, #ARGV, 2 do
  by_outcome[ARGV[i + 1]] = by_outcome[ARGV[i + 1]] or {}
  table.insert(by_outcome[ARGV[i + 1]], ARGV[i])
end
local counted = 0
for outcome, ids in pairs(by_outcome) do
  local there = 0
  for first = 1, #ids, 1000 do -- Lua's stack has an end
    local last = math.min(first + 999, #ids)
    redis.call('XACK', KEYS[1], ARGV[1], unpack(ids, first, last))
    there = there + redis.call('XDEL', KEYS[1], unpack(ids, first, last))
  end
  if there > 0 then redis.call('HINCRBY', KEYS[2], outcome, there) end
  counted = counted + there
end
return counted
"""

BURY = (
    _HELPERS
    + """
-- KEYS: stream ledger dead; ARGV: group, entry id, reason. Returns 1, or 0 when the entry is not in the stream.
local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if not entry then return 0 end
redis.call('XADD', KEYS[3], '*', 'entry_id', ARGV[2], 'reason', ARGV[3], 'payload', payload(entry[2]))
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('HINCRBY', KEYS[2], 'dead', 1)
return 1
"""
)

REPLAY = """
-- KEYS: stream ledger dead; ARGV: capacity, entry id
for _, letter in ipairs(redis.call('XRANGE', KEYS[3], '-', '+')) do
  local fields = {}
  for i = 1, #letter[2], 2 do fields[letter[2][i]] = letter[2][i + 1] end
  if fields['entry_id'] == ARGV[2] then
    if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 'full' end
    redis.call('XADD', KEYS[1], '*', 'rollout', fields['payload'])
    redis.call('XDEL', KEYS[3], letter[1])
    redis.call('HINCRBY', KEYS[2], 'dead', -1)
    return 'replayed'
  end
end
return 'gone'
"""

STATUS = """
-- KEYS: stream ledger dead; ARGV: group. Before the first start() there is no group, and nothing is claimed.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
if pending.err then
  if not string.find(pending.err, 'NOGROUP', 1, true) then return pending end
  pending = {0}
end
return {redis.call('XLEN', KEYS[1]), pending[1], redis.call('XLEN', KEYS[3]), redis.call('HGETALL', KEYS[2])}
"""
