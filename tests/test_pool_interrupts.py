"""What control-C leaves of a pool, and of background(), wherever it strikes the main thread."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import calls
import pytest
from harness import PATIENCE
from strikes import strikes

from daemonkit import Background, Pool
from daemonkit.processes.future import Call


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """Let no garbage be collected meanwhile: what ends then would be struck in our place."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("reuse", [1, 3, None])
def test_a_submit_that_is_interrupted_anywhere_leaves_the_pool_as_it_was(reuse: int | None) -> None:
    with Pool(2, reuse=reuse) as pool:
        assert pool.submit(len, b"12").result(PATIENCE) == 2
        for strike in strikes():
            with strike:
                pool.submit(len, b"123")
            assert pool.submit(len, b"12").result(PATIENCE) == 2
        assert set(pool.results(PATIENCE)) <= {3}


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


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_first_submit_that_is_interrupted_while_its_thread_is_started_leaves_a_pool_that_works() -> None:
    for strike in strikes(since="attend"):
        with Pool(1) as pool:
            with contextlib.suppress(RuntimeError), strike:
                pool.submit(len, b"123")
            assert pool.submit(len, b"12").result(PATIENCE) == 2
        # One that was given up ends by itself, when it comes to run.
        threads = [each for each in threading.enumerate() if each.name == "daemonkit pool" and each.is_alive()]
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_background_that_is_interrupted_anywhere_in_its_start_leaves_no_process() -> None:
    before = children()
    for strike in strikes(since="_detach"):
        background = Background()
        with strike:
            background.start()
        assert children() == before
        assert background.drain(PATIENCE)


def children() -> set[str]:
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            found.update(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


@pytest.mark.parametrize("reuse", [1, None])
@pytest.mark.parametrize("end", [Call.cancel, Call.kill])
def test_an_end_of_a_call_that_is_interrupted_anywhere_leaves_no_call_undone(
    reuse: int | None, end: Callable[[Call], bool], tmp_path: Path
) -> None:
    os.mkfifo(path := tmp_path / "fifo")
    os.mkfifo(told := tmp_path / "told")
    with Pool(1, reuse=reuse) as pool:
        for strike in strikes():
            while reuse is None and is_careful(pool):
                assert pool.submit(len, b"12").result(PATIENCE) == 2
            running = pool.submit(calls.tell_and_read, str(told), str(path))
            told.read_text()
            waiting = [pool.submit(calls.square, number) for number in range(4)]
            while reuse is None and not waiting[1].is_given:  # by the pool's thread, which tells nobody
                os.sched_yield()
            with strike:
                end(waiting[1])
            path.write_text("")
            assert running.result(PATIENCE) == ""
            assert [waiting[number].result(PATIENCE) for number in (0, 2, 3)] == [0, 4, 9]
            with contextlib.suppress(CancelledError):
                assert waiting[1].result(PATIENCE) == 1
    assert waiting[1].cancelled()


def is_careful(pool: Pool) -> bool:
    """Whether it has not seen enough short calls yet to give some to a kept child ahead."""
    server: Any = pool._dispatcher._server
    return server is None or server.crew._rota._depth < 3


def test_a_kill_of_a_running_call_that_is_interrupted_anywhere_can_be_said_again(tmp_path: Path) -> None:
    os.mkfifo(told := tmp_path / "told")
    with Pool(1) as pool:
        for strike in strikes():
            running = pool.submit(calls.tree_and_block, str(told), False)
            told.read_text()
            with strike:
                running.kill()
            running.kill()
            with pytest.raises(CancelledError):
                running.result(PATIENCE)
