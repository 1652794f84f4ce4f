"""The tables of the SQLite broker, and what is asked of them.

A body has a table of its own: a change of state then writes a page or two, however large the body is.  Each state has
an index of its own rows alone.  ``AUTOINCREMENT`` never gives an id twice.

Delays and pauses are kept in milliseconds of the wall clock, as they outlive a reboot.  Time-outs of reservations are
in milliseconds of the monotonic clock, which nobody can set; they do not outlive a reboot, and so the boot is noted.
"""

from __future__ import annotations

from typing import Final

VERSION: Final = 2
READY, DELAYED, RESERVED, BURIED = range(4)

SETTINGS: Final = """
PRAGMA busy_timeout=10000;
PRAGMA synchronous={synchronous};
PRAGMA wal_autocheckpoint=1000;
PRAGMA journal_size_limit=16777216;
PRAGMA temp_store=MEMORY;
"""

TABLES: Final = f"""
CREATE TABLE queue(
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  paused_until INTEGER NOT NULL DEFAULT 0,
  pause_reason TEXT);
CREATE TABLE task(
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  queue INTEGER NOT NULL,
  state INTEGER NOT NULL,
  priority INTEGER NOT NULL,
  due INTEGER NOT NULL,
  ttr INTEGER NOT NULL,
  token INTEGER NOT NULL DEFAULT 0,
  owner TEXT,
  reserves INTEGER NOT NULL DEFAULT 0,
  timeouts INTEGER NOT NULL DEFAULT 0,
  releases INTEGER NOT NULL DEFAULT 0,
  buries INTEGER NOT NULL DEFAULT 0,
  kicks INTEGER NOT NULL DEFAULT 0,
  failures INTEGER NOT NULL DEFAULT 0,
  made INTEGER NOT NULL,
  key TEXT,
  reason TEXT,
  progress TEXT);
CREATE TABLE body(id INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE result(id INTEGER PRIMARY KEY, until INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX result_until ON result(until);
CREATE TABLE consumer(owner TEXT PRIMARY KEY, queues TEXT NOT NULL, concurrency INTEGER NOT NULL);
CREATE TABLE counter(token INTEGER NOT NULL, boot TEXT NOT NULL, store TEXT NOT NULL);
INSERT INTO counter VALUES(0, '', lower(hex(randomblob(8))));
CREATE INDEX task_ready ON task(queue, priority, id) WHERE state={READY};
CREATE INDEX task_delayed ON task(due, queue) WHERE state={DELAYED};
CREATE INDEX task_reserved ON task(due, queue) WHERE state={RESERVED};
CREATE INDEX task_buried ON task(queue, due, id) WHERE state={BURIED};
CREATE UNIQUE INDEX task_key ON task(queue, key) WHERE key IS NOT NULL;
PRAGMA user_version={VERSION};
"""

ADD_QUEUE: Final = "INSERT INTO queue(name) VALUES(?) ON CONFLICT(name) DO NOTHING"
PUT: Final = """
INSERT INTO task(queue, state, priority, due, ttr, made, key) VALUES(?, ?, ?, ?, ?, ?, ?)
ON CONFLICT(queue, key) WHERE key IS NOT NULL DO NOTHING RETURNING id"""
PUT_BODY: Final = "INSERT INTO body VALUES(?, ?)"
FIND_KEY: Final = "SELECT id FROM task WHERE queue=? AND key=?"

DELETE: Final = f"DELETE FROM task WHERE id=? AND state={RESERVED} AND token=?"
DELETE_BODY: Final = "DELETE FROM body WHERE id=?"
RELEASE: Final = f"""
UPDATE task SET state=?, due=?, priority=coalesce(?, priority), owner=NULL, releases=releases+1,
  failures=failures+?, reason=coalesce(?, reason)
WHERE id=? AND state={RESERVED} AND token=?"""
BURY: Final = f"""
UPDATE task SET state={BURIED}, due=?, owner=NULL, buries=buries+1, failures=failures+1, reason=?
WHERE id=? AND state={RESERVED} AND token=?"""
KEEP: Final = "INSERT OR REPLACE INTO result VALUES(?, ?, ?)"
FORGET: Final = "DELETE FROM result WHERE id IN (SELECT id FROM result WHERE until<=? LIMIT 1000)"
RESULT: Final = "SELECT body FROM result WHERE id=? AND until>?"
TOUCH: Final = f"UPDATE task SET due=?+ttr, progress=coalesce(?, progress) WHERE id=? AND state={RESERVED} AND token=?"

# Some at a time: whoever else wants to write waits meanwhile.
EXPIRE: Final = f"""
UPDATE task SET state={READY}, owner=NULL, timeouts=timeouts+1, failures=failures+1, reason=?
WHERE id IN (SELECT id FROM task WHERE state={RESERVED} AND due<=? ORDER BY due LIMIT 1000)"""
RIPEN: Final = f"""
UPDATE task SET state={READY}
WHERE id IN (SELECT id FROM task WHERE state={DELAYED} AND due<=? ORDER BY due LIMIT 1000)"""
OWNERS: Final = f"SELECT DISTINCT owner FROM task WHERE state={RESERVED}"
DISOWN: Final = f"""
UPDATE task SET state={READY}, owner=NULL, timeouts=timeouts+1, failures=failures+1, reason=?
WHERE state={RESERVED} AND owner=?"""
EARLIEST: Final = f"""
SELECT (SELECT min(due) FROM task WHERE state={DELAYED}), (SELECT min(due) FROM task WHERE state={RESERVED}),
  (SELECT min(paused_until) FROM queue WHERE paused_until>?)"""

ANNOUNCE: Final = "INSERT OR REPLACE INTO consumer VALUES(?, ?, ?)"
RENOUNCE: Final = "DELETE FROM consumer WHERE owner=?"
CONSUMERS: Final = f"""
SELECT owner, queues, concurrency,
  (SELECT count(*) FROM task WHERE state={RESERVED} AND task.owner=consumer.owner)
FROM consumer ORDER BY owner"""
AHEAD: Final = f"""
SELECT count(*) FROM task JOIN queue ON queue.id=task.queue
WHERE state={READY} AND name=? AND (priority, task.id) < (?, ?)"""

# One walk along the index for each queue: `queue IN (...)` would sort all that is ready.
FIRST: Final = f"""SELECT * FROM (
  SELECT id, queue, priority, ttr, failures, key FROM task
  WHERE state={READY} AND queue=? ORDER BY priority, id LIMIT ?)"""
FIRST_OF_ALL: Final = """SELECT id, queue, priority, ttr, failures, key, body FROM (
{each} ORDER BY priority, id LIMIT ?) JOIN body USING(id) ORDER BY priority, id"""
RESERVE: Final = f"UPDATE task SET state={RESERVED}, due=?, token=?, owner=?, reserves=reserves+1 WHERE id=?"
NEXT_TOKENS: Final = "UPDATE counter SET token=max(token, ?)+?"
TOKEN: Final = "SELECT token FROM counter"
PAUSED: Final = "SELECT id FROM queue WHERE paused_until>?"

KICK: Final = f"""
UPDATE task SET state={READY}, kicks=kicks+1, failures=0
WHERE id IN (SELECT id FROM task WHERE queue=? AND state=? ORDER BY due, id LIMIT ?)"""
KICK_TASK: Final = f"""
UPDATE task SET state={READY}, kicks=kicks+1, failures=0 WHERE id=? AND state IN ({DELAYED}, {BURIED})"""
DELETE_TASK: Final = f"DELETE FROM task WHERE id=? AND state<>{RESERVED}"
BURY_TASK: Final = f"""
UPDATE task SET state={BURIED}, due=?, buries=buries+1, reason=? WHERE id=? AND state IN ({READY}, {DELAYED})"""
PEEK: Final = """
SELECT name, task.id, state, body, priority, ttr, made, due, reserves, timeouts, releases, buries, kicks, failures,
  reason, owner, progress, key
FROM task JOIN queue ON queue.id=task.queue JOIN body ON body.id=task.id WHERE """
COUNTS: Final = " UNION ALL ".join(  # each along its own index, without a look at the table
    f"SELECT queue, {state}, count(*) FROM task WHERE state={state} GROUP BY queue"
    for state in (DELAYED, RESERVED, BURIED)
)
COUNT_READY: Final = f"SELECT count(*) FROM task WHERE state={READY} AND queue=?"
QUEUES: Final = "SELECT id, name, paused_until, pause_reason FROM queue ORDER BY name"
PAUSE: Final = "UPDATE queue SET paused_until=?, pause_reason=? WHERE id=?"
EMPTY: Final = "DELETE FROM task WHERE queue=? AND state=? RETURNING id"
