"""What the Redis broker has the server do at once, in Lua (redis.io, "Scripting with Lua").

Keys, after the prefix: ``task:ID`` a hash; ``ready:``, ``delayed:``, ``reserved:`` and ``buried:QUEUE`` sorted sets of
ids, scored by priority, time, time and time; ``keys:QUEUE`` the keys of tasks; ``paused:QUEUE``; ``wake:QUEUE``,
written when there is something to reserve, which consumers are told of; ``queues``, ``ids``, ``tokens``, ``consumers``.

All times are the server's, in milliseconds.  Ids and tokens are its microseconds, and more than the last one: a server
that has forgotten some, as it was emptied, restarted or replaced by its replica, gives none of them again, and nobody
who asks for what it has lost is told of another task.  The first write of a script that makes room is one that the
server takes when its memory is full: then it takes the others, too.
"""

from __future__ import annotations

from typing import Final

HEAD: Final = """
local P = KEYS[1]
local t = redis.call('TIME')
local now, micros = t[1] * 1000 + math.floor(t[2] / 1000), t[1] * 1000000 + t[2]
local function of(kind, queue) return P .. kind .. ':' .. queue end
local function task(id) return P .. 'task:' .. id end
local function wide(id) return string.format('%016d', id) end
local function narrow(member) return string.format('%d', member) end
local function wake(queue) redis.call('SET', of('wake', queue), now) end
local function get(id, field) return redis.call('HGET', task(id), field) end
local function may_grow() redis.call('ZREM', P .. 'nothing', '') end
local function make_ready(queue, id)
  redis.call('ZADD', of('ready', queue), get(id, 'priority'), wide(id))
end
local function let_go(queue, id)
  redis.call('ZREM', of('reserved', queue), wide(id))
  redis.call('HDEL', task(id), 'token', 'owner')
end
local function fail(id, counter, reason)
  redis.call('HINCRBY', task(id), counter, 1)
  if reason then redis.call('HSET', task(id), 'reason', reason) end
end
local function wait_or_ready(queue, id, delay)
  if delay > 0 then redis.call('ZADD', of('delayed', queue), now + delay, wide(id)) else make_ready(queue, id) end
end
local function drop(queue, id)
  local key = get(id, 'key')
  if key then redis.call('HDEL', of('keys', queue), key) end
  redis.call('DEL', task(id))
end
local function timed_out(queue, id, reason)
  let_go(queue, id)
  fail(id, 'failures', reason)
  fail(id, 'timeouts')
  make_ready(queue, id)
end
local function add(queue, body, priority, ttr)
  local number = redis.call('INCR', P .. 'ids')
  if number < micros then
    number = micros
    redis.call('SET', P .. 'ids', string.format('%d', number))
  end
  local id = string.format('%d', number)  -- Lua itself would write 14 digits
  redis.call('HSET', task(id), 'body', body, 'queue', queue, 'priority', priority, 'ttr', ttr, 'made', now)
  return id
end
"""

# request, queue, then of each task: body, priority, delay, ttr, key.  A request whose reply was lost is made again at
# once: it is remembered for a minute, and 200 bytes.
PUT: Final = """
local request, queue = P .. 'put:' .. ARGV[1], ARGV[2]
local done = redis.call('GET', request)
local ids = {}
if done then
  for id in string.gmatch(done, '%d+') do ids[#ids + 1] = id end
  return ids
end
redis.call('SADD', P .. 'queues', queue)
for i = 3, #ARGV, 5 do
  local key, id = ARGV[i + 4], nil
  if key ~= '' then id = redis.call('HGET', of('keys', queue), key) end
  if not id then
    id = add(queue, ARGV[i], ARGV[i + 1], ARGV[i + 3])
    wait_or_ready(queue, id, tonumber(ARGV[i + 2]))
    if key ~= '' then  -- last: should one step be refused, the repetition is not to take what is nowhere for a task
      redis.call('HSET', of('keys', queue), key, id)
      redis.call('HSET', task(id), 'key', key)
    end
  end
  ids[#ids + 1] = id
end
redis.call('SET', request, table.concat(ids, ' '), 'EX', 60)
wake(queue)
return ids
"""

# owner, count, reasons of a timeout, what it consumes, number of outcomes, of each:
# what, id, token, delay, words, priority;
# the words are a result, which is kept for the delay, the reason of a failure, or how far it has come;
# then of each queue: name, room, priority and ttr of what others push
EXCHANGE: Final = """
local owner, count, late, outcomes = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[5])
local at, lost, found = 6, {}, {}
may_grow()
-- A server that was emptied has forgotten it, and no connection was lost that would have it announced anew.
if ARGV[4] ~= '' then redis.call('HSETNX', P .. 'consumers', owner, ARGV[4]) end
for n = 1, outcomes do
  local what, id, token, delay = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  local reason, priority = ARGV[at + 4], ARGV[at + 5]
  at = at + 6
  if get(id, 'token') ~= token then
    lost[#lost + 1] = n
  else
    local queue = get(id, 'queue')
    if what == 'touch' then
      redis.call('ZADD', of('reserved', queue), 'XX', now + get(id, 'ttr'), wide(id))
      if reason ~= '' then redis.call('HSET', task(id), 'progress', reason) end
    else
      let_go(queue, id)
      if what == 'delete' then
        drop(queue, id)
        if delay > 0 then redis.call('SET', P .. 'result:' .. id, reason, 'PX', delay) end
      elseif what == 'bury' then
        fail(id, 'failures', reason)
        fail(id, 'buries')
        redis.call('ZADD', of('buried', queue), now, wide(id))
        redis.call('SET', P .. 'result:' .. id, '', 'PX', 1)
      else
        fail(id, 'releases')
        if what == 'fail' then fail(id, 'failures', reason) end
        if priority ~= '' then redis.call('HSET', task(id), 'priority', priority) end
        wait_or_ready(queue, id, delay)
        wake(queue)
      end
    end
  end
end
local queues, room, due = {}, {}, -1
local function earlier(moment) if moment and (due < 0 or moment < due) then due = moment end end
for i = at, #ARGV, 4 do
  local queue = ARGV[i]
  queues[#queues + 1] = queue
  room[queue] = tonumber(ARGV[i + 1])
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', of('reserved', queue), '-inf', now, 'LIMIT', 0, 100)) do
    timed_out(queue, narrow(member), late)
  end
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', of('delayed', queue), '-inf', now, 'LIMIT', 0, 100)) do
    redis.call('ZREM', of('delayed', queue), member)
    make_ready(queue, narrow(member))
  end
  if redis.call('TYPE', queue).ok == 'list' then
    redis.call('SADD', P .. 'queues', queue)
    for _ = 1, 100 do
      local body = redis.call('RPOP', queue)
      if not body then break end
      make_ready(queue, add(queue, body, ARGV[i + 2], ARGV[i + 3]))
    end
    if redis.call('EXISTS', queue) == 1 then due = 0 end
  end
  local pause = redis.call('PTTL', of('paused', queue))
  if pause > 0 then
    room[queue] = 0
    earlier(pause)
  end
end
local last = math.max(tonumber(redis.call('GET', P .. 'tokens') or '0'), micros)
while #found < count do
  local best, best_score, best_member
  for _, queue in ipairs(queues) do
    if room[queue] > 0 then
      local first = redis.call('ZRANGE', of('ready', queue), 0, 0, 'WITHSCORES')
      if first[1] then
        local score = tonumber(first[2])
        if not best or score < best_score or (score == best_score and first[1] < best_member) then
          best, best_score, best_member = queue, score, first[1]
        end
      end
    end
  end
  if not best then break end
  local id = narrow(best_member)
  redis.call('ZREM', of('ready', best), best_member)
  local token = string.format('%d', last + #found + 1)
  local ttr = get(id, 'ttr')
  redis.call('HSET', task(id), 'token', token, 'owner', owner)
  redis.call('HINCRBY', task(id), 'reserves', 1)
  redis.call('ZADD', of('reserved', best), now + ttr, best_member)
  room[best] = room[best] - 1
  local each = redis.call('HMGET', task(id), 'body', 'priority', 'failures', 'key')
  found[#found + 1] = {best, id, last + #found + 1, each[1], each[2], ttr, each[3] or '0', each[4] or ''}
end
if #found > 0 then redis.call('SET', P .. 'tokens', string.format('%d', last + #found)) end
for _, queue in ipairs(queues) do
  for _, kind in ipairs({'delayed', 'reserved'}) do
    local first = redis.call('ZRANGE', of(kind, queue), 0, 0, 'WITHSCORES')
    if first[2] then earlier(math.max(tonumber(first[2]) - now, 0)) end
  end
end
return {lost, found, due}
"""

# owner, reason ('' for none of its fault), then ids and tokens that are not meant
DISOWN: Final = """
local owner, reason, spared, count = ARGV[1], ARGV[2], {}, 0
for i = 3, #ARGV do spared[ARGV[i]] = true end
may_grow()
for _, queue in ipairs(redis.call('SMEMBERS', P .. 'queues')) do
  for _, member in ipairs(redis.call('ZRANGE', of('reserved', queue), 0, -1)) do
    local id = narrow(member)
    if get(id, 'owner') == owner and not spared[get(id, 'token')] then
      if reason ~= '' then
        timed_out(queue, id, reason)
      else
        let_go(queue, id)
        make_ready(queue, id)
      end
      wake(queue)
      count = count + 1
    end
  end
end
return count
"""

# owner, what it consumes, then owners that have ended
ANNOUNCE: Final = """
may_grow()
for i = 3, #ARGV do redis.call('HDEL', P .. 'consumers', ARGV[i]) end
redis.call('HSET', P .. 'consumers', ARGV[1], ARGV[2])
return 1
"""

# queue, milliseconds, reason
PAUSE: Final = """
local queue, left = ARGV[1], tonumber(ARGV[2])
may_grow()
redis.call('SADD', P .. 'queues', queue)
if left > 0 then
  redis.call('SET', of('paused', queue), ARGV[3], 'PX', left)
else
  redis.call('DEL', of('paused', queue))
end
wake(queue)
return 1
"""

# a name for the store, if it has none
STORE: Final = """
may_grow()
redis.call('SETNX', P .. 'store', ARGV[1])
return redis.call('GET', P .. 'store')
"""

KICK: Final = """
local queue, bound, count = ARGV[1], tonumber(ARGV[2]), 0
may_grow()
for _, kind in ipairs({'buried', 'delayed'}) do
  for _, member in ipairs(redis.call('ZRANGE', of(kind, queue), 0, bound - 1)) do
    redis.call('ZREM', of(kind, queue), member)
    redis.call('HINCRBY', task(narrow(member)), 'kicks', 1)
    redis.call('HSET', task(narrow(member)), 'failures', 0)
    make_ready(queue, narrow(member))
    count = count + 1
  end
  if count > 0 then
    wake(queue)
    break
  end
end
return count
"""

# what, id, reason
BY_HAND: Final = """
local what, id, reason = ARGV[1], ARGV[2], ARGV[3]
local queue = get(id, 'queue')
if not queue then return 0 end
may_grow()
local from = {kick = {'delayed', 'buried'}, delete = {'ready', 'delayed', 'buried'}, bury = {'ready', 'delayed'}}
for _, kind in ipairs(from[what]) do
  if redis.call('ZREM', of(kind, queue), wide(id)) == 1 then
    if what == 'delete' then
      drop(queue, id)
    elseif what == 'bury' then
      fail(id, 'buries', reason)
      redis.call('ZADD', of('buried', queue), now, wide(id))
    else
      redis.call('HINCRBY', task(id), 'kicks', 1)
      redis.call('HSET', task(id), 'failures', 0)
      make_ready(queue, id)
      wake(queue)
    end
    return 1
  end
end
return 0
"""

# queue, then states; some at a time
EMPTY: Final = """
local queue, count = ARGV[1], 0
for i = 2, #ARGV do
  for _, member in ipairs(redis.call('ZRANGE', of(ARGV[i], queue), 0, 999)) do
    redis.call('ZREM', of(ARGV[i], queue), member)
    drop(queue, narrow(member))
    count = count + 1
  end
end
return count
"""
