"""Faults around the PID file, rows 8-13: two hundred starts at once, kill -9, planted files, hostile directories."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PATIENCE, Box, await_end

STARTS = 200
ROUNDS = int(os.environ.get("ROUNDS", "1"))
NOBODY = 65534
IDLE = "@every(3600)\ndef beat(): pass\n"

# One real command a process; all wait at the gate with their imports done, so that the race is in the start itself.
WARM_UP = """\
import os, sys
import daemonkit.launch, daemonkit.cli.start, daemonkit.core.inotify, daemonkit.config.file
from daemonkit.cli import run
"""
GATED_START = f"""\
{WARM_UP}
os.write(int(sys.argv[1]), b".")
os.read(int(sys.argv[2]), 1)
sys.argv[1:] = ["start", sys.argv[3]]
sys.exit(run())
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def one_sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """What a refused command says: one line on stderr, no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(autouse=True)
def known_and_compiled(box: Box, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let setproctitle leave the mark of the box in /proc/PID/environ, and let commands compile their code once."""
    bytecode = tmp_path_factory.getbasetemp() / "bytecode"
    box.environ |= {"SPT_NOENV": "1", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)}


@contextlib.contextmanager
def innocent() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any daemon; still alive at the end."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
        assert process.poll() is None, f"the innocent process ended: {process.returncode}"
    finally:
        process.kill()
        process.wait()


def start_all_at_once(box: Box, script: Path, count: int) -> list[str]:
    """Open the gate for ``count`` start commands; what each said, after it has exited with 0."""
    ready_reader, ready_writer = os.pipe()
    gate_reader, gate_writer = os.pipe()
    subprocess.run([sys.executable, "-c", WARM_UP], env=box.environ, check=True)
    command = [sys.executable, "-c", GATED_START, str(ready_writer), str(gate_reader), str(script)]
    starts = [
        subprocess.Popen(
            command,
            pass_fds=(ready_writer, gate_reader),
            env=box.environ,
            cwd=box.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(count)
    ]
    os.close(ready_writer)
    os.close(gate_reader)
    arrived = 0
    while arrived < count:
        data = os.read(ready_reader, count)
        assert data, "a start command ended before the gate"
        arrived += len(data)
    os.close(gate_writer)
    os.close(ready_reader)
    said = [start.communicate(timeout=120)[0] for start in starts]
    codes = {start.returncode for start in starts}
    assert codes == {0}, "".join(s for s, start in zip(said, starts, strict=True) if start.returncode)
    return said


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_row_8_of_200_starts_at_one_moment_one_becomes_the_daemon_and_all_others_name_it(box: Box, turn: int) -> None:
    script = box.script("log.info('imported')\n" + IDLE)
    said = start_all_at_once(box, script, STARTS)
    pid = box.pid()
    assert pid is not None
    assert sorted(said) == sorted([f"beat is running, pid {pid}\n"] + [f"beat is already running, pid {pid}\n"] * 199)
    assert box.log.read_text().count("imported") == 1
    assert list(box.processes()) == [pid]
    assert box.call("kill", "beat").returncode == 0
    assert list(box.run_dir.iterdir()) == []


def test_row_8_starts_and_kills_at_the_same_moment_leave_one_daemon_or_none(box: Box) -> None:
    script = box.script(IDLE)
    box.call("start", script)
    commands = [box.popen(*arguments) for _ in range(10) for arguments in (("kill", "beat"), ("start", str(script)))]
    for command in commands:
        said = command.communicate(timeout=120)[0]
        assert command.returncode == 0 or "stopped" in said, said
    pid = box.pid()
    assert list(box.processes()) == ([] if pid is None else [pid])


def test_row_9_after_kill_9_status_says_dead_and_the_next_start_succeeds_at_once(box: Box) -> None:
    seen = set()
    for _ in range(3):
        pid = box.start(IDLE)
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)
        await_end(pid)
        asked = box.call("status", "beat")
        assert asked.returncode == 1
        assert f"of pid {pid}" in asked.stdout
    assert len(seen) == 3
    again = box.start(IDLE)
    assert (box.run_dir / "beat.pid").read_text() == f"{again}\n"
    assert box.status()["state"] == "running"


def test_row_9_kill_after_kill_9_is_a_success_and_removes_what_was_left(box: Box) -> None:
    pid = box.start(IDLE)
    os.kill(pid, signal.SIGKILL)
    await_end(pid)
    done = box.call("kill", "beat")
    assert (done.returncode, "is not running" in done.stdout) == (0, True)
    assert list(box.run_dir.iterdir()) == []


def reuse(pid: int) -> subprocess.Popen[bytes] | None:
    """Start processes until one has the number ``pid`` (proc(5), ns_last_pid); None where that is not possible."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:  # whoever else starts one may take it for a while
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError:
            return None
        process = subprocess.Popen(["sleep", "600"])
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    return None


@needs_root
def test_row_10_a_process_that_was_really_given_the_dead_daemons_pid_is_not_touched_by_kill(box: Box) -> None:
    daemon = box.popen("run", box.script(IDLE))  # our own child: its number is free as soon as we have reaped it
    box.await_log("ready, pid")
    pid = daemon.pid
    assert box.pid() == pid
    daemon.kill()
    daemon.communicate()
    process = reuse(pid)
    if process is None:
        pytest.skip("this kernel does not let a process have a chosen PID")
    try:
        assert (box.run_dir / "beat.pid").read_text() == f"{process.pid}\n"
        asked = box.call("status", "beat")
        assert asked.returncode == 1
        assert "dead" in asked.stdout
        done = box.call("kill", "--timeout", "0", "beat")
        assert (done.returncode, "is not running" in done.stdout) == (0, True)
        assert process.poll() is None
        assert list(box.run_dir.iterdir()) == []
    finally:
        process.kill()
        process.wait()


def test_row_10_a_stale_number_of_an_innocent_process_is_neither_signalled_nor_an_obstacle(box: Box) -> None:
    with innocent() as process:
        (box.run_dir / "beat.pid").write_text(f"{process.pid}\n")
        asked = box.call("status", "beat")
        assert asked.returncode == 1
        assert "dead" in asked.stdout
        assert "is not running" in one_sentence(box.call("reload", "beat"), 7)
        done = box.call("kill", "--timeout", "0", "beat")
        assert done.returncode == 0
        (box.run_dir / "beat.pid").write_text(f"{process.pid}\n")
        assert box.start(IDLE) != process.pid


def test_row_10_a_file_locked_by_one_process_with_the_number_of_another_gets_nobody_signalled(box: Box) -> None:
    path = box.run_dir / "beat.pid"
    with innocent() as process, open(path, "w+") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        locked.write(f"{process.pid}\n")
        locked.flush()
        asked = box.call("status", "beat")
        assert asked.returncode == 4
        assert "not by pid" in asked.stdout
        assert "nobody was signalled" in one_sentence(box.call("kill", "--timeout", "0", "beat"), 4)
        assert path.read_text() == f"{process.pid}\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage\n", b"-1\n", b"\0" * 10, b"12345", b"99999999999999999999\n"],
    ids=["empty", "words", "minus-one", "null-bytes", "unfinished", "too-large"],
)
def test_row_11_whatever_stands_in_an_unlocked_file_is_no_obstacle(box: Box, content: bytes) -> None:
    path = box.run_dir / "beat.pid"
    path.write_bytes(content)
    assert box.call("status", "beat").returncode in (1, 3)
    done = box.call("kill", "beat")
    assert (done.returncode, "is not running" in done.stdout) == (0, True)
    path.write_bytes(content)
    pid = box.start(IDLE)
    assert path.read_text() == f"{pid}\n"


def test_row_11_a_huge_file_is_not_read_and_is_made_small(box: Box) -> None:
    path = box.run_dir / "beat.pid"
    with open(path, "w") as file:
        file.truncate(1 << 40)
    assert box.call("status", "beat").returncode == 1
    pid = box.start(IDLE)
    assert path.read_text() == f"{pid}\n"


def a_directory(path: Path, victim: Path) -> None:
    path.mkdir()


def a_symbolic_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def a_link_to_nothing(path: Path, victim: Path) -> None:
    path.symlink_to(victim.parent / "not-there")


def a_hard_link(path: Path, victim: Path) -> None:
    os.link(victim, path)


def a_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, victim: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFSOCK)


@pytest.mark.parametrize(
    "plant", [a_directory, a_symbolic_link, a_link_to_nothing, a_hard_link, a_fifo, a_socket], ids=lambda f: f.__name__
)
def test_row_11_what_is_no_plain_file_is_refused_and_nothing_elsewhere_is_written(
    box: Box, plant: Callable[[Path, Path], None]
) -> None:
    outside = box.path / "outside"
    outside.mkdir()
    victim = outside / "passwd"
    victim.write_text("root:x:0:0\n")
    path = box.run_dir / "beat.pid"
    plant(path, victim)
    before = victim.stat()
    script = box.script(IDLE)
    assert str(path) in one_sentence(box.call("start", script), 1)
    asked = box.call("status", "beat")
    assert asked.returncode == 4
    assert str(path) in asked.stdout
    assert str(path) in one_sentence(box.call("kill", "beat"), 1)
    after = victim.stat()
    assert victim.read_text() == "root:x:0:0\n"
    assert (after.st_mtime_ns, after.st_mode, after.st_uid) == (before.st_mtime_ns, before.st_mode, before.st_uid)
    assert os.listdir(outside) == ["passwd"]
    assert os.listdir(box.run_dir) == ["beat.pid"]


@needs_root
def test_row_11_a_file_that_may_not_be_written_is_refused_by_its_name(box: Box) -> None:
    path, script = box.run_dir / "beat.pid", box.script(IDLE)
    path.write_text("1\n")
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        assert str(path) in one_sentence(box.call("start", script), 4)
        assert path.read_text() == "1\n"
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


def test_row_11_a_daemon_whose_file_was_deleted_is_still_found_and_gets_it_back(box: Box) -> None:
    pid = box.start(IDLE)
    (box.run_dir / "beat.pid").unlink()
    asked = box.call("status", "beat")
    assert asked.returncode == 0, asked.stdout
    assert f"pid {pid}" in asked.stdout
    assert (box.run_dir / "beat.pid").read_text() == f"{pid}\n"
    assert box.pid() == pid


def test_row_11_a_start_after_the_file_was_deleted_makes_no_second_daemon(box: Box) -> None:
    pid = box.start(IDLE)
    (box.run_dir / "beat.pid").unlink()
    again = box.call("start", box.path / "beat.py")
    assert (again.returncode, again.stdout) == (0, f"beat is already running, pid {pid}\n")
    assert list(box.processes()) == [pid]


def test_row_11_kill_after_the_file_was_deleted_stops_the_daemon(box: Box) -> None:
    pid = box.start(IDLE)
    (box.run_dir / "beat.pid").unlink()
    done = box.call("kill", "beat")
    assert (done.returncode, done.stdout) == (0, f"beat was stopped, pid {pid}\n")
    assert box.processes() == {}
    assert list(box.run_dir.iterdir()) == []


def test_row_11_kill_after_the_file_was_replaced_stops_the_daemon_and_no_other(box: Box) -> None:
    pid = box.start(IDLE)
    with innocent() as process:
        other = box.path / "other"
        other.write_text(f"{process.pid}\n")
        other.rename(box.run_dir / "beat.pid")
        done = box.call("kill", "beat")
        assert (done.returncode, done.stdout) == (0, f"beat was stopped, pid {pid}\n")
    assert box.processes() == {}


def test_row_11_a_file_overwritten_in_place_is_told_apart_from_its_holder(box: Box) -> None:
    pid = box.start(IDLE)
    path = box.run_dir / "beat.pid"
    with innocent() as process:
        path.write_text(f"{process.pid}\n")
        asked = box.call("status", "beat")
        assert asked.returncode in (0, 4)
        box.call("kill", "--timeout", "0", "beat")
    path.write_text(f"{pid}\n")
    assert box.call("kill", "beat").returncode == 0
    assert box.processes() == {}


def test_row_12_a_missing_run_directory_is_created_under_a_parent_that_is_there(box: Box) -> None:
    script, run_dir = box.script(IDLE), box.path / "fresh"
    done = box.call("start", "--run-dir", run_dir, script)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(run_dir.stat().st_mode) == (0o755 if os.geteuid() == 0 else 0o700)
    assert box.call("kill", "--run-dir", run_dir, "beat").returncode == 0


def test_row_12_a_run_directory_without_a_parent_is_refused(box: Box) -> None:
    script, run_dir = box.script(IDLE), box.path / "no" / "fresh"
    assert str(run_dir) in one_sentence(box.call("start", "--run-dir", run_dir, script), 1)
    assert not run_dir.parent.exists()
    assert box.call("status", "--run-dir", run_dir, "beat").returncode == 3
    assert box.call("kill", "--run-dir", run_dir, "beat").returncode == 0


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_row_12_a_world_writable_run_directory_is_refused(box: Box, mode: int) -> None:
    script = box.script(IDLE)
    box.run_dir.chmod(mode)
    assert "everybody may write" in one_sentence(box.call("start", script), 1)
    assert list(box.run_dir.iterdir()) == []


@needs_root
def test_row_12_a_run_directory_of_another_user_is_refused(box: Box) -> None:
    script = box.script(IDLE)
    os.chown(box.run_dir, NOBODY, NOBODY)
    assert "belongs to" in one_sentence(box.call("start", script), 1)
    assert list(box.run_dir.iterdir()) == []


def test_row_12_a_file_in_the_place_of_the_run_directory_is_refused(box: Box) -> None:
    script, run_dir = box.script(IDLE), box.path / "file"
    run_dir.write_text("mine\n")
    assert "a file, not a directory" in one_sentence(box.call("start", "--run-dir", run_dir, script), 1)
    assert run_dir.read_text() == "mine\n"


def start_on_tmpfs(box: Box, options: str, prepare: str) -> subprocess.CompletedProcess[str]:
    """Start with a run directory on a small file system that only this command sees; list it afterwards on stdout."""
    script, mount = box.script(IDLE), box.path / "mount"
    mount.mkdir()
    text = (
        f'set -e; mount -t tmpfs -o mode=755,{options} tmpfs "$0"; cd "$0"; {prepare}; '
        '"$@" start --run-dir "$0/run" "$OLDPWD/beat.py" && code=0 || code=$?; ls -A run; exit $code'
    )
    command = ["unshare", "--mount", "sh", "-c", text, str(mount), *box.command()]
    done = subprocess.run(command, env=box.environ, cwd=box.path, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert script.exists()
    return done


@needs_root
@pytest.mark.parametrize(
    ("options", "prepare", "why"),
    [
        ("size=64k", "mkdir run; mount -o remount,ro .", "read-only"),
        ("size=64k", "mkdir run; cat /dev/zero >fill 2>&- || :", os.strerror(errno.ENOSPC)),
        ("size=64k,nr_inodes=2", "mkdir run", os.strerror(errno.ENOSPC)),
    ],
    ids=["read-only", "no-space", "no-inode"],
)
def test_row_12_a_full_or_read_only_file_system_is_refused_in_one_sentence(
    box: Box, options: str, prepare: str, why: str
) -> None:
    done = start_on_tmpfs(box, options, prepare)
    assert why.lower() in one_sentence(done, 1).lower()
    assert done.stdout == "", "something was left in the run directory"
    assert box.processes() == {}


LEAVES_CHILDREN = """
import subprocess

@after(0.001)
def leave_children():
    if os.fork() == 0:
        os.setsid()
        os.execvp("sleep", ["sleep", "600"])
    pid = os.fork()
    if pid == 0:
        log.info("a child is there")
        while True:
            time.sleep(600)
    subprocess.Popen(["sleep", "600"], start_new_session=True, close_fds=False)
    os.posix_spawnp("sleep", ["sleep", "600"], os.environ)
    log.info("has left its children")

@every(3600)
def beat(): pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_row_13_children_that_outlive_the_daemon_do_not_hold_its_lock(box: Box, number: signal.Signals) -> None:
    pid = box.start(LEAVES_CHILDREN)
    box.await_log("has left its children")
    box.await_log("a child is there")  # it has let the lock go, as each that executes another program
    until = time.monotonic() + PATIENCE
    while list(box.processes().values()).count("sleep 600") < 3:
        assert time.monotonic() < until, box.processes()
    children = set(box.processes()) - {pid}
    assert len(children) == 4
    os.kill(pid, number)
    await_end(pid)
    survivors = children & set(box.processes())
    assert survivors, "no child has outlived the daemon: nothing was shown"
    try:
        assert box.call("status", "beat").returncode == (1 if number == signal.SIGKILL else 3)
        again = box.call("start", box.script(IDLE))
        assert again.returncode == 0, again.stdout + again.stderr
        assert "already" not in again.stdout
        assert box.call("kill", "beat").returncode == 0
        assert list(box.run_dir.iterdir()) == []
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            await_end(child)
