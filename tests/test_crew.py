"""What kept children were sent, and have not begun, can be had back; a child that has nothing left works on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, as_completed
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import FrameType
from typing import Any

import calls
import pytest
from harness import PATIENCE

from daemonkit import Pool
from daemonkit.processes.future import Call


class Busy:
    """A pool of one child that is in a call until ``finish``, with fifty more calls sent after it."""

    def __init__(self, pool: Pool, path: Path) -> None:
        told, self._gate = path / "told", path / "gate"
        for each in (told, self._gate):
            os.mkfifo(each)
        until = time.monotonic() + PATIENCE
        while not is_bold(pool):
            assert time.monotonic() < until
            assert list(pool.map(calls.square, range(2000))) == [n**2 for n in range(2000)]
        self.first: Call = pool.submit(calls.tell_and_read, str(told), str(self._gate))
        assert told.read_text()
        self.others: list[Call] = [pool.submit(calls.square, n) for n in range(50)]
        while not self.others[0].is_given:  # by the pool's thread, which tells nobody
            assert time.monotonic() < until
            os.sched_yield()

    def finish(self) -> None:
        self._gate.write_text("done")
        assert self.first.result(PATIENCE) == "done"


def is_bold(pool: Pool) -> bool:
    """Whether it has seen that calls are short, and so sends some ahead; slow ones make it careful again."""
    server: Any = pool._dispatcher._server
    return server is not None and server.crew._rota._depth > 2


def test_what_was_sent_ahead_does_not_run_and_can_be_cancelled(tmp_path: Path) -> None:
    with Pool(1, reuse=None) as pool:
        busy = Busy(pool, tmp_path)
        assert [busy.first.running(), any(call.running() for call in busy.others)] == [True, False]
        assert busy.others[7].cancel()
        assert busy.others[7].cancel()
        assert not busy.first.cancel()
        assert wait_for([busy.others[7]], PATIENCE).done == {busy.others[7]}
        with pytest.raises(CancelledError):
            busy.others[7].result(PATIENCE)
        busy.finish()
        assert [call.result(PATIENCE) for n, call in enumerate(busy.others) if n != 7] == [
            n**2 for n in range(50) if n != 7
        ]


def test_what_was_sent_ahead_is_killed_at_once_and_nothing_else(tmp_path: Path) -> None:
    with Pool(1, reuse=None) as pool:
        busy = Busy(pool, tmp_path)
        for n in (5, 6):
            assert busy.others[n].kill()
            assert busy.others[n].cancelled()
        busy.finish()
        assert [call.result(PATIENCE) for call in busy.others[7:]] == [n**2 for n in range(7, 50)]


def test_shutdown_cancels_what_was_sent_ahead(tmp_path: Path) -> None:
    pool = Pool(1, reuse=None)
    busy = Busy(pool, tmp_path)
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(call.cancelled() for call in busy.others)
    busy.finish()
    pool.shutdown()


def test_killing_the_pool_ends_what_was_sent_ahead_and_what_runs(tmp_path: Path) -> None:
    pool = Pool(1, reuse=None)
    busy = Busy(pool, tmp_path)
    busy.others[5].kill()  # so that the others are given back
    pool.kill()
    assert all(call.cancelled() for call in [busy.first, *busy.others])


@pytest.mark.parametrize("reuse", [None, 100, 2])
def test_a_call_that_is_killed_before_its_child_has_begun_it_costs_no_child(reuse: int | None) -> None:
    with Pool(1, reuse=reuse) as pool:
        for n in range(20):
            pool.submit(calls.square, n).kill()  # most have not been begun; some are done
            assert pool.submit(calls.square, n).result(PATIENCE) == n**2


def test_a_cancelled_call_makes_room_for_another(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with Pool(1, max_pending=3) as pool:
        first = pool.submit(calls.read, str(gate))
        waiting = [pool.submit(calls.square, n) for n in range(3)]
        assert all(call.cancel() for call in waiting)
        more = [pool.options(block=False).submit(calls.square, n) for n in range(3)]
        gate.write_text("go on")
        assert first.result(PATIENCE) == "go on"
        assert [call.result(PATIENCE) for call in more] == [0, 1, 4]


def test_results_that_were_asked_for_are_not_kept_by_the_pool() -> None:
    with Pool(2) as pool:
        for call in as_completed([pool.submit(calls.square, n) for n in range(4)], PATIENCE):
            call.result()
        assert list(pool.results(timeout=PATIENCE)) == []


def test_a_callback_that_exits_does_not_end_the_pool(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def leave(call: object) -> None:
        raise SystemExit(3)

    with Pool(1) as pool:
        pool.submit(calls.read, str(gate)).add_done_callback(leave)
        gate.write_text("")  # not before: a callback of what is done already is called at once, by us
        assert [pool.submit(calls.square, n).result(PATIENCE) for n in (3, 4)] == [9, 16]
    assert "a callback or on_progress failed" in caplog.text


def test_what_forks_for_a_pool_has_not_loaded_what_would_cost_every_fork() -> None:
    program = (
        "import sys, daemonkit.processes.poolserver; print(*{'threading', 'logging', 'lockfile'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_a_call_that_cannot_be_sent_fails_alone_and_its_child_works_on() -> None:
    with Pool(1, reuse=None) as pool:
        assert pool.submit(len, b"12").result(PATIENCE) == 2
        usual = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(lowest := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, usual[1]))  # none is left for what a large request lies in
        try:
            refused = pool.submit(len, bytes(100_000))
            with pytest.raises(OSError, match="open files"):
                refused.result(PATIENCE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        assert pool.submit(len, bytes(100_000)).result(PATIENCE) == 100_000


def test_a_call_that_is_killed_is_told_though_the_pool_is_shut_down_at_that_moment() -> None:
    is_armed, is_between, goes_on = threading.Event(), threading.Event(), threading.Event()

    def hold(frame: FrameType, event: str, argument: object) -> None:
        """Keep the pool's thread between two turns."""
        if frame.f_code.co_name == "_turn" and is_armed.is_set():
            is_between.set()
            goes_on.wait(PATIENCE)

    threading.settrace(hold)
    try:
        pool = Pool(1, reuse=None)
        child = pool.submit(os.getpid).result(PATIENCE)
    finally:
        threading.settrace(None)
    os.kill(child, signal.SIGSTOP)
    call = pool.submit(len, b"12")  # sent to it, and not read
    until = time.monotonic() + PATIENCE
    while not call.running():
        assert time.monotonic() < until
        os.sched_yield()
    is_armed.set()
    pool.max_workers = 1  # wakes the thread
    assert is_between.wait(PATIENCE)
    assert call.kill()
    pool.shutdown(wait=False)
    goes_on.set()
    with pytest.raises(CancelledError):
        call.result(PATIENCE)
    pool.shutdown()
