"""What the bench scripts share: processes and what they cost, a burnt core, tables."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PYTHON = sys.executable
DAEMONKIT = str(Path(PYTHON).with_name("daemonkit"))
HIGH_LIMIT = 1_048_576  # descriptors; what containers often allow


class Cost(NamedTuple):
    """What a process tree has used so far, and its memory now."""

    processes: int
    switches: int
    cpu: float  # seconds
    pss: int  # bytes


@contextlib.contextmanager
def box() -> Iterator[Path]:
    """A temporary directory; daemonkit's run directory and log are in it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path = Path(name)
        (path / "run").mkdir(mode=0o755)
        os.environ.update(DAEMONKIT_RUN_DIR=str(path / "run"), DAEMONKIT_LOG=str(path / "daemon.log"))
        yield path


def as_a_user() -> None:
    """Leave out of the environment what would slow every start, or change what is measured."""
    for key in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "NOTIFY_SOCKET", "INVOCATION_ID"):
        os.environ.pop(key, None)


def raise_descriptor_limit() -> int:
    """Allow ourselves and our children `HIGH_LIMIT` descriptors, or as many as may be; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (HIGH_LIMIT, max(hard, HIGH_LIMIT)))
        return HIGH_LIMIT
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def run(*command: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and all it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout


def milliseconds(*command: str) -> float:
    """How long a command takes."""
    began = time.monotonic_ns()
    # Without a timeout: with one, subprocess asks in steps of up to 50 ms instead of waiting.
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return (time.monotonic_ns() - began) / 1e6


def end(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process that a bench has started, and wait until it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(pidfd):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        select.select([pidfd], [], [], 10)


@contextlib.contextmanager
def running(*command: str, quiet: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the time of a block."""
    sink = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdout=sink, stderr=sink) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


@contextlib.contextmanager
def burnt_core(is_wanted: bool) -> Iterator[None]:
    """One core kept busy for the time of a block."""
    if not is_wanted:
        yield
        return
    with running(PYTHON, "-c", "while True: pass"):
        yield


def is_alive(pid: int) -> bool:
    """Whether the process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cost(pid: int) -> Cost:
    """What ``pid`` and its descendants have cost, from /proc."""
    total = Cost(1, _switches(pid), _cpu(pid), pss(pid))
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            below = cost(int(child))
            total = Cost._make(mine + theirs for mine, theirs in zip(total, below, strict=True))
    return total


def pss(pid: int | str) -> int:
    """The process' share of memory, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no Pss in smaps_rollup")


def _switches(pid: int) -> int:
    lines = [
        line
        for task in os.listdir(f"/proc/{pid}/task")
        for line in Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def _cpu(pid: int) -> float:
    """Nanosecond sums of the scheduler, where ticks of a hundredth would show nothing."""
    tasks = os.listdir(f"/proc/{pid}/task")
    return sum(int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0]) for task in tasks) / 1e9


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def median(values: Sequence[float]) -> float:
    """The middle one; not a number if there is none."""
    return statistics.median(values) if values else float("nan")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table that reStructuredText and people can read."""
    cells = [[_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(len(row[n]) for row in cells) for n in range(len(head))]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    print(f"\n{title}\n", rule, lines[0], rule, *lines[1:], rule, "", sep="\n", flush=True)


def goal(what: str, value: float, limit: float, *, at_least: bool = False) -> None:
    """Print whether a goal is met."""
    is_met = value >= limit if at_least else value <= limit
    sign, word = ("at least" if at_least else "at most"), ("met" if is_met else "**missed**")
    print(f"* {what}: {value:.3g}, goal {sign} {limit:g}: {word}", flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if value != value:
        return "\\-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
