"""The peers among queues: RQ, huey, Celery and dramatiq, as their manuals have them, with two workers."""

from __future__ import annotations

import sys
from pathlib import Path

from queue_subjects import Subject
from rig import PYTHON

RQ = """
import work
from redis import Redis
from rq import Queue
queue = Queue("{queue}", connection=Redis(port={redis}))

def put(what, value):
    queue.enqueue(work.do, what, value)

def put_many(calls):
    queue.enqueue_many([Queue.prepare_data(work.do, call) for call in calls])
"""
HUEY = """
import work
from huey import RedisHuey, SqliteHuey
huey = MAKE

@huey.task()
def run(what, value):
    work.do(what, value)

def put(what, value):
    run(what, value)
"""
CELERY = """
import work
from celery import Celery
app = Celery("{queue}", broker="redis://127.0.0.1:{redis}/0")
app.conf.task_default_queue = "{queue}"
app.conf.task_ignore_result = True
app.conf.worker_hijack_root_logger = False

@app.task(name="{queue}.run")
def run(what, value):
    work.do(what, value)

def put(what, value):
    run.delay(what, value)
"""
DRAMATIQ = """
import work
import dramatiq
from dramatiq.brokers.redis import RedisBroker
dramatiq.set_broker(RedisBroker(url="redis://127.0.0.1:{redis}/0"))

@dramatiq.actor(queue_name="{queue}")
def run(what, value):
    work.do(what, value)

def put(what, value):
    run.send(what, value)
"""


def _tool(name: str) -> str:
    return str(Path(PYTHON).with_name(name))


def _rq(worker: str) -> Subject:
    def command(module: str, number: int) -> list[str]:
        return [_tool("rq"), "worker", "-q", "-w", f"rq.worker.{worker}", "-u", "redis://127.0.0.1:{redis}", module]

    return Subject(f"RQ {worker}", RQ, command, 2, 100 if worker == "Worker" else 400, "redis")


def _huey(name: str, make: str, tasks: int, needs: str = "") -> Subject:
    def command(module: str, number: int) -> list[str]:
        return [_tool("huey_consumer"), f"{module}.huey", "-k", "process", "-w", "2", "-q"]

    return Subject(f"huey, {name}", HUEY.replace("MAKE", make), command, 1, tasks, needs)


def _celery(module: str, number: int) -> list[str]:
    return [_tool("celery"), "-A", module, "worker", "-c", "2", "-l", "ERROR", "-n", f"{module}{number}@bench"]


def _dramatiq(module: str, number: int) -> list[str]:
    return [_tool("dramatiq"), module, "-p", "2", "-t", "1"]


PEERS = (
    _rq("SimpleWorker"),
    _rq("Worker"),
    _huey("Redis", 'RedisHuey("{queue}", port={redis})', 3_000, "redis"),
    _huey("SQLite, fsync=False", 'SqliteHuey("{queue}", filename="{path}/{queue}.db", fsync=False)', 8_000),
    _huey("SQLite", 'SqliteHuey("{queue}", filename="{path}/{queue}.db")', 2_500),
    Subject("Celery prefork, Redis", CELERY, _celery, 1, 800, "redis"),
    Subject("dramatiq, Redis", DRAMATIQ, _dramatiq, 1, 500, "redis"),
)


def require() -> None:
    """Leave with one sentence if the peers are not installed."""
    try:
        import celery
        import dramatiq
        import huey
        import redis
        import rq
    except ImportError as error:
        sys.exit(f"{error.name} is not installed; the figures need: pip install '.[bench]'")
    del celery, dramatiq, huey, redis, rq
