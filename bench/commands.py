"""How long the commands take, against `python3 -c 'import click'`, beside the peers' commands."""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import peers
from peers import Peer
from rig import PYTHON, as_a_user, box, end, goal, median, milliseconds, raise_descriptor_limit, running, table

COLUMNS = ("start, returns", "at work", "status", "stop, returns", "gone")
GOALS = (("status", "status", 1.5), ("start", "start, returns", 2.5), ("kill", "gone", 1.7))
Times = dict[str, list[float]]


def main() -> None:
    """Measure with the usual number of descriptors allowed, then with as many as can be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    as_a_user()
    usual = measure(rounds)
    show(f"Milliseconds, medians of {rounds} rounds, the usual RLIMIT_NOFILE", usual)
    limit = raise_descriptor_limit()
    high = measure(rounds)
    show(f"The same with RLIMIT_NOFILE at {limit:,}", high)
    for command, column, at_most in GOALS:
        goal(f"{command} / import click", ratio(usual, column), at_most)
        goal(f"{command} / import click, RLIMIT_NOFILE at {limit:,}", ratio(high, column), at_most)


def measure(rounds: int) -> dict[str, Times]:
    """Let everybody start, tell and stop once a round."""
    found: dict[str, Times] = defaultdict(lambda: defaultdict(list))
    with box() as path:
        kinds = [kind(path) for kind in (*peers.WITH_PID_FILE, peers.supervisor)]
        with running(peers.SUPERVISORD, "-c", str(path / "supervisord.conf")):
            while not (path / "supervisor.sock").exists():
                time.sleep(0.05)
            for _ in range(rounds):
                for peer in kinds:
                    for code in ("pass", "import click"):
                        found[f"python3 -c '{code}'"]["start, returns"].append(milliseconds(PYTHON, "-c", code))
                    for column, value in one_life(peer).items():
                        found[peer.name][column].append(value)
    return found


def one_life(peer: Peer) -> dict[str, float]:
    """Start, ask, stop; the daemon itself writes down when it began to work."""
    began = time.monotonic_ns()
    times = {"start, returns": milliseconds(*peer.start)}
    while not peer.pids():
        time.sleep(0.002)
    times["at work"] = (peer.began_at() - began) / 1e6
    if peer.status:
        times["status"] = milliseconds(*peer.status)
    (pid,) = peer.pids()
    try:
        with open(os.pidfd_open(pid)) as pidfd:
            times |= stop(peer.stop, pidfd.fileno())
    finally:
        end(pid)
    peer.forget()
    while peer.pid_path.exists() and not _is_kept(peer.pid_path):
        time.sleep(0.002)
    return times


def stop(command: list[str], pidfd: int) -> dict[str, float]:
    """Watch the daemon and the command that ends it."""
    began, times = time.monotonic_ns(), {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        waiting = {pidfd: "gone", os.pidfd_open(process.pid): "stop, returns"}
        while waiting:
            for fd in select.select(list(waiting), [], [], 60)[0]:
                times[waiting.pop(fd)] = (time.monotonic_ns() - began) / 1e6
                if fd != pidfd:
                    os.close(fd)
    return times


def ratio(found: dict[str, Times], column: str) -> float:
    """How often Python with click would have started in that time."""
    return median(found["daemonkit"][column]) / median(found["python3 -c 'import click'"]["start, returns"])


def show(title: str, found: dict[str, Times]) -> None:
    """Print the medians."""
    table(title, ("", *COLUMNS), [[name, *(median(times[c]) for c in COLUMNS)] for name, times in found.items()])


def _is_kept(path: Path) -> bool:
    """A PID file that its owner, dead by now, has not removed would stop the next start: take it away."""
    time.sleep(0.05)
    path.unlink(missing_ok=True)
    return False


if __name__ == "__main__":
    peers.require()
    main()
