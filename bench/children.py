"""How soon a worker that was killed is replaced, and how soon nothing is left of a daemon whose master was killed."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from rig import DAEMONKIT, as_a_user, box, end, goal, median, percentile, table

PATIENCE = 60.0  # seconds
SCRIPT = """
import os, socket
from daemonkit import worker

told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

@worker(count={count}, readiness=True, backoff="1ms", max_backoff="1ms", max_restarts=10**6)
def crunch(stop):
    stop.ready()
    told.sendto(b"%d" % os.getpid(), {address!r})
    stop.wait()
"""


@contextlib.contextmanager
def daemon(count: int) -> Iterator[tuple[int, socket.socket]]:
    """A daemon with so many workers; its PID, and a socket at which each says its own when it is ready."""
    with box() as path, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        address = str(path / "heard")
        heard.bind(address)
        heard.settimeout(PATIENCE)
        script = path / "bench.py"
        script.write_text(SCRIPT.format(count=count, address=address))
        subprocess.run([DAEMONKIT, "start", str(script)], check=True, stdout=subprocess.DEVNULL)
        pid = int(Path(path / "run" / "bench.pid").read_text())
        try:
            yield pid, heard
        finally:
            end(pid)


def replacements(rounds: int) -> list[float]:
    """Milliseconds from kill -9 of a worker until the next one is ready, one after the other."""
    found = []
    with daemon(1) as (_, heard):
        for _ in range(rounds):
            pid = int(heard.recv(64))
            # Also a worker that is killed has a life before: as long as the longest wait, so that the next has none.
            select.select([], [], [], 0.02)
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            heard.recv(64, socket.MSG_PEEK)
            found.append((time.perf_counter() - began) * 1000)
    return found


def until_none_is_left(count: int) -> float:
    """Milliseconds from kill -9 of the master until the last of ``count`` workers and their fork server is gone."""
    with daemon(count) as (master, heard), contextlib.ExitStack() as stack:
        pids = [int(heard.recv(64)) for _ in range(count)]
        pids.append(int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1]))
        poll, left = select.poll(), set()
        for pid in pids:
            pidfd = stack.enter_context(open(os.pidfd_open(pid), "rb", buffering=0)).fileno()
            poll.register(pidfd, select.POLLIN)
            left.add(pidfd)
        began = time.perf_counter()
        os.kill(master, signal.SIGKILL)
        while left:
            ready = poll.poll(PATIENCE * 1000)
            if not ready:
                return float("nan")
            for pidfd, _ in ready:
                poll.unregister(pidfd)
                left.discard(pidfd)
        return (time.perf_counter() - began) * 1000


def main() -> None:
    """Print what the issue asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--children", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    as_a_user()
    times = replacements(chosen.kills)
    ends = [until_none_is_left(chosen.children) for _ in range(chosen.rounds)]
    table(
        "Milliseconds after kill -9",
        ["of", "until", "median", "worst"],
        [
            ("a worker", "its replacement is ready", median(times), percentile(times, 1)),
            ("the master", f"none of {chosen.children} workers is left", median(ends), percentile(ends, 1)),
        ],
    )
    goal("milliseconds until a replacement is ready, p50", median(times), 50)
    goal("milliseconds until none is left", median(ends), 100)


if __name__ == "__main__":
    main()
