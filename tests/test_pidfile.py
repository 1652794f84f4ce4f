"""core.pidfile: the lock is the truth, the number a note."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import lockfile
import pytest

from daemonkit.core.holder import find
from daemonkit.core.pidfile import PidFile, State, inspect
from daemonkit.errors import AlreadyRunning, LockTimedOut, RunDirectoryError

HOLD = """
import sys
from daemonkit.core.pidfile import PidFile
pidfile = PidFile(sys.argv[1])
pidfile.acquire(0)
print("held", flush=True)
sys.stdin.read()
"""


class Other:
    """Another process that holds the PID file until it is told to end, or killed."""

    def __init__(self, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"
        self.pid = self.process.pid

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "app.pid")


def test_it_is_a_lockfile_lock_with_lockfiles_exceptions(path: str) -> None:
    assert isinstance(PidFile(path), lockfile.LockBase)
    with Other(path):
        with pytest.raises(lockfile.AlreadyLocked):
            PidFile(path).acquire(0)
        with pytest.raises(lockfile.LockTimeout):
            PidFile(path).acquire(0.05)
        with pytest.raises(lockfile.NotMyLock):
            PidFile(path).release()
    with pytest.raises(lockfile.NotLocked):
        PidFile(path).release()
    with pytest.raises(lockfile.LockFailed):
        PidFile(str(Path(path).parent / "missing" / "app.pid")).acquire(0)


def test_the_holder_writes_its_pid_and_a_newline_and_unlinks_at_release(path: str) -> None:
    with PidFile(path) as pidfile:
        assert Path(path).read_bytes() == b"%d\n" % os.getpid()
        assert pidfile.i_am_locking()
        assert pidfile.is_locked()
        assert inspect(path) == State(True, True, os.getpid())
    assert not os.path.exists(path)
    assert not pidfile.i_am_locking()


def test_a_second_acquire_says_who_holds_it(path: str) -> None:
    with Other(path) as other, pytest.raises(AlreadyRunning) as caught:
        PidFile(path).acquire(0)
    assert caught.value.pid == other.pid
    assert caught.value.path == path
    assert f"held by pid {other.pid}" in str(caught.value)


def test_a_second_acquire_leaves_the_holders_file_as_it_is(path: str) -> None:
    with Other(path) as other:
        before = os.stat(path)
        with pytest.raises(AlreadyRunning):
            PidFile(path).acquire(0)
        assert Path(path).read_text() == f"{other.pid}\n"
        assert os.stat(path).st_mtime_ns == before.st_mtime_ns


def test_acquire_with_a_timeout_gets_the_lock_as_soon_as_the_holder_dies(path: str) -> None:
    with Other(path) as other:
        waiter = subprocess.Popen(
            [sys.executable, "-c", HOLD.replace("acquire(0)", "acquire(30)"), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        other.process.kill()
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "held\n"
        assert inspect(path).pid == waiter.pid
        waiter.communicate("")


def test_the_timeout_of_the_constructor_is_the_default(path: str) -> None:
    with Other(path), pytest.raises(LockTimedOut):
        PidFile(path, timeout=0.01).acquire()


@pytest.mark.parametrize("content", [b"", b"garbage", b"0\n", b"-5\n", b"12 34\n", b"9" * 100_000, b"\xff\xfe\n"])
def test_stale_empty_or_garbage_files_are_no_obstacle(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    assert inspect(path) == State(True, False, None)
    with PidFile(path):
        assert Path(path).read_text() == f"{os.getpid()}\n"


def test_a_symlink_is_refused_and_its_target_untouched(path: str, tmp_path: Path) -> None:
    target = tmp_path / "passwd"
    target.write_text("root:x:0:0\n")
    os.symlink(target, path)
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        PidFile(path).acquire(0)
    with pytest.raises(RunDirectoryError, match="symbolic link"):
        inspect(path)
    assert target.read_text() == "root:x:0:0\n"


def test_a_hard_link_is_refused_and_its_other_name_untouched(path: str, tmp_path: Path) -> None:
    target = tmp_path / "passwd"
    target.write_text("root:x:0:0\n")
    os.link(target, path)
    with pytest.raises(RunDirectoryError, match="plain file"):
        PidFile(path).acquire(0)
    assert target.read_text() == "root:x:0:0\n"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_a_directory_or_a_fifo_is_refused_at_once(path: str, make: object) -> None:
    make(path)  # type: ignore[operator]
    with pytest.raises(RunDirectoryError):
        PidFile(path).acquire(0)
    with pytest.raises(RunDirectoryError):
        inspect(path)


def test_a_forked_child_neither_holds_nor_removes_it(path: str) -> None:
    pidfile = PidFile(path)
    pidfile.acquire(0)
    pid = os.fork()
    if pid == 0:
        held = pidfile.i_am_locking()
        try:
            pidfile.release()
        except lockfile.UnlockError:
            os._exit(1 if held else 0)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert inspect(path) == State(True, True, os.getpid())
    pidfile.release()


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(path: str) -> None:
    program = HOLD.replace("print(", "import os, signal\nif os.fork(): signal.pause()\nprint(")
    holder = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, 9)
    holder.wait()
    assert not inspect(path).locked
    holder.communicate("")


def test_release_leaves_a_file_that_somebody_else_put_there(path: str) -> None:
    pidfile = PidFile(path)
    pidfile.acquire(0)
    os.unlink(path)
    Path(path).write_text("1\n")
    assert not pidfile.is_intact()
    pidfile.release()
    assert Path(path).read_text() == "1\n"


def test_restore_puts_a_deleted_file_back(path: str) -> None:
    pidfile = PidFile(path)
    pidfile.acquire(0)
    os.unlink(path)
    assert pidfile.restore()
    assert inspect(path) == State(True, True, os.getpid())
    pidfile.release()


def test_restore_gives_way_to_a_holder_of_the_new_file(path: str) -> None:
    pidfile = PidFile(path)
    pidfile.acquire(0)
    os.unlink(path)
    with Other(path) as other:
        assert not pidfile.restore()
        assert inspect(path).pid == other.pid


@pytest.mark.parametrize("what", ["acquire", "restore"])
def test_who_merely_tests_the_lock_keeps_nobody_from_it(path: str, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """``inspect`` holds it shared for a moment (flock(2)), and on a busy machine that moment may be long."""
    pidfile, sleep, pauses = PidFile(path), time.sleep, 0
    if what == "restore":
        pidfile.acquire(0)
        os.unlink(path)
        monkeypatch.setattr("daemonkit.core.pidfile.PATIENCE", 30)
    with open(path, "a+") as tester:
        fcntl.flock(tester, fcntl.LOCK_SH)

        def pause(seconds: float) -> None:
            nonlocal pauses
            sleep(seconds)
            pauses += 1
            if pauses == 100:
                fcntl.flock(tester, fcntl.LOCK_UN)

        monkeypatch.setattr(time, "sleep", pause)
        if what == "restore":
            assert pidfile.restore()
        else:
            pidfile.acquire(0)
        assert pauses == 100
    assert inspect(path) == State(True, True, os.getpid())
    pidfile.release()


def test_a_lock_taken_with_flock_alone_is_seen(path: str) -> None:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert PidFile(path).is_locked()
        with pytest.raises(AlreadyRunning):
            PidFile(path).acquire(0)
    assert not PidFile(path).is_locked()


def test_asking_never_stands_in_the_way_of_an_acquire(path: str) -> None:
    program = (
        "import sys\nfrom daemonkit.core.pidfile import inspect\nprint('asking', flush=True)\n"
        "while True: inspect(sys.argv[1])"
    )
    asker = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True)
    try:
        assert asker.stdout is not None
        asker.stdout.readline()
        for _ in range(300):
            pidfile = PidFile(path)
            pidfile.acquire(0)
            pidfile.release()
    finally:
        asker.kill()
        asker.communicate()


def test_break_lock_makes_room_for_a_new_holder(path: str) -> None:
    with Other(path):
        PidFile(path).break_lock()
        with PidFile(path):
            assert inspect(path).pid == os.getpid()


def test_find_never_returns_a_process_that_only_stands_in_the_file(path: str) -> None:
    innocent = subprocess.Popen(["sleep", "1000"])
    try:
        Path(path).write_text(f"{innocent.pid}\n")
        assert find(path) is None
        with Other(path) as other:
            Path(path).write_text(f"{innocent.pid}\n")  # somebody overwrote the number under the lock
            assert find(path) is None
            Path(path).write_text(f"{other.pid}\n")
            with find(path) as holder:  # type: ignore[union-attr]
                assert holder.pid == other.pid
    finally:
        innocent.kill()
        innocent.wait()
