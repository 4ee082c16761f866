"""What the queue does inside redis, in Lua, so that each of its operations happens whole or not at all."""

PUSH = """
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
return {waiting, delivered, dead, first and first[1] or '', time[1], time[2]}
"""
