"""Hundreds of calls asleep at once on one core and in little memory: how many fit, and how many a second are done."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pool_calls
from rig import goal, table

from daemonkit.processes.future import Call

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
CAP = 800
HEADROOM = 0.95  # of the limit, when the children are counted
STEP = 8  # children between two looks
SMALLEST = 200 * 1024  # bytes; no child of an interpreter is smaller
# The limit: forks of a program that imports next to nothing, each with a socket for its result.
BARE = """
import os, socket, sys, time
ends = []
while line := sys.stdin.readline():
    for _ in range(int(line)):
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            time.sleep(600)
            theirs.send(b"done")
            os._exit(0)
        theirs.close()
        ends.append(ours)
    print(len(ends), flush=True)
"""


class Group:
    """A memory cgroup with a limit, of either version."""

    def __init__(self, size: int) -> None:
        """Make it; OSError if that may not be."""
        is_new = (V2 / "cgroup.controllers").exists()
        self.path = (V2 if is_new else V1) / f"bench-{os.getpid()}"
        self._used = "memory.current" if is_new else "memory.usage_in_bytes"
        self._peak = "memory.peak" if is_new else "memory.max_usage_in_bytes"
        self._events = "memory.events" if is_new else "memory.oom_control"
        self.path.mkdir()
        (self.path / ("memory.max" if is_new else "memory.limit_in_bytes")).write_text(str(size))
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def used(self) -> int:
        """Bytes that the kernel charges now."""
        return int((self.path / self._used).read_text())

    @property
    def peak(self) -> int:
        """The most that it has charged."""
        return int((self.path / self._peak).read_text())

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed in it for want of memory."""
        return int((self.path / self._events).read_text().split("oom_kill ")[1].split()[0])

    def leave(self) -> None:
        """Go back to where all are."""
        (self.path.parent / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """Leave, and remove it."""
        self.leave()
        self.path.rmdir()


@contextlib.contextmanager
def small_box(size: int) -> Iterator[Group | None]:
    """One core, and ``size`` bytes if a memory cgroup can be had."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        group = Group(size)
    except OSError as error:
        print(f"no memory limit: {error}", file=sys.stderr)
        group = None
    try:
        yield group
    finally:
        if group:
            group.close()
        os.sched_setaffinity(0, cores)


def fit(group: Group, size: int) -> int:
    """How many children sleep at once before the box is almost full."""
    from daemonkit import Pool

    pool = Pool(100_000)
    pool.submit(pool_calls.same).result(60)  # from here on the module is where children are forked
    asleep: list[Call] = []
    try:
        # One that ended was killed for want of memory.  The bound is for a kernel that does not count as expected.
        while group.used < size * HEADROOM and len(asleep) * SMALLEST < size and not any(c.done() for c in asleep):
            asleep += [pool.submit(pool_calls.sleep, 600) for _ in range(STEP)]
            pool.submit(pool_calls.same).result(60)  # it is forked after them
        return sum(not call.done() for call in asleep)
    finally:
        pool.kill()


def fit_bare(group: Group, size: int) -> int:
    """The same for a bare loop's."""
    # A session of its own, to be ended as a whole; as many descriptors as it may have.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    command = [sys.executable, "-c", BARE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as program:
        assert program.stdin
        assert program.stdout
        number = 0
        try:
            while group.used < size * HEADROOM and number * SMALLEST < size:
                program.stdin.write(b"%d\n" % STEP)
                program.stdin.flush()
                number = int(program.stdout.readline())
            return number
        finally:
            os.killpg(program.pid, signal.SIGKILL)


def sustain(calls: int) -> tuple[float, float]:
    """Calls of 1-3 s a second, at most 800 at once, and the seconds of CPU that each cost."""
    from daemonkit import Pool

    lengths = list(some_lengths(calls))
    began, cpu = time.monotonic(), _cpu()
    with Pool(CAP) as pool:
        assert list(pool.map(pool_calls.sleep, lengths)) == lengths
    return calls / (time.monotonic() - began), (_cpu() - cpu) / calls


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--part", choices=("bare", "fit", "sustain"), help="one alone")
    options = parser.parse_args()
    size = options.megabytes << 20
    if options.part is None:
        all_parts(options.calls, options.megabytes)
        return
    with small_box(size) as group:
        if options.part != "sustain":
            print((fit if options.part == "fit" else fit_bare)(group, size) if group else 0)
            return
        rate, cost = sustain(options.calls)
        peak = group.peak / 2**20 if group else float("nan")
        ideal = ideal_rate(options.calls)
        table(
            "Calls of 1-3 s, 800 at once",
            ["calls/s", "ideal", "CPU ms a call", "peak MB"],
            [[rate, ideal, cost * 1000, peak]],
        )
        goal("rate, of the ideal", rate / ideal, 0.9, at_least=True)


def all_parts(calls: int, megabytes: int) -> None:
    """Each in a process and a box of its own."""
    command = [sys.executable, __file__, "--calls", str(calls), "--megabytes", str(megabytes), "--part"]
    numbers = [int(subprocess.check_output([*command, part])) for part in ("bare", "fit")]
    if all(numbers):
        subjects = zip(["bare loop, fork + socket pair (limit)", "daemonkit.Pool"], numbers, strict=True)
        rows = [[name, number, (megabytes << 10) * HEADROOM / number] for name, number in subjects]
        table(f"Children asleep in {megabytes} MB", ["of", "children", "KB each"], rows)
        goal("children asleep in 1 GB", numbers[1] * 1024 / megabytes, 1900, at_least=True)
        goal("... of the bare loop's (1,900 where that has 1,899)", numbers[1] / numbers[0], 1, at_least=True)
    else:
        print("\nHow many children fit is left out: there is no memory cgroup to be had.")
    subprocess.run([*command, "sustain"], check=True)


def some_lengths(calls: int) -> Iterator[float]:
    """How long each sleeps: the same in each run."""
    chance = random.Random(1)
    for _ in range(calls):
        yield chance.uniform(1, 3)


def ideal_rate(calls: int) -> float:
    """With 800 places that cost nothing: each call goes to the one that is free first."""
    import heapq

    places = [0.0] * CAP
    for length in some_lengths(calls):
        heapq.heappush(places, heapq.heappop(places) + length)
    return calls / max(places)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()
