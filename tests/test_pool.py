"""Pool as an executor of the standard library, and what it can beyond that."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import calls
import pytest
from harness import PATIENCE, await_end

from daemonkit import Pool
from daemonkit.errors import CallTimeout, PoolFull, UnpicklableError, UsageError, WorkerLost
from daemonkit.processes.future import Call
from daemonkit.processes.pickled import RemoteTraceback

OTHERS: set[int] = set()
KINDS = {"fresh": 1, "three": 3, "kept": None}


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def reuse(request: pytest.FixtureRequest) -> int | None:
    """How many calls a child is kept for."""
    number: int | None = request.param
    return number


@pytest.fixture
def pool(reuse: int | None) -> Iterator[Pool]:
    """Two children at once."""
    with Pool(2, reuse=reuse) as made:
        yield made
    assert not ours(), "processes are left"


@pytest.fixture(autouse=True)
def others() -> None:
    """What this process has running for other tests."""
    OTHERS.clear()
    OTHERS.update(ours())


def ours() -> list[int]:
    """Children of this process that live, and began with the test."""
    found = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            found += Path(f"/proc/self/task/{task}/children").read_text().split()
    return [int(word) for word in found if int(word) not in OTHERS]


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No descriptor can be had here meanwhile."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    low: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, usual[1]))  # enough for poll(2), whose list is bounded by it, too
    try:
        with contextlib.suppress(OSError):
            while True:
                low.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
        for fd in low:
            os.close(fd)


def await_start(call: Call) -> None:
    """Until the pool has heard from its fork server that the call's child was started; the child may be earlier."""
    until = time.monotonic() + PATIENCE
    while call.pid is None:
        assert time.monotonic() < until
        os.sched_yield()


def overdue(pool: Pool, path: Path, detached: bool) -> tuple[CallTimeout, list[int]]:
    """The error of a call whose time was up, and what it had told by then; it has more time if that was nothing."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as told:  # nobody waits for a reader
        for timeout in (1, 4, 16):
            call = pool.options(timeout=timeout).submit(calls.tree_and_block, str(path), detached)
            with pytest.raises(CallTimeout, match=f"not done after {timeout} s") as caught:
                call.result(PATIENCE)
            if said := told.read(100):
                return caught.value, [int(word) for word in said.split()]
    raise AssertionError("no call has come so far within its time")


def script(path: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``text`` as a program."""
    (path / "program.py").write_text(textwrap.dedent(text))
    command = [sys.executable, "-W", "error", *(options or (str(path / "program.py"),))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=path, check=False)
    assert done.returncode == 0, done.stderr
    return done


# An executor.


def test_a_call_gets_its_arguments_and_gives_its_result(pool: Pool) -> None:
    assert pool.submit(pow, 2, 8).result(PATIENCE) == 256
    assert pool.submit(calls.capture, 1, self=2, fn=3).result(PATIENCE) == ((1,), {"self": 2, "fn": 3})
    with pytest.raises(TypeError):
        pool.submit(fn=pow)  # type: ignore[call-arg, unused-ignore]


def test_map_gives_results_in_order_with_and_without_chunks(pool: Pool) -> None:
    wanted = [number**2 for number in range(40)]
    assert list(pool.map(calls.square, range(40))) == wanted
    for size in (6, 40, 50):
        assert list(pool.map(calls.square, range(40), chunksize=size)) == wanted
    assert list(pool.map(pow, range(9), range(7))) == [n**n for n in range(7)]
    with pytest.raises(ValueError, match="chunksize"):
        pool.map(calls.square, range(3), chunksize=-1)


def test_map_gives_what_came_before_an_exception(pool: Pool) -> None:
    results = pool.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert [next(results), next(results)] == [(0, 1), (0, 1)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_stops_waiting_when_its_time_is_up(pool: Pool, tmp_path: Path) -> None:
    path = fifo(tmp_path / "fifo")
    results = pool.map(calls.read, [str(path)], timeout=0.5)
    with pytest.raises(TimeoutError):
        next(results)
    pool.kill()  # it was begun meanwhile, or was not


def test_map_with_a_buffer_asks_for_few_items_ahead(pool: Pool) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = pool.map(calls.square, items(), buffersize=4)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 8
    assert list(results) == [number**2 for number in range(3, 100)]


def test_an_exception_comes_with_the_childs_traceback(pool: Pool) -> None:
    error = pool.submit(calls.fail, "no").exception(PATIENCE)
    assert type(error) is ValueError
    assert error.args == ("no",)
    assert type(error.__cause__) is RemoteTraceback
    assert "raise ValueError(text)" in str(error.__cause__)


def test_system_exit_is_the_futures_to_tell(pool: Pool) -> None:
    assert isinstance(pool.submit(sys.exit, 3).exception(PATIENCE), SystemExit)
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


def test_as_completed_and_wait_work_on_the_futures(pool: Pool) -> None:
    made = {pool.submit(calls.square, number) for number in range(20)}
    assert {call.result() for call in futures.as_completed(made, PATIENCE)} == {n**2 for n in range(20)}
    done, left = futures.wait(made, PATIENCE)
    assert done == made
    assert not left
    failing = [pool.submit(calls.square, 1), pool.submit(calls.fail)]
    done, _ = futures.wait(failing, PATIENCE, futures.FIRST_EXCEPTION)
    assert failing[1] in done


def test_callbacks_are_called_once_with_the_future(pool: Pool) -> None:
    seen: list[futures.Future[Any]] = []
    called = threading.Event()

    def note(call: futures.Future[Any]) -> None:
        seen.append(call)
        called.set()

    call = pool.submit(calls.square, 2)
    call.add_done_callback(note)
    assert called.wait(PATIENCE)
    assert seen == [call]


def test_a_callback_may_submit(pool: Pool) -> None:
    second: list[futures.Future[Any]] = []
    called = threading.Event()

    def again(call: futures.Future[Any]) -> None:
        second.append(pool.submit(calls.square, call.result()))
        called.set()

    pool.submit(calls.square, 3).add_done_callback(again)
    assert called.wait(PATIENCE)
    assert second[0].result(PATIENCE) == 81


def test_a_call_that_waits_can_be_cancelled_and_one_that_runs_cannot(reuse: int | None, tmp_path: Path) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    with Pool(1, reuse=reuse) as pool:
        running = pool.submit(calls.tell_and_read, str(told), str(path))
        assert told.read_text()
        waiting = pool.submit(calls.square, 1)
        assert running.running()
        assert not running.cancel()
        assert waiting.cancel()
        assert waiting.cancelled()
        path.write_text("go on")
        assert running.result(PATIENCE) == "go on"


def test_shutdown_finishes_what_was_accepted_and_refuses_more(pool: Pool) -> None:
    made = [pool.submit(calls.square, number) for number in range(30)]
    pool.shutdown()
    assert [call.result(0) for call in made] == [number**2 for number in range(30)]
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(calls.same)
    assert not ours()


def test_shutdown_without_waiting_finishes_too(pool: Pool) -> None:
    made = [pool.submit(calls.square, number) for number in range(10)]
    pool.shutdown(wait=False)
    assert [call.result(PATIENCE) for call in made] == [number**2 for number in range(10)]


def test_shutdown_can_cancel_what_waits(reuse: int | None, tmp_path: Path) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    pool = Pool(1, reuse=reuse)
    running = pool.submit(calls.tell_and_read, str(told), str(path))
    told.read_text()
    waiting = [pool.submit(calls.same) for _ in range(20)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(call.cancelled() for call in waiting)
    path.write_text("done")
    assert running.result(PATIENCE) == "done"
    pool.shutdown()
    assert not ours()


def test_a_pool_that_nobody_holds_ends_when_its_calls_are_done(reuse: int | None) -> None:
    before = threading.enumerate()
    pool = Pool(2, reuse=reuse)
    results = pool.map(abs, range(-5, 5))
    [thread] = [each for each in threading.enumerate() if each.name == "daemonkit pool" and each not in before]
    del pool
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert list(results) == [abs(number) for number in range(-5, 5)]
    assert not ours()


def test_a_pool_keeps_no_argument_and_no_result_alive(pool: Pool) -> None:
    argument = calls.Stubborn(1, 2)
    gone = weakref.ref(argument)
    pool.submit(calls.fail, argument)  # cannot be unpickled there; it is not kept here
    del argument
    assert gone() is None


@pytest.mark.parametrize("word", ["pool.shutdown(wait=False)", "pass", "del pool"])
def test_the_interpreter_ends_when_the_calls_are_done(tmp_path: Path, word: str) -> None:
    text = f"""
        import time
        from daemonkit import Pool

        def late(text):
            time.sleep(0.3)
            print(text, flush=True)

        if __name__ == "__main__":
            pool = Pool(1)
            pool.submit(late, "apple")
            pool.submit(late, "pear")
            {word}
    """
    done = script(tmp_path, text)
    assert done.stdout.split() == ["apple", "pear"]
    assert done.stderr == ""


def test_submit_is_refused_when_the_interpreter_ends(tmp_path: Path) -> None:
    text = """
        import atexit
        from daemonkit import Pool

        def too_late():
            try:
                pool.submit(id, None)
            except RuntimeError as error:
                print(error)

        if __name__ == "__main__":
            atexit.register(too_late)
            pool = Pool(1)
            print(pool.submit(abs, -1).result())
    """
    assert script(tmp_path, text).stdout.splitlines() == ["1", "cannot schedule new futures after shutdown"]


def test_a_failed_call_is_let_go_of_without_a_collection(pool: Pool) -> None:
    call = pool.submit(calls.fail)
    with contextlib.suppress(ValueError):
        call.result(PATIENCE)
    assert pool.submit(calls.square, 4).result(PATIENCE) == 16  # the pool's thread has done with the one before
    seen = weakref.ref(call)
    gc.disable()
    try:
        del call
        assert seen() is None
    finally:
        gc.enable()


def test_many_threads_may_use_one_pool(pool: Pool) -> None:
    sums: list[int] = []

    def use() -> None:
        sums.append(sum(pool.map(calls.square, range(20))))

    users = [threading.Thread(target=use) for _ in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join(PATIENCE)
    assert sums == [sum(number**2 for number in range(20))] * 8


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_workers": 0}, "max_workers must be greater than 0"),
        ({"max_workers": -1}, "max_workers must be greater than 0"),
        ({"reuse": 0}, "reuse must be greater than 0"),
        ({"max_pending": 0}, "max_pending must be greater than 0"),
        ({"timeout": 0}, "timeout must be a number greater than 0"),
        ({"max_rss": -1}, "max_rss must be a number greater than 0"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Pool(**options)
    assert issubclass(UsageError, ValueError)


# Children.


def test_each_call_has_a_child_of_its_own_or_as_many_as_are_asked_for() -> None:
    with Pool(1) as pool:
        assert len(set(pool.map(calls.pid, range(6)))) == 6
    with Pool(1, reuse=3) as pool:
        found = list(pool.map(calls.pid, range(9)))
        assert [len(set(found[n : n + 3])) for n in (0, 3, 6)] == [1, 1, 1]
        assert len(set(found)) == 3
    with Pool(1, reuse=None) as pool:
        assert len(set(pool.map(calls.pid, range(50)))) == 1


def test_a_child_is_no_child_of_ours_and_finds_nothing_of_ours(pool: Pool) -> None:
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        pid, parent = pool.submit(calls.pid_and_parent).result(PATIENCE)
        assert os.getpid() not in (pid, parent)
        state = pool.submit(calls.state).result(PATIENCE)
        assert state["mask"] == set()
        assert set(state["handlers"]) <= {signal.SIGINT}
        assert state["wakeup"] == -1
        assert state["stdin"] == "/dev/null"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR1, handler)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_child_that_a_signal_ends_takes_its_own_call_with_it_alone(pool: Pool, number: int) -> None:
    before = [pool.submit(calls.square, n) for n in range(5)]
    call = pool.submit(calls.die, number)
    after = [pool.submit(calls.square, n) for n in range(5)]
    with pytest.raises(WorkerLost, match=signal.Signals(number).name) as caught:
        call.result(PATIENCE)
    assert caught.value.signal == number
    assert caught.value.pid == caught.value.receipt.pid == call.pid
    assert caught.value.receipt.wall > 0
    assert [c.result(PATIENCE) for c in before + after] == [0, 1, 4, 9, 16] * 2


def test_a_child_that_leaves_without_a_word_is_lost_with_its_status(pool: Pool) -> None:
    for code in (0, 3):
        with pytest.raises(WorkerLost, match=f"exited with status {code}") as caught:
            pool.submit(calls.leave, code).result(PATIENCE)
        assert caught.value.signal is None
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


@pytest.mark.parametrize("spoil", [calls.garbage_everywhere, calls.close_everything, calls.new_session])
def test_a_child_that_spoils_what_it_has_spoils_nothing_else(pool: Pool, spoil: Any) -> None:
    quiet = [pool.submit(calls.square, n) for n in range(5)]
    error = pool.submit(spoil).exception(PATIENCE)
    assert error is None or isinstance(error, WorkerLost)
    assert [call.result(PATIENCE) for call in quiet] == [0, 1, 4, 9, 16]
    assert list(pool.map(calls.square, range(5))) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("detached", [False, True])
def test_what_a_call_leaves_running_ends_with_its_child(detached: bool) -> None:
    with Pool(1) as pool:
        pid = pool.submit(calls.leave_a_process, detached).result(PATIENCE)
        await_end(pid)


def test_calls_behind_a_long_one_are_run_by_others_that_are_free(tmp_path: Path) -> None:
    path = fifo(tmp_path / "fifo")
    with Pool(2, reuse=None) as pool:
        assert len(list(pool.map(calls.square, range(500)))) == 500  # short ones: they are sent ahead
        made = [pool.submit(calls.square, n) for n in range(50)]
        blocked = pool.submit(calls.read, str(path))
        made += [pool.submit(calls.square, n) for n in range(200)]
        assert [call.result(PATIENCE) for call in made] == [n**2 for n in (*range(50), *range(200))]
        assert not blocked.done()
        path.write_text("x")
        assert blocked.result(PATIENCE) == "x"


def test_a_killed_child_gives_back_what_it_had_not_begun() -> None:
    with Pool(2, reuse=None) as pool:
        list(pool.map(calls.square, range(500)))
        made = [pool.submit(calls.die) if n % 40 == 20 else pool.submit(calls.square, n) for n in range(400)]
        for n, call in enumerate(made):
            if n % 40 == 20:
                assert isinstance(call.exception(PATIENCE), WorkerLost)
            else:
                assert call.result(PATIENCE) == n**2


def test_the_fork_server_killed_fails_what_runs_and_the_rest_goes_on(reuse: int | None, tmp_path: Path) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    with Pool(1, reuse=reuse) as pool:
        running = pool.submit(calls.tell_and_read, str(told), str(path))
        child = int(told.read_text())
        await_start(running)  # else it would be a server that could not begin
        waiting = [pool.submit(calls.square, n) for n in range(3)]
        [server] = ours()
        os.kill(server, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="fork server"):
            running.result(PATIENCE)
        await_end(child)
        assert [call.result(PATIENCE) for call in waiting] == [0, 1, 4]
        assert pool.submit(calls.square, 4).result(PATIENCE) == 16


def test_a_fork_server_that_cannot_be_replaced_fails_what_waits_and_the_pool_works_again(
    reuse: int | None, tmp_path: Path
) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    with Pool(1, reuse=reuse, max_pending=3) as pool:
        running = pool.submit(calls.tell_and_read, str(told), str(path))
        told.read_text()
        await_start(running)
        waiting = [pool.submit(calls.square, n) for n in range(3)]
        [server] = ours()
        with no_descriptors():
            os.kill(server, signal.SIGKILL)
            for call in running, *waiting:
                with pytest.raises(WorkerLost, match="fork server"):
                    call.result(PATIENCE)
        assert pool.submit(calls.square, 4).result(PATIENCE) == 16


def test_an_interpreter_that_ends_at_once_fails_the_call_and_leaves_no_zombie(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for _ in range(10):  # it may have ended before it is told anything, or after
        with pytest.raises(WorkerLost, match="fork server"):
            pool.submit(calls.square, 2).result(PATIENCE)
    monkeypatch.undo()
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


def test_in_a_fork_of_its_process_a_pool_refuses_calls(tmp_path: Path) -> None:
    text = """
        import os, sys
        from daemonkit import Pool

        if __name__ == "__main__":
            with Pool(1) as pool:
                print(pool.submit(abs, -1).result(), flush=True)
                pid = os.fork() if sys.version_info < (3, 12) else 1
                if pid == 0:
                    try:
                        pool.submit(abs, -2)
                    except RuntimeError as error:
                        print("refused", "belongs to pid" in str(error), flush=True)
                    sys.exit()
                if sys.version_info < (3, 12):
                    os.waitpid(pid, 0)
                else:
                    print("refused", True)
                print(pool.submit(abs, -3).result(), flush=True)
    """
    assert script(tmp_path, text).stdout.splitlines() == ["1", "refused True", "3"]


def test_a_fork_at_the_moment_at_which_an_outcome_is_noted_refuses_calls_too(tmp_path: Path) -> None:
    text = """
        import os, threading, warnings
        from daemonkit import Pool

        warnings.simplefilter("ignore")  # to fork with threads is what is tried

        def note():
            with pool._outcomes._lock:
                is_noting.set()
                goes_on.wait()

        if __name__ == "__main__":
            is_noting, goes_on = threading.Event(), threading.Event()
            with Pool(1) as pool:
                threading.Thread(target=note).start()
                is_noting.wait()
                pid = os.fork()
                if pid == 0:
                    try:
                        pool.submit(abs, -2)
                    except RuntimeError as error:
                        print("refused", "belongs to pid" in str(error), list(pool.results()), flush=True)
                    os._exit(0)
                os.waitpid(pid, 0)
                goes_on.set()
    """
    assert script(tmp_path, text).stdout.splitlines() == ["refused True []"]


# Values.


@pytest.mark.parametrize("size", [1, 65_000, 66_000, 3_000_000])
def test_arguments_and_results_of_any_size_come_whole(pool: Pool, size: int) -> None:
    data = os.urandom(size)
    assert pool.submit(calls.same, data).result(PATIENCE) == data


def test_a_large_result_without_room_for_its_descriptor_fails_its_own_call(pool: Pool, tmp_path: Path) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    assert pool.submit(calls.square, 2).result(PATIENCE) == 4
    call = pool.submit(calls.tell_and_read, str(told), str(path))
    told.read_text()
    with path.open("w") as file, no_descriptors():
        file.write("x" * 200_000)
        file.close()
        with pytest.raises(UnpicklableError, match="too many open files"):
            call.result(PATIENCE)
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


def test_lambdas_and_closures_are_called(pool: Pool) -> None:
    pytest.importorskip("cloudpickle")
    ten = 10
    assert pool.submit(lambda number: number + ten, 2).result(PATIENCE) == 12
    assert pool.submit(lambda: lambda: 7).result(PATIENCE)() == 7


def test_what_cannot_be_pickled_fails_its_own_future(pool: Pool) -> None:
    lock = threading.Lock()
    assert isinstance(pool.submit(calls.same, lock).exception(PATIENCE), TypeError)
    error = pool.submit(calls.a_lock).exception(PATIENCE)
    assert isinstance(error, TypeError | pickle.PicklingError)
    assert "the result" in error.__notes__[-1]
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


def test_what_cannot_be_unpickled_fails_its_own_future_with_the_reason(pool: Pool) -> None:
    with pytest.raises(UnpicklableError, match="Stubborn: 1 and 2"):
        pool.submit(calls.raise_stubborn).result(PATIENCE)
    with pytest.raises(UnpicklableError, match="not to be made again"):
        pool.submit(calls.unloadable).result(PATIENCE)
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


MAIN = """
    import sys
    from daemonkit import Pool

    class Thing:
        def __init__(self, value):
            self.value = value

    def double(thing):
        return Thing(thing.value * 2)

    if __name__ == "__main__":
        with Pool(1) as pool:
            answers = [pool.submit(double, Thing(number)).result() for number in (1, 2, 3)]
            print([answer.value for answer in answers], all(type(answer) is Thing for answer in answers))
    else:
        print("imported again", file=sys.stderr)
"""


def test_functions_of_the_main_script_are_found(tmp_path: Path) -> None:
    done = script(tmp_path, MAIN)
    assert done.stdout.strip() == "[2, 4, 6] True"
    assert done.stderr.count("imported again") <= 3  # by the server once, and by children before


def test_functions_of_a_main_module_are_found(tmp_path: Path) -> None:
    (tmp_path / "program.py").touch()
    assert script(tmp_path, MAIN, "-m", "program").stdout.strip() == "[2, 4, 6] True"


NESTED = """
    from daemonkit import Pool

    def double(number):
        return number * 2

    def nested(reuse):
        with Pool(2, reuse=reuse) as pool:
            return list(pool.map(double, range(3)))

    if __name__ == "__main__":
        with Pool(2) as pool:
            print([pool.submit(nested, reuse).result() for reuse in (1, None)])
"""


@pytest.mark.parametrize("options", [(), ("-m", "program")])
def test_a_pool_in_a_pools_call_calls_functions_of_the_main_script(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert script(tmp_path, NESTED, *options).stdout.strip() == "[[0, 2, 4], [0, 2, 4]]"


def test_a_script_that_calls_wherever_it_is_imported_is_told_what_is_missing(tmp_path: Path) -> None:
    text = """
        from daemonkit import Pool
        from daemonkit.errors import UsageError

        def double(number):
            return number * 2

        try:
            print(Pool(1).submit(double, 1).result())
        except UsageError as error:
            print(error)
            raise
    """
    with pytest.raises(AssertionError):
        script(tmp_path, text)
    text = text.replace("    raise", "    if __name__ != '__main__': raise")
    assert 'put what the script does below if __name__ == "__main__":' in script(tmp_path, text).stdout


def test_functions_of_a_program_without_a_file_are_called(tmp_path: Path) -> None:
    pytest.importorskip("cloudpickle")
    program = "from daemonkit import Pool\ndef f(x): return x + 1\nprint(Pool(1).submit(f, 1).result())"
    assert script(tmp_path, "", "-c", program).stdout.strip() == "2"


@pytest.mark.parametrize("each", [1, 2])
def test_a_module_that_calls_need_is_imported_where_children_are_forked(tmp_path: Path, each: int) -> None:
    (tmp_path / "heavy.py").write_text("import os\nwhere = os.getpid()\ndef told(): return where, os.getpid()\n")
    text = f"""
        import heavy
        from daemonkit import Pool

        if __name__ == "__main__":
            with Pool(1, reuse={each}) as pool:
                for _ in range({each}):
                    pool.submit(heavy.told).result()
                found = [pool.submit(heavy.told).result() for _ in range({each}, 6)]
                print(all(imported != child for imported, child in found), len({{n for n, _ in found}}))
    """
    assert script(tmp_path, text).stdout.split() == ["True", "1"]


def test_a_module_that_starts_a_thread_is_imported_by_each_child_alone(tmp_path: Path) -> None:
    lines = "import os, threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()\n"
    (tmp_path / "threaded.py").write_text(lines + "where = os.getpid()\ndef told(): return where, os.getpid()\n")
    text = """
        import threaded
        from daemonkit import Pool

        if __name__ == "__main__":
            with Pool(1) as pool:
                found = [pool.submit(threaded.told).result() for _ in range(4)]
                print(all(imported == child for imported, child in found))
    """
    assert script(tmp_path, text).stdout.split() == ["True"]


# Beyond.


def test_a_call_over_its_time_is_killed_with_all_it_started(pool: Pool, tmp_path: Path) -> None:
    told = fifo(tmp_path / "told")
    for detached in (False, True):
        error, numbers = overdue(pool, told, detached)
        assert isinstance(error, TimeoutError)
        assert error.pid == numbers[0]
        for number in numbers:
            await_end(number)
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


def test_a_call_that_is_done_is_not_kept_until_its_time_would_have_been_up(pool: Pool, tmp_path: Path) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    bounded = pool.options(timeout=PATIENCE)
    slow = bounded.submit(calls.tell_and_read, str(told), str(path))
    told.read_text()  # its time is up before that of the other
    quick = bounded.submit(calls.square, 3)
    assert quick.result(PATIENCE) == 9
    assert pool.submit(calls.square, 4).result(PATIENCE) == 16  # the pool's thread has done with the one before
    seen = weakref.ref(quick)
    del quick
    gc.collect()
    assert seen() is None
    path.write_text("")
    assert slow.result(PATIENCE) == ""


def test_a_call_within_its_time_is_left_alone(pool: Pool) -> None:
    limited = pool.options(timeout=PATIENCE)
    assert list(limited.map(calls.square, range(20))) == [n**2 for n in range(20)]


def test_a_running_call_can_be_killed(pool: Pool, tmp_path: Path) -> None:
    told = fifo(tmp_path / "told")
    call = pool.submit(calls.tree_and_block, str(told), False)
    numbers = told.read_text().split()
    assert call.kill()
    with pytest.raises(futures.CancelledError):
        call.result(PATIENCE)
    assert call.cancelled()
    assert not call.kill()
    for number in numbers:
        await_end(int(number))
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


def test_memory_over_the_limit_is_a_memory_error_in_the_call(pool: Pool) -> None:
    limited = pool.options(max_rss=200_000_000)
    assert isinstance(limited.submit(calls.allocate, 400_000_000).exception(PATIENCE), MemoryError)
    assert limited.submit(calls.allocate, 1_000_000).result(PATIENCE) == 1_000_000
    assert pool.submit(calls.allocate, 400_000_000).result(PATIENCE) == 400_000_000


def test_processor_time_over_the_limit_ends_the_child(pool: Pool) -> None:
    with pytest.raises(WorkerLost, match="SIGXCPU") as caught:
        pool.options(cpu=1).submit(calls.burn).result(PATIENCE)
    assert 0.9 < caught.value.receipt.cpu < 3
    assert pool.submit(calls.square, 3).result(PATIENCE) == 9


def test_progress_reaches_the_caller_in_order(pool: Pool) -> None:
    seen: list[int] = []
    assert pool.options(on_progress=seen.append).submit(calls.count_to, 5).result(PATIENCE) == 5
    assert seen == [1, 2, 3, 4, 5]
    assert calls.count_to(2) == 2  # outside a pool it is a function as any


def test_results_come_as_they_finish(pool: Pool, tmp_path: Path) -> None:
    path = fifo(tmp_path / "fifo")
    for number in range(5):
        pool.submit(calls.square, number)
    pool.submit(calls.read, str(path))
    results = pool.results(timeout=PATIENCE)
    assert {next(results) for _ in range(5)} == {0, 1, 4, 9, 16}
    with pytest.raises(TimeoutError):
        next(pool.results(timeout=0.5))
    path.write_text("last")
    assert list(pool.results(timeout=PATIENCE)) == ["last"]
    assert list(pool.results(timeout=1)) == []


def test_the_time_for_a_result_is_not_prolonged_by_calls_that_others_wait_for(tmp_path: Path) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    with Pool(2) as pool:
        slow = pool.submit(calls.tell_and_read, str(told), str(path))
        told.read_text()
        is_over = threading.Event()
        until = time.monotonic() + PATIENCE

        def others() -> None:
            while not is_over.is_set() and time.monotonic() < until:
                assert pool.submit(calls.square, 3).result(PATIENCE) == 9

        def in_vain() -> float:
            """Ask until no result has come in time; when that was begun."""
            while True:
                began = time.monotonic()
                try:
                    assert next(pool.results(timeout=0.5)) == 9  # it was done before the other thread asked for it
                except TimeoutError:
                    return began

        asking = threading.Thread(target=others)
        asking.start()
        try:
            assert in_vain() + 0.5 <= time.monotonic() < until  # and not: when the others are done
        finally:
            is_over.set()
            path.write_text("")
            asking.join()
        assert slow.result(PATIENCE) == ""


def test_results_go_on_behind_an_exception_and_leave_out_what_was_asked_for(pool: Pool) -> None:
    asked = pool.submit(calls.square, 9)
    assert asked.result(PATIENCE) == 81
    pool.submit(calls.fail)
    with pytest.raises(ValueError, match="this went wrong"):
        next(pool.results(timeout=PATIENCE))
    pool.submit(calls.square, 2)
    assert list(pool.results(timeout=PATIENCE)) == [4]


def test_a_full_pool_makes_submit_wait_or_says_so(reuse: int | None, tmp_path: Path) -> None:
    path, told = fifo(tmp_path / "fifo"), fifo(tmp_path / "told")
    with Pool(1, reuse=reuse, max_pending=2) as pool:
        running = pool.submit(calls.tell_and_read, str(told), str(path))
        told.read_text()
        waiting = [pool.submit(calls.square, n) for n in range(2)]
        with pytest.raises(PoolFull, match="max_pending"):
            pool.options(block=False).submit(calls.same)
        more: list[Any] = []
        user = threading.Thread(target=lambda: more.append(pool.submit(calls.square, 7).result(PATIENCE)))
        user.start()
        assert not more
        path.write_text("")
        user.join(PATIENCE)
        assert more == [49]
        assert [call.result(PATIENCE) for call in waiting] == [0, 1]
        assert running.result(PATIENCE) == ""


def test_the_number_of_workers_can_be_changed_while_they_run(reuse: int | None, tmp_path: Path) -> None:
    told, *paths = (fifo(tmp_path / name) for name in ("told", "first", "second"))
    with Pool(1, reuse=reuse) as pool:
        made = [pool.submit(calls.tell_and_read, str(told), str(paths[0]))]
        assert told.read_text()
        made.append(pool.submit(calls.tell_and_read, str(told), str(paths[1])))
        pool.max_workers = 2
        assert told.read_text()  # the second one has begun
        for call, path in zip(made, paths, strict=True):
            path.write_text("x")
            assert call.result(PATIENCE) == "x"
        pool.max_workers = 1
        assert pool.submit(calls.square, 3).result(PATIENCE) == 9
        with pytest.raises(UsageError):
            pool.max_workers = 0


def test_a_process_that_a_call_forks_answers_nothing_and_takes_no_calls(pool: Pool) -> None:
    assert pool.submit(calls.fork_and_return).result(PATIENCE) == "parent"
    assert list(pool.map(calls.square, range(5))) == [0, 1, 4, 9, 16]


def test_a_time_out_may_be_longer_than_poll_can_sleep(pool: Pool) -> None:
    assert pool.options(timeout=3e6, max_rss=1e12).submit(calls.square, 2).result(PATIENCE) == 4


@pytest.mark.parametrize(
    "limit", [{"timeout": float("inf")}, {"timeout": True}, {"max_rss": 2**70}, {"max_rss": -1}, {"cpu": float("nan")}]
)
def test_a_limit_that_cannot_be_meant_is_refused(limit: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(limit))} must be a number greater than 0 and at most"):
        Pool(**limit)


def test_kill_ends_everything_at_once(reuse: int | None, tmp_path: Path) -> None:
    told = fifo(tmp_path / "told")
    pool = Pool(1, reuse=reuse)
    running = pool.submit(calls.tree_and_block, str(told), True)
    numbers = told.read_text().split()
    waiting = pool.submit(calls.same)
    pool.kill()
    assert running.cancelled()
    assert waiting.cancelled()
    for number in numbers:
        await_end(int(number))
    assert not ours()


def test_the_initializer_is_called_in_each_child(reuse: int | None) -> None:
    with Pool(2, reuse=reuse, initializer=calls.initialize, initargs=("hello",)) as pool:
        assert {pool.submit(calls.said).result(PATIENCE) for _ in range(8)} == {"hello"}


def test_an_initializer_that_fails_breaks_the_pool(reuse: int | None, tmp_path: Path) -> None:
    path = fifo(tmp_path / "fifo")
    with Pool(1, reuse=reuse, initializer=calls.fail_as_told, initargs=(str(path),)) as pool:
        made = [pool.submit(calls.same) for _ in range(3)]
        path.write_text("this went wrong")  # not before all of them were accepted
        for call in made:
            with pytest.raises(futures.BrokenExecutor, match="this went wrong"):
                call.result(PATIENCE)
        with pytest.raises(futures.BrokenExecutor):
            pool.submit(calls.same)


def test_an_initializer_that_has_failed_is_not_called_again(reuse: int | None, tmp_path: Path) -> None:
    path = tmp_path / "called"
    with Pool(1, reuse=reuse, initializer=calls.note_and_fail, initargs=(str(path),)) as pool:
        assert isinstance(pool.submit(calls.same).exception(PATIENCE), futures.BrokenExecutor)
    assert path.read_text() == "called\n"


def test_a_fresh_child_is_asked_for_at_once_when_a_timer_is_due_long_after() -> None:
    with Pool(1) as pool:
        began = time.monotonic()
        assert pool.options(timeout=60).submit(calls.square, 2).result(PATIENCE) == 4
        assert time.monotonic() - began < 30


def test_the_example_prints_checksums_and_goes_on_behind_a_file_that_is_missing(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "etc" / "examples" / "checksums.py"
    (tmp_path / "empty").touch()
    command = [sys.executable, str(example), "missing", "empty"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 empty\n"
    assert "missing: [Errno 2]" in done.stderr
