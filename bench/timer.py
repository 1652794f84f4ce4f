"""How late ticks are against their grid, and whether they drift: daemonkit, a bare loop, APScheduler, schedule."""

from __future__ import annotations

import argparse
import heapq
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import peers
from rig import DAEMONKIT, PYTHON, as_a_user, box, burnt_core, end, goal, median, percentile, table

WARM_UP = 2.5  # seconds for everybody to start
SECOND = 1_000_000_000


class Ticks:
    """What one of them has to do: write down when it was called, until it was called often enough."""

    def __init__(self, path: str, begin: int, interval: int, count: int) -> None:
        """Times in nanoseconds of the monotonic clock; ``begin`` is the first point of the grid."""
        self.path, self.begin, self.interval, self.count = path, begin, interval, count
        self.seen: list[int] = []
        self.off_grid = 0  # nanoseconds by which a due time has left the grid at most, where that can be seen
        self.finish: Callable[[], object] = lambda: os._exit(0)

    def tick(self) -> None:
        """One call."""
        self.seen.append(time.monotonic_ns())
        if len(self.seen) == self.count:
            Path(f"{self.path}.new").write_text(json.dumps([self.begin, self.seen, self.off_grid]))
            os.rename(f"{self.path}.new", self.path)
            self.finish()


def be_daemonkit(ticks: Ticks) -> None:
    """A job of ``daemonkit run``.  Its grid begins when it is ready: the job asks for it at its first tick."""
    from daemonkit.api import default

    ticks.finish = lambda: signal.raise_signal(signal.SIGTERM)

    def tick() -> None:
        planned = default.jobs["tick"].planned
        assert planned is not None
        if not ticks.seen:
            ticks.begin = planned - ticks.interval
        off = planned - ticks.begin - (len(ticks.seen) + 1) * ticks.interval
        ticks.off_grid = max(ticks.off_grid, abs(off))
        ticks.tick()

    first = (ticks.begin - time.monotonic_ns()) / SECOND
    default.every(ticks.interval / SECOND, first=first, name="tick")(tick)


def be_bare(ticks: Ticks) -> None:
    """The limit: a heap, and one alarm set again for the next absolute time."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    heap = [(ticks.begin, 0, ticks.tick)]
    while True:
        due, number, func = heap[0]
        now = time.monotonic_ns()
        if due > now:
            signal.setitimer(signal.ITIMER_REAL, max(due - now, 1000) / 1e9)
            signal.sigwait({signal.SIGALRM})
            continue
        heapq.heapreplace(heap, (due + ticks.interval, number, func))
        func()


def be_apscheduler(ticks: Ticks) -> None:
    """BlockingScheduler with everything as it comes."""
    from apscheduler.schedulers.blocking import BlockingScheduler
    from apscheduler.triggers.interval import IntervalTrigger

    wall = time.time_ns() + (ticks.begin - time.monotonic_ns())
    trigger = IntervalTrigger(
        seconds=ticks.interval / SECOND, start_date=datetime.fromtimestamp(wall / SECOND, UTC), timezone=UTC
    )
    scheduler = BlockingScheduler(timezone=UTC)
    scheduler.add_job(ticks.tick, trigger)
    scheduler.start()


def be_schedule(ticks: Ticks) -> None:
    """The loop of its manual, but asleep for exactly as long as the library says."""
    import schedule

    time.sleep(max((ticks.begin - ticks.interval - time.monotonic_ns()) / SECOND, 0))
    schedule.every(ticks.interval / SECOND).seconds.do(ticks.tick)
    while True:
        time.sleep(max(schedule.idle_seconds(), 0))
        schedule.run_pending()


Kinds = dict[str, Callable[[Ticks], None]]
KINDS: Kinds = {
    "daemonkit": be_daemonkit,
    "bare Python": be_bare,
    "APScheduler": be_apscheduler,
    "schedule": be_schedule,
}


def main() -> None:
    """Measure idle and with a core burnt; everybody ticks in the same seconds, apart by a share of the interval."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="for each of the four runs")
    parser.add_argument("--be", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.be:
        kind, path, *numbers = chosen.be
        KINDS[kind](Ticks(path, *map(int, numbers)))
        return
    peers.require()
    as_a_user()
    for interval in (SECOND, SECOND // 10):
        for is_burnt in (False, True):
            measure(interval, int(chosen.seconds * SECOND / interval), is_burnt)


def measure(interval: int, count: int, is_burnt: bool, kinds: Kinds = KINDS) -> dict[str, list[float]]:
    """One run of everybody; what each was late."""
    begin = time.monotonic_ns() + int(WARM_UP * SECOND)
    with box() as path, burnt_core(is_burnt):
        processes = [
            subprocess.Popen(command(kind, path, begin + n * interval // len(kinds), interval, count))
            for n, kind in enumerate(kinds)
        ]
        try:
            for process in processes:
                process.wait(timeout=WARM_UP + 2 * count * interval / SECOND + 10)
            found = {kind: json.loads((path / kind).read_text()) for kind in kinds}
        finally:
            for process in processes:
                if process.poll() is None:
                    end(process.pid, signal.SIGTERM)
    words = f"{count} ticks of {interval / SECOND:g} s, {'one core burnt' if is_burnt else 'machine as it is'}"
    late = {kind: lateness(begin, seen, interval) for kind, (begin, seen, _) in found.items()}
    show(words, late)
    goal("drift of the due times, ns", found["daemonkit"][2], 0)
    return late


def command(kind: str, path: Path, begin: int, interval: int, count: int) -> list[str]:
    """The command line of one of them; what it says is seen."""
    arguments = [__file__, "--be", kind, str(path / kind), str(begin), str(interval), str(count)]
    return [DAEMONKIT, "run", "--name", "ticks", *arguments] if kind == "daemonkit" else [PYTHON, *arguments]


def lateness(begin: int, seen: list[int], interval: int) -> list[float]:
    """Microseconds after each one's own point of the grid."""
    return [(at - begin - n * interval) / 1000 for n, at in enumerate(seen)]


def drift(late: list[float]) -> float:
    """How much later the last quarter of the ticks is than the first, in milliseconds."""
    quarter = max(len(late) // 4, 1)
    return round((median(late[-quarter:]) - median(late[:quarter])) / 1000, 1)


def show(words: str, found: dict[str, list[float]]) -> None:
    """The table of a run, and the goals."""
    p50 = {kind: median(late) for kind, late in found.items()}
    p99 = {kind: percentile(late, 0.99) for kind, late in found.items()}
    rows = [[kind, p50[kind], p99[kind], max(late), drift(late)] for kind, late in found.items()]
    table(f"Microseconds late, {words}", ("", "p50", "p99", "largest", "drift, ms"), rows)
    goal("p50 / bare loop", p50["daemonkit"] / p50["bare Python"], 1.3)
    goal("p99 / bare loop", p99["daemonkit"] / p99["bare Python"], 2)
    if "APScheduler" in found:
        goal("p99 of APScheduler / ours", p99["APScheduler"] / p99["daemonkit"], 3, at_least=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
