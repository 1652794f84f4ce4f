"""Tasks of 1-3 s, asleep in a process each, from a Redis outside the box: up to 800 at once on one core and in 1 GB."""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from queue_rig import servers, tree
from rig import DAEMONKIT, as_a_user, box, cost, goal, running, table
from small_box import CAP, Group, ideal_rate, small_box, some_lengths

SCRIPT = """
import os, time
from daemonkit import task

def mark(word):
    fd = os.open("{marks}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{{word}} {{time.monotonic_ns()}}\\n".encode())
    os.close(fd)

@task("sleepy")
def sleep(number, seconds):
    mark(f"begun {{number}}")
    time.sleep(seconds)
    mark(f"done {{number}}")
"""
SETTLING = 2.0  # seconds
PATIENCE = 600.0  # seconds


def main() -> None:
    """Put them all, then start the daemon in its box."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=1024)
    options = parser.parse_args()
    as_a_user()
    with box() as path, servers(path / "servers") as place:
        os.environ["DAEMONKIT_BROKER"] = f"redis://127.0.0.1:{place.redis}"
        marks = path / "marks"
        script = path / "sleepy.py"
        script.write_text(SCRIPT.format(marks=marks))
        put(path, options.tasks)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with daemon_in_box(script, options.megabytes << 20) as (pid, group):
            moments = await_done(marks, options.tasks)
            time.sleep(SETTLING)
            left, stays = len(tree(pid)), cost(pid).cpu
            peak = group.peak / 2**20 if group else float("nan")
            kills = group.kills if group else 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    begun = sorted(moment for word, _, moment in moments if word == "begun")
    done = sorted(moment for word, _, moment in moments if word == "done")
    rate, ideal = options.tasks / (done[-1] - begun[0]) * 1e9, ideal_rate(options.tasks)
    most = most_at_once(begun, done)
    each = [seconds / options.tasks * 1000 for seconds in (spent, stays)]
    head = ["tasks/s", "ideal", "most at once", "peak MB", "killed for want of memory", "left"]
    head += ["CPU ms a task", "... of what stays"]
    table(f"{options.tasks:,} tasks of 1-3 s", head, [[rate, ideal, most, peak, kills, left, *each]])
    goal("rate, of the ideal", rate / ideal, 0.9, at_least=True)
    goal("tasks at once", most, CAP)
    goal("processes that the memory limit killed", kills, 0)
    goal("tasks that were begun twice", len(begun) - len({number for _, number, _ in moments}), 0)


def put(path: Path, tasks: int) -> None:
    """Put them all, in the script's name."""
    sys.path.insert(0, str(path))
    sleepy = importlib.import_module("sleepy")
    calls = list(enumerate(some_lengths(tasks)))
    for start in range(0, tasks, 1000):
        sleepy.sleep.put_many(calls[start : start + 1000])


@contextmanager
def daemon_in_box(script: Path, size: int) -> Iterator[tuple[int, Group | None]]:
    """The daemon in the box, and we outside; its PID."""
    with ExitStack() as boxed, ExitStack() as stack:
        group = boxed.enter_context(small_box(size))
        command = [DAEMONKIT, "run", "--concurrency", str(CAP), str(script)]
        process = stack.enter_context(running(*command, quiet=False))
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        if group:
            group.leave()
        yield process.pid, group


def await_done(marks: Path, tasks: int) -> list[tuple[str, int, int]]:
    """The marks, when all are done: word, number, moment."""
    until = time.monotonic() + PATIENCE
    while True:
        time.sleep(0.5)
        lines = marks.read_text().splitlines() if marks.exists() else []
        found = [(word, int(number), int(moment)) for word, number, moment in map(str.split, lines)]
        if len({number for word, number, _ in found if word == "done"}) == tasks:
            return found
        assert time.monotonic() < until, f"{len(found)} marks"


def most_at_once(begun: list[int], done: list[int]) -> int:
    """How many have slept at the same time."""
    steps = sorted([(moment, 1) for moment in begun] + [(moment, -1) for moment in done])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


if __name__ == "__main__":
    main()
