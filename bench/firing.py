"""What one firing costs with many jobs: daemonkit, a bare heap with an alarm, APScheduler, schedule."""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import peers
from rig import DAEMONKIT, PYTHON, as_a_user, box, end, goal, pss, table

SIZES = (10, 1_000, 10_000, 100_000)
WARM_UP = 2.0  # seconds after the start before anything is counted
SECOND = 1_000_000_000


class Result(NamedTuple):
    """What one run has shown."""

    microseconds: float  # of processor time per firing
    done: float  # firings done, of those due
    registration: float  # seconds
    bytes_per_job: float


class Plan:
    """The jobs: intervals of 1 to 60 seconds, first runs spread over each interval."""

    def __init__(self, path: str, size: int, seconds: float) -> None:
        """Count for ``seconds`` after the warm-up, then write the result to ``path``."""
        self.path, self.seconds = path, seconds
        chance = random.Random(size)
        self.jobs = [(1 + n % 60, chance.uniform(0, 1 + n % 60)) for n in range(size)]
        self.count = 0
        self.finish: Callable[[], object] = lambda: os._exit(0)
        self._pss, self._began = pss("self"), time.monotonic()
        self._ready = 0.0
        self._grown = 0
        self._from: tuple[int, float, float] | None = None

    def fire(self) -> None:
        """What every job does."""
        self.count += 1

    def ready(self) -> None:
        """All are registered, and the timer runs."""
        self._ready, self._grown = time.monotonic(), pss("self") - self._pss

    def begin(self) -> None:
        """Count from here on."""
        self._from = (self.count, time.process_time(), time.monotonic())

    def end(self) -> None:
        """Count up to here; write it down."""
        assert self._from is not None
        count, cpu, at = self.count - self._from[0], time.process_time() - self._from[1], time.monotonic()
        due = sum(
            (at - self._ready - first) // interval - (self._from[2] - self._ready - first) // interval
            for interval, first in self.jobs
        )
        registration, size = self._ready - self._began, len(self.jobs)
        result = Result(cpu / max(count, 1) * 1e6, count / due if due else 1.0, registration, self._grown / size)
        Path(self.path).write_text(json.dumps(result))
        self.finish()

    @property
    def milestones(self) -> list[tuple[float, Callable[[], None]]]:
        """Seconds after the start, and what is to be called then, once."""
        return [(0.001, self.ready), (WARM_UP, self.begin), (WARM_UP + self.seconds, self.end)]


def be_daemonkit(plan: Plan) -> None:
    """Jobs of ``daemonkit run``."""
    from daemonkit import after, every

    plan.finish = lambda: signal.raise_signal(signal.SIGTERM)
    for number, (interval, first) in enumerate(plan.jobs):
        every(interval, first=first, name=f"job{number}")(plan.fire)
    for delay, func in plan.milestones:
        after(delay)(func)


def be_bare(plan: Plan) -> None:
    """The limit: a heap, and one alarm set again for the next absolute time."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    now = time.monotonic_ns()
    heap: list[tuple[int, int, int, Callable[[], None]]] = []
    for interval, first in plan.jobs:
        heap.append((now + int(first * SECOND), len(heap), interval * SECOND, plan.fire))
    for delay, func in plan.milestones:
        heap.append((now + int(delay * SECOND), len(heap), 3600 * SECOND, func))
    heapq.heapify(heap)
    while True:
        due, number, step, func = heap[0]
        now = time.monotonic_ns()
        if due > now:
            signal.setitimer(signal.ITIMER_REAL, max(due - now, 1000) / 1e9)
            signal.sigwait({signal.SIGALRM})
            continue
        heapq.heapreplace(heap, (due + step, number, step, func))
        func()


def be_apscheduler(plan: Plan) -> None:
    """BlockingScheduler as it comes, but that late jobs are run, too."""
    from apscheduler.schedulers.blocking import BlockingScheduler
    from apscheduler.triggers.interval import IntervalTrigger

    scheduler, now = BlockingScheduler(timezone=UTC), datetime.now(UTC)
    for interval, first in plan.jobs:
        start = now + timedelta(seconds=first)
        trigger = IntervalTrigger(seconds=interval, start_date=start, timezone=UTC)
        scheduler.add_job(plan.fire, trigger, misfire_grace_time=None)
    scheduler.add_listener(lambda _: start_milestones(), 1)  # EVENT_SCHEDULER_STARTED

    def start_milestones() -> None:
        began = datetime.now(UTC)
        for delay, func in plan.milestones:
            scheduler.add_job(func, "date", run_date=began + timedelta(seconds=delay), misfire_grace_time=None)

    scheduler.start()


def be_schedule(plan: Plan) -> None:
    """The loop of its manual, but asleep for exactly as long as the library says."""
    import schedule

    def once(func: Callable[[], None]) -> object:
        func()
        return schedule.CancelJob

    now = datetime.now()
    for interval, first in plan.jobs:
        schedule.every(interval).seconds.do(plan.fire).next_run = now + timedelta(seconds=first)
    for delay, func in plan.milestones:
        schedule.every(3600).seconds.do(once, func).next_run = datetime.now() + timedelta(seconds=delay)
    while True:
        schedule.run_pending()
        time.sleep(max(schedule.idle_seconds() or 0, 0))


KINDS = {"bare Python": be_bare, "daemonkit": be_daemonkit, "APScheduler": be_apscheduler, "schedule": be_schedule}


def main() -> None:
    """Measure everybody with every number of jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="counted in each of the sixteen runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--be", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.be:
        kind, path, size, seconds = chosen.be
        KINDS[kind](Plan(path, int(size), float(seconds)))
        return
    peers.require()
    as_a_user()
    for size in chosen.sizes:
        show(size, {kind: measure(kind, size, chosen.seconds) for kind in chosen.kinds})


def measure(kind: str, size: int, seconds: float) -> Result:
    """One run of one of them."""
    with box() as path:
        arguments = [__file__, "--be", kind, str(path / "result"), str(size), str(seconds)]
        command = [DAEMONKIT, "run", "--name", "jobs", *arguments] if kind == "daemonkit" else [PYTHON, *arguments]
        process = subprocess.Popen(command)
        try:
            process.wait(timeout=WARM_UP + seconds * 4 + 60)
            return Result(*json.loads((path / "result").read_text()))
        finally:
            if process.poll() is None:
                end(process.pid)


def show(size: int, found: dict[str, Result]) -> None:
    """The table of a size, and the goals."""
    head = ("", "CPU per firing, us", "done / due", "registration, s", "bytes a job")
    table(f"{size:,} jobs of 1-60 s", head, [[kind, *result] for kind, result in found.items()])
    ours, bare, other = found["daemonkit"], found["bare Python"], found["APScheduler"]
    goal("CPU / bare loop", ours.microseconds / bare.microseconds, 2)
    goal("CPU of APScheduler / ours", other.microseconds / ours.microseconds, 2, at_least=True)
    if size >= 1_000:
        goal("done / due", ours.done, 0.998, at_least=True)  # jobs due within a moment of either mark may be missed
    if size == 100_000:
        goal("registration of 100,000, s", ours.registration, 1)
        goal("... of the bare loop's (1 s where that takes 0.03 s)", ours.registration / bare.registration, 33)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
