"""PID file and control socket removed or replaced under a running daemon: it puts them back, nobody having asked."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PATIENCE, Box, await_end

from daemonkit.core import asking
from daemonkit.core.inotify import wait_until

IDLE = "@every(3600)\ndef beat(): pass\n"
OWN_LOOP = "@every(3600)\ndef beat(): pass\ndef loop():\n    while True:\n        signal.pause()\nmain(loop)\n"
FILES = ("beat.pid", "beat.sock")


@pytest.fixture(autouse=True)
def known(box: Box) -> None:
    """Let setproctitle leave the mark of the box in /proc/PID/environ."""
    box.environ["SPT_NOENV"] = "1"


def await_files(box: Box, pid: int) -> None:
    """Sleep until both files are the daemon's again; it is not asked for anything, but it logs what it does."""

    def are_back() -> bool | None:
        if not all((box.run_dir / file).exists() for file in FILES):
            return None
        return (box.pid() == pid and asking.listener(str(box.run_dir / "beat.sock")) == pid) or None

    assert wait_until(str(box.path), are_back, PATIENCE), box.log.read_text()


def removed(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_suffix(".away"))


def replaced(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_text("something else\n")
    other.rename(path)


@pytest.mark.parametrize(
    "files", [FILES[:1], FILES[1:], FILES, FILES[::-1]], ids=["pid", "sock", "pid-sock", "sock-pid"]
)
@pytest.mark.parametrize("fate", [removed, renamed, replaced], ids=lambda fate: fate.__name__)
def test_row_11_a_file_that_is_taken_from_a_running_daemon_is_put_back_at_once(
    box: Box, fate: Callable[[Path], None], files: tuple[str, ...]
) -> None:
    pid = box.start(IDLE)
    for file in files:
        fate(box.run_dir / file)
    await_files(box, pid)
    assert (box.run_dir / "beat.pid").read_text() == f"{pid}\n"
    text = box.await_log("was put back", len(files))
    assert all(f"{box.run_dir / file} had been deleted or replaced; it was put back" in text for file in files)
    assert box.status()["pid"] == pid
    again = box.call("start", box.path / "beat.py")
    assert (again.returncode, again.stdout) == (0, f"beat is already running, pid {pid}\n")
    assert box.call("kill", "beat").returncode == 0
    assert not [name for name in os.listdir(box.run_dir) if not name.endswith(".away")]


def test_row_11_files_are_put_back_as_often_as_they_are_removed_and_after_an_upgrade(box: Box) -> None:
    pid = box.start(IDLE)
    for count in range(1, 7):
        if count in (3, 5):
            assert box.call("reexec", "beat").returncode == 0
        for file in FILES:
            (box.run_dir / file).unlink()
        await_files(box, pid)
        box.await_log("was put back", 2 * count)
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(5):
        (box.run_dir / "beat.pid").unlink()
        await_files(box, pid)
    until = time.monotonic() + PATIENCE
    while len(os.listdir(f"/proc/{pid}/fd")) > descriptors:  # connections of those who ask are closed a moment later
        assert time.monotonic() < until
        assert box.status()["pid"] == pid


def test_row_11_files_that_are_removed_during_an_upgrade_are_put_back(box: Box) -> None:
    pid = box.start("time.sleep(0.2)  # while the new code is read nobody watches\n" + IDLE)
    os.kill(pid, signal.SIGUSR2)
    box.await_log("executing the new code")
    for file in FILES:
        (box.run_dir / file).unlink()
    await_files(box, pid)


def test_row_11_a_main_loop_of_its_own_does_not_keep_the_files_from_being_put_back(box: Box) -> None:
    pid = box.start(OWN_LOOP)
    for _ in range(2):
        for file in FILES:
            (box.run_dir / file).unlink()
        await_files(box, pid)
    assert box.status()["pid"] == pid
    assert box.call("kill", "beat").returncode == 0
    assert list(box.run_dir.iterdir()) == []


def test_row_11_a_run_directory_that_is_removed_or_renamed_is_made_again(box: Box) -> None:
    pid = box.start(IDLE)
    shutil.rmtree(box.run_dir, ignore_errors=True)  # the files may be back before the directory can go
    await_files(box, pid)
    box.run_dir.rename(box.path / "away")
    await_files(box, pid)
    shutil.rmtree(box.path / "away")
    assert box.pid() == pid
    assert box.status()["pid"] == pid


def test_row_11_what_cannot_be_put_back_is_told_once_and_the_daemon_goes_on(box: Box) -> None:
    pid = box.start("@every(0.1)\ndef beat(): log.info('beat')\n")
    away = box.path / "away"
    with box_with_a_file_for_run_dir(box, away):
        (away / "beat.pid").unlink()
        (away / "beat.sock").unlink()
        text = box.await_log("cannot be put back")
        text = box.await_log("test: beat", text.count("test: beat") + 3)
        assert text.count("cannot be put back") == 1, text
        assert "beat.pid: not a directory" in text
    await_files(box, pid)
    assert box.call("kill", "beat").returncode == 0
    assert list(box.run_dir.iterdir()) == []


@contextlib.contextmanager
def box_with_a_file_for_run_dir(box: Box, away: Path) -> Iterator[None]:
    """While it lasts a file stands in the place of the run directory, which was put ``away`` in the same moment."""
    away.write_text("no directory\n")
    exchange(box.run_dir, away)
    try:
        yield
    finally:
        exchange(box.run_dir, away)


def exchange(one: Path, other: Path) -> None:
    """Let two paths change their places in one moment (renameat2(2), RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2)
    assert done == 0, os.strerror(ctypes.get_errno())


def test_row_11_a_pid_file_that_somebody_else_holds_is_left_to_him_until_he_is_gone(box: Box) -> None:
    pid = box.start("@every(0.1)\ndef beat(): log.info('beat')\n")
    path, other = box.run_dir / "beat.pid", box.run_dir / "other"
    with open(other, "w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        theirs.write("theirs\n")
        theirs.flush()
        other.rename(path)
        box.await_log("cannot be put back")
        for _ in range(3):
            path.chmod(0o600)
            path.chmod(0o644)
        text = box.log.read_text()
        text = box.await_log("test: beat", text.count("test: beat") + 3)
        assert text.count("cannot be put back") == 1
        assert f"{path} had been deleted or replaced, and cannot be put back: lock {path}: held by" in text
        assert path.read_text() == "theirs\n"
        path.unlink()
    await_files(box, pid)
    assert box.call("kill", "beat").returncode == 0
    assert list(box.run_dir.iterdir()) == []


def test_the_daemons_own_clean_up_puts_nothing_back(box: Box) -> None:
    for text in (IDLE, OWN_LOOP):
        pid = box.start(text)
        os.kill(pid, signal.SIGTERM)
        await_end(pid)
        assert list(box.run_dir.iterdir()) == []
    assert "put back" not in box.log.read_text()


def test_an_idle_daemon_that_watches_its_files_is_never_woken(box: Box) -> None:
    pid = box.start(IDLE)
    box.start(IDLE, name="other.py")
    await_sleep(box, pid)
    before = wake_ups(pid)
    assert box.call("status", "other").returncode == 0
    assert box.call("kill", "other").returncode == 0
    assert (box.run_dir / "beat.pid").read_text() == f"{pid}\n"
    assert wake_ups(pid) == before


def await_sleep(box: Box, pid: int) -> None:
    """Return when a daemon that has nothing more to do sleeps: it has begun, heard us, and seen that we are gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(box.run_dir / "beat.sock"))
        sock.sendall(b'{"do": "jobs"}\n')
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    until = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < until


def wake_ups(pid: int) -> int:
    """How often the process has gone to sleep so far (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
