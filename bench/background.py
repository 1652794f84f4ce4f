"""Work for after the response: what the call costs its caller, and how soon the work begins, from a big web worker."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rig import median, table

from daemonkit import Background

_STAMP = struct.Struct("=q")


def begin(path: str) -> None:
    """Tell when the work begins; every process has the same monotonic clock."""
    now = time.monotonic_ns()
    with open(path, "wb", buffering=0) as file:
        file.write(_STAMP.pack(now))


def in_thread(path: str) -> None:
    threading.Thread(target=begin, args=(path,)).start()


def by(method: str) -> Callable[[str], None]:
    """As multiprocessing does it; a daemonic process would be killed with the web worker."""
    context: Any = multiprocessing.get_context(method)

    def start(path: str) -> None:
        context.Process(target=begin, args=(path,)).start()

    return start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=300, help="what the web worker holds")
    chosen = parser.parse_args()
    held = [bytes(10_000) for _ in range(chosen.megabytes * 100)]  # pages that are touched, objects that are counted
    with ExitStack() as stack:
        path = str(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / "begun")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDWR)
        stack.callback(os.close, reader)
        server, fresh = Background(2), Background(2, start="spawn")
        stack.callback(server.drain, "30s")
        stack.callback(fresh.drain, "30s")
        ways: dict[str, tuple[Callable[[str], None], int]] = {
            "threading.Thread (ends with the web worker)": (in_thread, 1),
            "multiprocessing.Process, fork": (by("fork"), 4),
            "multiprocessing.Process, spawn": (by("spawn"), 10),
            "background": (lambda path: server(begin, path), 1),
            'background, start="spawn"': (lambda path: fresh(begin, path), 10),
        }
        asked: dict[str, list[float]] = {name: [] for name in ways}
        begun: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(chosen.calls):
            for name, (call, nth) in ways.items():  # by turns, so that what else the machine does is the same for all
                if number % nth:
                    continue
                before = time.monotonic_ns()
                call(path)
                after = time.monotonic_ns()
                (then,) = _STAMP.unpack(os.read(reader, _STAMP.size))
                if number:  # the first one starts a server
                    asked[name].append((after - before) / 1e3)
                    begun[name].append((then - before) / 1e6)
                multiprocessing.active_children()  # reaps
    rows = [(name, median(asked[name]), _worst(asked[name]), median(begun[name])) for name in ways]
    table(
        f"One call at a time from a process of {chosen.megabytes} MB, {len(held):,} objects in it",
        ["", "µs in the caller, p50", "p95", "ms until the work begins, p50"],
        rows,
    )


def _worst(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


if __name__ == "__main__":
    main()
