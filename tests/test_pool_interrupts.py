"""What control-C leaves of a pool, wherever it strikes the main thread."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import calls
import pytest
from harness import PATIENCE
from strikes import strikes

from daemonkit import Pool


def test_results_that_are_interrupted_anywhere_raise_that_and_go_on_afterwards() -> None:
    with Pool(1, reuse=None) as pool:
        for strike in strikes():
            pool.submit(calls.same, 1)
            with strike:
                assert next(pool.results(PATIENCE)) == 1
            assert set(pool.results(PATIENCE)) <= {1}


def test_a_submit_that_is_interrupted_anywhere_while_it_waits_for_room_raises_that(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "fifo")
    waits = threading.Event()

    def open_gate() -> None:
        waits.wait(PATIENCE)
        path.write_text("")

    with Pool(1, max_pending=1) as pool:
        for strike in strikes(lambda name: waits.set() if name == "acquire" else None):
            waits.clear()
            running = pool.submit(calls.read, str(path))
            gate = threading.Thread(target=open_gate)
            gate.start()
            waiting = pool.submit(len, b"12")
            with strike:
                pool.submit(len, b"123")
            waits.set()
            gate.join()
            assert (running.result(PATIENCE), waiting.result(PATIENCE)) == ("", 2)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_first_submit_that_is_interrupted_anywhere_leaves_no_process() -> None:
    before = children()
    for strike in strikes():
        # RuntimeError: if it struck within the standard library's waiting for the thread.
        with Pool(1) as pool, contextlib.suppress(RuntimeError), strike:
            pool.submit(len, b"123")
        assert children() == before


def children() -> set[str]:
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            found.update(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found
