"""Queues with two workers and tasks that do nothing, on each engine, beside bare loops and peers.

All in one run, by turns, with servers that keep everything in memory; medians.  "Put to start" is one task every 30 to
80 ms into an idle queue.  "Run again" is a task of 4 s whose process, or all of whose workers' program, is killed with
-9 while a second program runs.  daemonkit's ttr is 5 s, the peers have their defaults.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import queue_peers
from queue_rig import LEAD, Queue, queue, servers
from queue_subjects import RAW, TTR, Subject, ours
from rig import PYTHON, as_a_user, box, end, goal, median, table

SETTLING = 1.0  # seconds
BARE_FORK = "bare fork + socket pair, two at once"
HEAD = (
    *("", "put/s", "put_many/s, by 100", "tasks/s", "put to start p50 ms"),
    *("idle wake-ups/s", "again after kill -9 of the worker, s", "... of its program, s"),
)
NAN = float("nan")


class Figures(NamedTuple):
    """Of one subject."""

    put: float = NAN  # a second, one by one
    put_many: float = NAN  # a second, in hundreds
    rate: float = NAN  # tasks a second
    latency: float = NAN  # ms from put to start, p50
    wakeups: float = NAN  # a second, of all processes, when there is nothing to do


def main() -> None:
    """By turns, in rounds; the kills at last, of all at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of tasks")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds")
    parser.add_argument("--watch", type=float, default=30.0, help="seconds until a killed task is given up")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    options = parser.parse_args()
    queue_peers.require()
    as_a_user()
    subjects = [each for each in (*RAW, *ours(), *queue_peers.PEERS) if options.only.lower() in each.name.lower()]
    found: dict[str, list[Figures]] = defaultdict(list)
    with box() as path:
        for number in range(options.rounds):
            for subject in subjects:
                idle = options.idle if number == 0 else 0.0
                with servers(path / f"{subject.slug}-{number}") as place, queue(subject, place) as made:
                    found[subject.name].append(figures(made, options.scale, idle))
            found[BARE_FORK].append(Figures(rate=bare_fork(int(1000 * options.scale))))
        again = run_again(subjects, path, options.watch)
    middle = {name: _middle(rows) for name, rows in found.items()}
    rows = [[name, *each, *again.get(name, ("\\-", "\\-"))] for name, each in middle.items()]
    table(f"Two workers, medians of {options.rounds} rounds", HEAD, rows)
    goals(middle, again)


def figures(made: Queue, scale: float, idle: float) -> Figures:
    """One round of one subject."""
    tasks = int(made.subject.tasks * scale)
    singles = min(max(tasks // 2, 100), int(2000 * scale))
    put_many = made.tell("by_hundreds", max(int(tasks * LEAD) // 100, 1) * 100)
    made.tell("mark", 0)
    counted = max(tasks - singles, 100) // 100 * 100
    others = made.tell("by_hundreds", counted)
    put = made.tell("singly", singles)
    made.tell("mark", 1)
    made.start()
    first, last = (mark.moment for mark in made.await_marks("mark", 2))
    rate = (counted + singles) / (last - first) * 1e9
    time.sleep(SETTLING / 4)
    stamps = made.tell("stamps", max(int(40 * scale), 5))
    assert isinstance(stamps, list)
    begun = {mark.value: mark.moment for mark in made.await_marks("stamp", len(stamps))}
    latency = median([(begun[number] - moment) / 1e6 for number, moment in enumerate(stamps)])
    wakeups = NAN
    if idle:
        time.sleep(
            TTR + SETTLING if "daemonkit" in made.subject.name else SETTLING
        )  # what was reserved last is looked at
        before = made.cost()
        time.sleep(idle)
        wakeups = (made.cost().switches - before.switches) / idle
    return Figures(_number(put), median([_number(each) for each in (put_many, others)]), rate, latency, wakeups)


def bare_fork(calls: int) -> float:
    """Processes a second, each of which gives a result."""
    program = f"""
import json, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import pool, pool_calls
with pool.bare_fork() as subject:
    began = time.perf_counter()
    subject.many(pool_calls.same, list(range({calls})))
    print(json.dumps({calls} / (time.perf_counter() - began)))
"""
    return float(json.loads(subprocess.run([PYTHON, "-c", program], stdout=subprocess.PIPE, check=True).stdout))


def run_again(subjects: Sequence[Subject], path: Path, watch: float) -> dict[str, tuple[object, object]]:
    """Seconds until a killed task begins again: after a kill of its process, and of its whole program."""
    with servers(path / "again") as place, ExitStack() as stack:
        made = [stack.enter_context(queue(subject, place)) for subject in subjects]
        for each in made:
            for _ in range(2):
                each.start_another()
        worker = _after(made, 1, lambda each, pid: end(pid), watch)
        for each in made:
            each.start_another()
        program = _after(made, 2, lambda each, pid: each.kill_program_of(pid), watch)
    return {name: (worker[name], program[name]) for name in worker}


def _after(made: Sequence[Queue], number: int, act: Callable[[Queue, int], None], watch: float) -> dict[str, object]:
    killed = {}
    for each in made:
        each.tell("wait", number)
        mark = each.await_marks("wait", 1, number)[0]
        killed[each.subject.name] = time.monotonic_ns()
        act(each, mark.pid)
    until = time.monotonic() + watch
    found: dict[str, object] = {}
    while time.monotonic() < until and len(found) < len(made):
        for each in made:
            moments = [mark.moment for mark in each.marks("wait", number)]
            if len(moments) > 1:
                found[each.subject.name] = (moments[1] - killed[each.subject.name]) / 1e9
        time.sleep(0.05)
    return {each.subject.name: found.get(each.subject.name, f"not within {watch:g}") for each in made}


def goals(found: dict[str, Figures], again: dict[str, tuple[object, object]]) -> None:
    """Those of which both sides were measured."""

    def ratio(what: str, ours: str, theirs: str, field: str, least: float) -> None:
        if ours in found and theirs in found:
            share = getattr(found[ours], field) / getattr(found[theirs], field)
            goal(what, share, least, at_least=True)

    kit = "daemonkit prefork, {}".format
    move, full, unsafe = "raw Redis safe move loop", "raw SQLite WAL FULL", "huey, SQLite, fsync=False"
    ratio("prefork, Redis, tasks/s, of the raw safe loop's", kit("Redis"), move, "rate", 0.7)
    ratio("... of huey's", kit("Redis"), "huey, Redis", "rate", 1)
    ratio("prefork, SQLite FULL, tasks/s, of huey's without fsync", kit("SQLite FULL"), unsafe, "rate", 1)
    ratio("SQLite FULL, put/s, of the raw loop's", kit("SQLite FULL"), full, "put", 0.8)
    ratio("prefork, beanstalkd, tasks/s, of the raw loop's", kit("beanstalkd"), "raw beanstalkd loop", "rate", 0.5)
    for name, each in found.items():
        if not name.startswith("daemonkit"):
            continue
        is_fork = "fork," in name and "prefork" not in name
        if is_fork:
            ratio(f"{name}, tasks/s, of the bare fork loop's", name, BARE_FORK, "rate", 0.7)
        goal(f"{name}, put to start, ms", each.latency, 4 if is_fork else 2)
        goal(f"{name}, idle wake-ups/s", each.wakeups, 0.2)
        for what, seconds, limit in zip(("worker", "program"), again[name], (1, TTR + 1), strict=True):
            value = seconds if isinstance(seconds, float) else float("inf")
            goal(f"{name}, again after kill -9 of the {what}, s", value, limit)


def _middle(rows: Sequence[Figures]) -> Figures:
    columns = [[value for value in column if value == value] for column in zip(*rows, strict=True)]
    return Figures(*map(median, columns))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else NAN


if __name__ == "__main__":
    main()
