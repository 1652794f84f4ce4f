"""Queues to be measured: bare loops, which are the limit, and daemonkit.  The peers are in queue_peers.py.

Each is a module that has ``put(what, value)``, perhaps ``put_many(calls)``, and a command that starts its workers;
in both, and in the environment, {queue}, {path} and the servers' ports, {redis} and {beanstalkd}, are filled in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rig import DAEMONKIT, PYTHON

WORKERS = 2
TTR = 5.0  # seconds


class Place(NamedTuple):
    """Where files and servers are."""

    path: Path
    redis: int  # port
    beanstalkd: int  # port


class Subject(NamedTuple):
    """A queue with its workers."""

    name: str
    text: str  # of its module
    command: Callable[[str, int], list[str]]  # from the module's name, which is the queue's, too, and a number
    programs: int  # that make two workers
    tasks: int  # a second, roughly
    needs: str = ""  # a server
    environ: tuple[tuple[str, str], ...] = ()

    @property
    def slug(self) -> str:
        """A name for its module and its queue."""
        return "q_" + "".join(letter if letter.isalnum() else "_" for letter in self.name.lower())


# What every task does; in a module that imports next to nothing.
WORK = """\
import os, time

def do(what, value):
    if what != "noop":
        now = time.monotonic_ns()
        fd = os.open(os.environ["MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{what} {value} {now} {os.getpid()}\\n".encode())
        os.close(fd)
        if what == "wait":
            time.sleep(4)
"""
_REDIS = """
import json, redis, work
client = redis.Redis(port={redis})

def put(what, value):
    client.lpush("{queue}", json.dumps([what, value]))

def put_many(calls):
    client.lpush("{queue}", *map(json.dumps, calls))
"""
REDIS_POP = f"""{_REDIS}
def consume():
    while True:
        work.do(*json.loads(client.brpop("{{queue}}")[1]))
"""
REDIS_MOVE = f"""{_REDIS}
def consume():
    while True:
        body = client.blmove("{{queue}}", "{{queue}}.taken", 0, "RIGHT", "LEFT")
        work.do(*json.loads(body))
        client.lrem("{{queue}}.taken", 1, body)
"""
SQLITE = """
import json, sqlite3, time, work
db = sqlite3.connect("{path}/{queue}.db", isolation_level=None, timeout=60)
db.execute("PRAGMA journal_mode=WAL")
db.execute("PRAGMA synchronous=SYNCHRONOUS")
db.execute("CREATE TABLE IF NOT EXISTS task (id INTEGER PRIMARY KEY, state INTEGER, body TEXT)")
db.execute("CREATE INDEX IF NOT EXISTS ready ON task (id) WHERE state=0")

def put(what, value):
    db.execute("INSERT INTO task (state, body) VALUES (0, ?)", (json.dumps([what, value]),))

def put_many(calls):
    db.execute("BEGIN IMMEDIATE")
    db.executemany("INSERT INTO task (state, body) VALUES (0, ?)", [(json.dumps(call),) for call in calls])
    db.execute("COMMIT")

TAKE = '''UPDATE task SET state=1 WHERE id IN (SELECT id FROM task WHERE state=0 ORDER BY id LIMIT BATCH)
RETURNING id, body'''

def consume():
    while True:
        db.execute("BEGIN IMMEDIATE")
        rows = db.execute(TAKE).fetchall()
        db.execute("COMMIT")
        if not rows:
            time.sleep(0.02)
            continue
        for id, body in rows:
            work.do(*json.loads(body))
        db.execute("BEGIN IMMEDIATE")
        db.executemany("DELETE FROM task WHERE id=?", [(id,) for id, _ in rows])
        db.execute("COMMIT")
"""
BEANSTALKD = """
import json, socket, work
sock = socket.create_connection(("127.0.0.1", {beanstalkd}))
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
file = sock.makefile("rb")
sock.sendall(b"use {queue}\\r\\nwatch {queue}\\r\\n")
file.readline(), file.readline()

def _words(what, value):
    body = json.dumps([what, value]).encode()
    return b"put 1024 0 TTR %d\\r\\n%s\\r\\n" % (len(body), body)

def put(what, value):
    sock.sendall(_words(what, value))
    file.readline()

def put_many(calls):
    sock.sendall(b"".join(_words(*call) for call in calls))
    for _ in calls:
        file.readline()

def consume():
    words = b"reserve\\r\\n"
    while True:
        sock.sendall(words)
        if words.startswith(b"delete"):
            file.readline()
        _, id, size = file.readline().split()
        body = file.read(int(size) + 2)
        work.do(*json.loads(body))
        words = b"delete %s\\r\\nreserve\\r\\n" % id
""".replace("TTR", f"{TTR:g}")
KIT = """
import work
from daemonkit import task

@task("{queue}", mode="MODE", concurrency=2, ttr=TTR, backoff=0.1)
def run(what, value):
    work.do(what, value)

def put(what, value):
    run.put(what, value)

def put_many(calls):
    run.put_many(calls)
""".replace("TTR", f"{TTR:g}")


def loop(module: str, number: int) -> list[str]:
    """A bare loop."""
    return [PYTHON, "-c", f"import {module}; {module}.consume()"]


def kit_command(module: str, number: int) -> list[str]:
    """A daemon in the foreground."""
    return [DAEMONKIT, "run", "--name", f"{module[:40]}-{number}", "--concurrency", str(WORKERS), f"{module}.py"]


def _sqlite(synchronous: str, batch: int, tasks: int) -> Subject:
    text = SQLITE.replace("SYNCHRONOUS", synchronous).replace("BATCH", str(batch))
    some = f", {batch} a transaction" if batch > 1 else ""
    return Subject(f"raw SQLite WAL {synchronous}{some}", text, loop, 2, tasks)


def kit(engine: str, mode: str, tasks: int, needs: str = "") -> Subject:
    """daemonkit's, on an engine."""
    url = {
        "SQLite FULL": "sqlite:{path}/{queue}.db",
        "SQLite NORMAL": "sqlite:{path}/{queue}.db?synchronous=NORMAL",
        "Redis": "redis://127.0.0.1:{redis}",
        "beanstalkd": "beanstalk://127.0.0.1:{beanstalkd}",
    }[engine]
    text = KIT.replace("MODE", mode)
    return Subject(f"daemonkit {mode}, {engine}", text, kit_command, 1, tasks, needs, (("DAEMONKIT_BROKER", url),))


RAW = (
    Subject("raw Redis pop loop", REDIS_POP, loop, 2, 10_000, "redis"),
    Subject("raw Redis safe move loop", REDIS_MOVE, loop, 2, 5_000, "redis"),
    _sqlite("NORMAL", 1, 10_000),
    _sqlite("FULL", 1, 3_000),
    _sqlite("FULL", 16, 30_000),
    Subject("raw beanstalkd loop", BEANSTALKD, loop, 2, 20_000, "beanstalkd"),
)


def ours() -> tuple[Subject, ...]:
    """Those of daemonkit's engines that there are."""
    from daemonkit.queue.connect import SCHEMES

    made = [
        *(kit("SQLite FULL", "prefork", 8_000), kit("SQLite NORMAL", "prefork", 8_000)),
        kit("Redis", "prefork", 5_000, "redis"),
        *(kit("SQLite FULL", "fork", 500), kit("SQLite NORMAL", "fork", 500), kit("Redis", "fork", 500, "redis")),
    ]
    if "beanstalk" in SCHEMES:
        made.insert(3, kit("beanstalkd", "prefork", 8_000, "beanstalkd"))
        made.append(kit("beanstalkd", "fork", 500, "beanstalkd"))
    return tuple(made)
