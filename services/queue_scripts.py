"""What the queue does inside redis, in Lua, so that each of its operations happens whole or not at all."""

PUSH = """
local floor = redis.call('GET', KEYS[3])
if floor and tonumber(ARGV[5]) < tonumber(floor) then return -1 end
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 0 end
local fields = {'id', ARGV[1], 'index', ARGV[2], 'group', ARGV[3]}
if ARGV[4] ~= '' then fields[7], fields[8] = 'trace', ARGV[4] end
local id = redis.call('XADD', KEYS[1], '*', unpack(fields))
redis.call('HSET', KEYS[2], ARGV[1], id)
return 1
"""
BURY = """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 0 end
redis.call('XADD', KEYS[1], '*', 'id', ARGV[1], 'index', ARGV[2], 'group', ARGV[3], 'reason', ARGV[4])
redis.call('HSET', KEYS[2], ARGV[1], 'dead')
return 1
"""
LEAVE_OUT = """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[1], 'left_out')
return 1
"""
# Of a damaged entry nobody knows which group it was. A repeated call gets the first one's answer. Before the run's
# orchestrator has said how many more groups it takes, there is room.
RETRY = """
local before = redis.call('HGET', KEYS[4], ARGV[1])
if before then return tonumber(before) end
local found = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not found then return -1 end
local fields = {}
for i = 1, #found[2], 2 do fields[found[2][i]] = found[2][i + 1] end
if redis.call('HGET', KEYS[2], fields['id']) ~= 'dead' or fields['id'] == '?' then return -2 end
local room = redis.call('GET', KEYS[5])
if room and tonumber(room) <= 0 then return -3 end
if room then redis.call('DECR', KEYS[5]) end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], fields['id'])
redis.call('RPUSH', KEYS[3], fields['index'])
redis.call('HSET', KEYS[4], ARGV[1], fields['index'])
return tonumber(fields['index'])
"""
# Who says so must have counted all that were asked for.
OFFER_ROOM = """
if redis.call('LLEN', KEYS[1]) ~= tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""
CLAIM_LINEAGE = """
local stored, lineage = redis.call('GET', KEYS[1]), tonumber(ARGV[1])
if stored and tonumber(stored) + 1 > lineage then lineage = tonumber(stored) + 1 end
redis.call('SET', KEYS[1], string.format('%d', lineage))
return lineage
"""
# Every script of the consumer starts with this; an empty ARGV[1] stands for a consumer that claimed no lineage.
FENCE = """
local current = redis.call('GET', KEYS[1])
if ARGV[1] ~= '' and current ~= ARGV[1] then return redis.error_reply('FENCED ' .. (current or 'none')) end
"""
PENDING = FENCE + "return redis.call('XPENDING', KEYS[2], ARGV[2])[1]"
ACK = (
    FENCE
    + """
local acked = 0
for i = 3, #ARGV do
  acked = acked + redis.call('XACK', KEYS[2], ARGV[2], ARGV[i])
  redis.call('XDEL', KEYS[2], ARGV[i])
  redis.call('HDEL', KEYS[3], ARGV[i])
end
return acked
"""
)
# The token makes a repeated call count once.
BEGIN = (
    FENCE
    + """
for i = 3, #ARGV do
  local count, token = string.match(redis.call('HGET', KEYS[2], ARGV[i]) or '0:', '(%d+):(.*)')
  if token ~= ARGV[2] then redis.call('HSET', KEYS[2], ARGV[i], (count + 1) .. ':' .. ARGV[2]) end
end
"""
)
FINISH = FENCE + "for i = 2, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end"
RECALL = (
    FENCE
    + """
local news = 0
for i = 2, #ARGV do news = news + redis.call('HSETNX', KEYS[2], ARGV[i], 'trained') end
return news
"""
)
# Pushed, and neither given up nor in the stream any more.
LOST = (
    FENCE
    + """
local lost = {}
for i = 2, #ARGV do
  local entry = redis.call('HGET', KEYS[3], ARGV[i])
  if entry and entry ~= 'dead' and entry ~= 'left_out' then
    if entry == 'trained' or #redis.call('XRANGE', KEYS[2], entry, entry) == 0 then lost[#lost + 1] = ARGV[i] end
  end
end
return lost
"""
)
RAISE_FLOOR = FENCE + "redis.call('SET', KEYS[2], ARGV[1])"
# What was given up stays given up.
FORGET = (
    FENCE
    + """
for i = 2, #ARGV do
  local entry = redis.call('HGET', KEYS[2], ARGV[i])
  if entry and entry ~= 'dead' and entry ~= 'left_out' then redis.call('HDEL', KEYS[2], ARGV[i]) end
end
"""
)
EMPTY = (
    FENCE
    + """
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  local fields = entry[2]
  for i = 1, #fields, 2 do
    if fields[i] == 'id' then redis.call('HDEL', KEYS[3], fields[i + 1]) end
  end
end
redis.pcall('XGROUP', 'DESTROY', KEYS[2], ARGV[2])
redis.call('XTRIM', KEYS[2], 'MAXLEN', 0)
redis.call('XGROUP', 'CREATE', KEYS[2], ARGV[2], '0', 'MKSTREAM')
redis.call('DEL', KEYS[4])
"""
)
DEAD_LETTER = (
    FENCE
    + """
if redis.call('XACK', KEYS[2], ARGV[2], ARGV[3]) == 0 then return 0 end
redis.call('XADD', KEYS[3], '*', 'id', ARGV[4], 'index', ARGV[5], 'group', ARGV[6], 'reason', ARGV[7])
redis.call('XDEL', KEYS[2], ARGV[3])
redis.call('HDEL', KEYS[4], ARGV[3])
redis.call('HSET', KEYS[5], ARGV[4], 'dead')
return 1
"""
)
DEPTH = """
local waiting, pending = redis.call('XLEN', KEYS[1]), redis.pcall('XPENDING', KEYS[1], ARGV[1])
local first, time = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1], redis.call('TIME')
local delivered, dead = pending.err and 0 or pending[1], redis.call('XLEN', KEYS[2])
local left_out = redis.call('HLEN', KEYS[3])
return {waiting, delivered, dead, first and first[1] or '', time[1], time[2], left_out}
"""
