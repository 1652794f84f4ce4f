"""One hour of ticks of 1 s: every tick once, none off the grid.  Not part of all.py."""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from rig import DAEMONKIT, as_a_user, box, end, goal, percentile, table

SECOND = 1_000_000_000


def be_daemonkit(path: Path, count: int) -> None:
    """The job: note when it was called, and for which point of its grid."""
    from daemonkit.api import default

    seen: list[tuple[int, int]] = []

    @default.every(1)
    def tick() -> None:
        planned = default.jobs["tick"].planned
        assert planned is not None
        seen.append((time.monotonic_ns(), planned - SECOND))
        if len(seen) == count:
            path.write_text(json.dumps(seen))
            signal.raise_signal(signal.SIGTERM)


def main() -> None:
    """Let a daemon tick, then look at what it has written down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=3600)
    parser.add_argument("--be", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.be:
        be_daemonkit(chosen.be, chosen.ticks)
        return
    as_a_user()
    with box() as path:
        arguments = ["--be", str(path / "ticks"), "--ticks", str(chosen.ticks)]
        process = subprocess.Popen([DAEMONKIT, "run", "--name", "hour", __file__, *arguments])
        try:
            process.wait(timeout=chosen.ticks * 1.1 + 30)
            seen = json.loads((path / "ticks").read_text())
        finally:
            if process.poll() is None:
                end(process.pid)
    report([at for at, _ in seen], [due for _, due in seen])


def report(called: list[int], due: list[int]) -> None:
    """Against the grid that the first due time begins."""
    late = [(at - due[0] - n * SECOND) / 1000 for n, at in enumerate(called)]
    head = ("ticks", "p50", "p99", "largest")
    table("Microseconds late", head, [[len(late), percentile(late, 0.5), percentile(late, 0.99), max(late)]])
    goal("due times off the grid", sum((point - due[0]) % SECOND != 0 for point in due), 0)
    goal("ticks left out or made twice", sum(b - a != SECOND for a, b in itertools.pairwise(due)), 0)
    goal("largest lateness, s", max(late) / 1e6, 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
