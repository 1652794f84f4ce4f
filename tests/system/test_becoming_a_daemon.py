"""Becoming a daemon: the fifteen steps of daemon(7), "SysV Daemons", and what can go wrong on the way (FAULTS, 1-7).

Step 1 close descriptors, 2 reset signal handlers, 3 reset the signal mask, 4 sanitise the environment, 5 fork,
6 setsid, 7 fork again, 8 the first child exits, 9 /dev/null on the streams, 10 umask, 11 working directory,
12 PID file, 13 drop privileges, 14 notify the original process, 15 which exits only then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, Box, await_end

from daemonkit.core import asking
from daemonkit.core.pidfile import State, inspect

NOBODY = 65534
PYTHONS_OWN = {signal.SIGPIPE, signal.SIGXFSZ}  # ignored by the interpreter itself, at its start
QUIET = "@on('start')\ndef begin(): pass\n"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, changes users")


@pytest.fixture(autouse=True)
def _environment_stays_readable(request: pytest.FixtureRequest) -> None:
    """A process title overwrites /proc/PID/environ, by which a box finds its processes (setproctitle, SPT_NOENV)."""
    for name in {"box", "open_box"} & set(request.fixturenames):
        request.getfixturevalue(name).environ["SPT_NOENV"] = "1"


def stat_of(pid: int) -> list[int]:
    """ppid, pgrp, session, tty_nr (proc(5))."""
    return [int(word) for word in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1:5]]


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def signals_in(mask: str) -> set[int]:
    """The signals of a mask in proc(5), status, without the two that belong to the C library (nptl(7))."""
    return {number for number in signal.valid_signals() if int(mask, 16) >> (number - 1) & 1}


def environ_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def descriptors_of(pid: int) -> list[str]:
    """What the descriptors above 2 are, without the numbers by which two daemons differ."""
    entries = [entry for entry in Path(f"/proc/{pid}/fd").iterdir() if int(entry.name) > 2]
    return sorted(re.sub(r"\d+", "N", os.readlink(entry)) for entry in entries)


def ancestors_of(pid: int) -> set[int]:
    found = set()
    while pid > 1:
        pid = stat_of(pid)[0]
        found.add(pid)
    return found


def nothing_is_left(box: Box) -> None:
    assert box.processes() == {}
    assert list(box.run_dir.iterdir()) == []


def ignore_all_signals() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)


def block_all_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def read_to_the_end(fd: int) -> str:
    """All that comes until nobody has the other end open any more."""
    data = b""
    while select.select([fd], [], [], PATIENCE)[0]:
        try:
            chunk = os.read(fd, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says it
                raise
            chunk = b""
        if not chunk:
            return data.decode()
        data += chunk
    pytest.fail(f"somebody still holds the other end; read so far: {data!r}")


def on_a_terminal(box: Box, *args: str | Path) -> tuple[subprocess.Popen[str], int]:
    """Start the command in a session of its own, on a terminal of its own; the terminal's other end."""
    ours, theirs = pty.openpty()
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    process = box.popen(*args, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **options)
    os.close(theirs)
    return process, ours


# The fifteen steps


def test_step_01_a_pipe_that_was_inherited_comes_to_its_end_while_the_daemon_lives(box: Box) -> None:
    reader, writer = os.pipe()
    box.call("start", box.script(QUIET), pass_fds=(writer,))
    os.close(writer)
    assert read_to_the_end(reader) == ""
    os.close(reader)
    assert box.pid()


def test_step_02_signals_that_the_caller_ignored_reach_the_daemon(box: Box) -> None:
    done = box.call("start", box.script(QUIET), preexec_fn=ignore_all_signals)
    assert done.returncode == 0, done.stderr
    pid = box.pid()
    assert pid
    assert signals_in(status_of(pid)["SigIgn"]) == PYTHONS_OWN
    os.kill(pid, signal.SIGTERM)
    await_end(pid)


def test_step_03_signals_that_the_caller_blocked_reach_the_daemon(box: Box) -> None:
    done = box.call("start", box.script(QUIET), preexec_fn=block_all_signals)
    assert done.returncode == 0, done.stderr
    pid = box.pid()
    assert pid
    assert signals_in(status_of(pid)["SigBlk"]) == set()
    os.kill(pid, signal.SIGTERM)
    await_end(pid)


def test_step_04_what_belongs_to_terminal_login_and_service_is_not_in_the_environment(box: Box) -> None:
    foreign = ["TERM", "DISPLAY", "SSH_CLIENT", "SSH_AUTH_SOCK", "SUDO_USER", "OLDPWD", "PS1", "LISTEN_FDS"]
    box.environ |= dict.fromkeys(foreign, "1") | {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MINE": "kept"}
    environ = environ_of(box.start(QUIET))
    assert not environ.keys() & set(foreign)
    assert environ["PWD"] == "/"
    assert (environ["MINE"], environ["PATH"], environ["LANG"]) == ("kept", "/usr/bin:/bin", "C.UTF-8")


def test_step_05_the_daemon_works_on_when_its_launcher_is_gone(box: Box) -> None:
    with box.popen("start", box.script("@every(0.05)\ndef beat(): log.info('beat')\n")) as launcher:
        launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0
    pid = box.pid()
    assert pid not in (None, launcher.pid)
    box.await_log("test: beat", 2)


def test_step_06_the_daemon_is_in_a_session_of_its_own_without_a_terminal(box: Box) -> None:
    process, terminal = on_a_terminal(box, "start", box.script(QUIET))
    read_to_the_end(terminal)
    assert process.wait(PATIENCE) == 0
    os.close(terminal)
    pid = box.pid()
    assert pid
    _, group, session, tty = stat_of(pid)
    assert session not in (process.pid, os.getsid(0))
    assert group == session
    assert tty == 0


def test_step_07_the_daemon_does_not_lead_its_session(box: Box) -> None:
    pid = box.start(QUIET)
    assert os.getsid(pid) != pid


def test_step_08_the_first_child_is_gone_and_init_has_adopted_the_daemon(box: Box) -> None:
    pid = box.start(QUIET)
    with pytest.raises(ProcessLookupError):
        os.kill(os.getsid(pid), 0)
    assert stat_of(pid)[0] in ancestors_of(os.getpid())  # init, or a nearer subreaper (prctl(2))


def test_step_09_stdin_is_dev_null_and_the_others_are_the_log(box: Box) -> None:
    pid = box.start("@on('SIGUSR2')\ndef speak(): os.system('echo a child speaks; echo a child complains >&2')\n")
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null", str(box.log), str(box.log)]
    os.kill(pid, signal.SIGUSR2)
    box.await_log("a child speaks")
    box.await_log("a child complains")


def test_step_10_the_umask_is_022_or_as_configured_whatever_the_callers_was(box: Box) -> None:
    text = "@on('start')\ndef begin(): open(sys.argv[1], 'w').close()\n"
    for name, option, expected in (("a.py", [], 0o644), ("b.py", ["--umask", "027"], 0o640)):
        made = box.path / f"{name}.made"
        done = box.call("start", *option, box.script(text, name), made, umask=0o777)
        assert done.returncode == 0, done.stderr
        assert made.stat().st_mode & 0o777 == expected


def test_step_11_the_working_directory_is_the_root_or_as_configured(box: Box) -> None:
    assert os.readlink(f"/proc/{box.start(QUIET)}/cwd") == "/"
    there = box.path / "there"
    there.mkdir()
    pid = box.start(QUIET, "--chdir", str(there), name="other.py")
    assert os.readlink(f"/proc/{pid}/cwd") == str(there)


@pytest.mark.parametrize("command", ["start", "run"])
def test_a_working_directory_that_is_not_there_is_told_and_nothing_begins(box: Box, command: str) -> None:
    done = box.call(command, "--chdir", "/nowhere", box.script(QUIET))
    assert (done.returncode, list(box.run_dir.iterdir())) == (2, [])
    assert done.stderr == (
        "daemonkit: chdir /nowhere: there is no such directory; make it, or name another with --chdir\n"
    )


def test_step_12_the_pid_file_says_who_under_a_lock(box: Box) -> None:
    pid = box.start(QUIET)
    path = box.run_dir / "beat.pid"
    assert path.read_text() == f"{pid}\n"
    with path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    again = box.call("start", box.path / "beat.py")
    assert (again.returncode, again.stdout) == (0, f"beat is already running, pid {pid}\n")


@needs_root
def test_step_13_privileges_are_dropped(open_box: Box) -> None:
    pid = open_box.start(QUIET, "--user", str(NOBODY))
    assert status_of(pid)["Uid"].split() == [str(NOBODY)] * 4
    assert int(status_of(pid)["CapPrm"], 16) == 0


def test_step_14_the_launcher_waits_until_the_daemon_says_that_it_is_ready(box: Box) -> None:
    gate, begun = box.path / "gate", box.path / "begun"
    os.mkfifo(gate)
    text = "@on('start')\ndef begin():\n  open(sys.argv[2], 'w').close()\n  open(sys.argv[1]).read()\n"
    with box.popen("start", box.script(text), gate, begun) as launcher:
        box.await_file(begun)
        assert launcher.poll() is None
        assert "ready" not in box.log.read_text()
        gate.write_text("")
        out, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 0
    assert out == f"beat is running, pid {box.pid()}\n"


def test_step_15_once_the_launcher_has_exited_all_that_speaks_to_the_daemon_works(box: Box) -> None:
    pid = box.start(QUIET)
    assert asking.ask(str(box.run_dir / "beat.sock"), {"do": "status"}, pid=pid)["pid"] == pid
    assert inspect(str(box.run_dir / "beat.pid")) == State(True, True, pid)
    assert f"ready, pid {pid}" in box.log.read_text()


# Row 1: descriptors


def test_row_01_inherited_descriptors_are_closed_up_to_a_limit_of_a_million_without_delay(box: Box) -> None:
    def inherit() -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):  # some containers lack CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (1048576, 1048576))
            limit = 1048576
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        for number in (*range(300, 1300), limit // 2, limit - 1):
            os.dup2(0, number)

    first = box.start(QUIET, name="plain.py")
    os.kill(first, signal.SIGUSR1)
    box.await_log("plain: running")  # its loop turns: all that it opens is open
    plain = descriptors_of(first)
    began = time.monotonic()
    done = box.call("start", box.script(QUIET), preexec_fn=inherit, close_fds=False)
    assert time.monotonic() - began < PATIENCE  # bounded; one close(2) for each would be a million calls
    assert done.returncode == 0, done.stderr
    pid = box.pid()
    assert pid
    os.kill(pid, signal.SIGUSR1)
    box.await_log("beat: running")
    assert [each.replace("beat", "plain") for each in descriptors_of(pid)] == plain


def test_row_01_descriptors_above_a_limit_that_was_lowered_later_are_closed_too(box: Box) -> None:
    def inherit() -> None:
        os.dup2(0, 5000)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    done = box.call("start", box.script(QUIET), preexec_fn=inherit, close_fds=False)
    assert done.returncode == 0, done.stderr
    pid = box.pid()
    assert pid
    assert max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()) < 64


# Row 2: signals, umask, working directory, environment


def test_row_02_ignored_and_blocked_signals_odd_umask_deleted_directory_and_huge_environment(box: Box) -> None:
    gone = box.path / "gone"
    gone.mkdir()

    def spoil() -> None:
        os.chdir(gone)
        gone.rmdir()
        ignore_all_signals()
        block_all_signals()
        os.umask(0o777)

    box.environ |= {f"HUGE_{number}": "x" * 100_000 for number in range(10)}
    done = box.call("start", box.script(QUIET), preexec_fn=spoil)
    assert done.returncode == 0, done.stderr
    pid = box.pid()
    assert pid
    status = status_of(pid)
    assert signals_in(status["SigIgn"]) == PYTHONS_OWN
    assert signals_in(status["SigBlk"]) == set()
    assert status["Umask"] == "0022"
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert sum(len(value) for key, value in environ_of(pid).items() if key.startswith("HUGE_")) == 1_000_000
    assert box.log.stat().st_mode & 0o777 == 0o640
    assert box.call("kill", "beat").returncode == 0
    nothing_is_left(box)


def test_row_02_a_start_that_fails_says_why_although_the_caller_ignores_sigchld(box: Box) -> None:
    done = box.call("start", box.script("os.kill(os.getpid(), 9)"), preexec_fn=ignore_all_signals)
    assert done.returncode == 1
    assert "beat was killed by SIGKILL before it was ready" in done.stderr
    nothing_is_left(box)


def test_row_02_a_child_of_the_daemon_starts_with_default_signals(box: Box) -> None:
    pid = box.start("@on('SIGUSR2')\ndef show(): os.system('grep -E ^Sig /proc/self/status; echo shown')\n")
    os.kill(pid, signal.SIGUSR2)
    masks = dict(re.findall(r"^(Sig\w+):\t([0-9a-f]{16})$", box.await_log("shown"), re.MULTILINE))
    assert signals_in(masks["SigBlk"]) - {signal.SIGCHLD} == set()
    assert signals_in(masks["SigIgn"]) <= PYTHONS_OWN | {32, 33}  # these two ignores glibc's posix_spawn


# Row 3: session and terminal


def test_row_03_no_terminal_is_to_be_had_again_and_a_hangup_does_not_reach_it(box: Box) -> None:
    text = """
        def has_terminal():
            try:
                os.close(os.open("/dev/tty", os.O_RDWR))
            except OSError as error:
                return error.strerror
            return True

        @on("SIGUSR2")
        def grab():
            before = has_terminal()
            fd = os.open(sys.argv[1], os.O_RDWR)
            log.info("before: %s; opened %s; after: %s; end", before, os.isatty(fd), has_terminal())
        """
    ours, theirs = pty.openpty()
    process, terminal = on_a_terminal(box, "start", box.script(text), os.ttyname(theirs))
    said = read_to_the_end(terminal)  # to the end: the daemon does not hold the terminal
    assert process.wait(PATIENCE) == 0
    assert "beat is running" in said
    pid = box.pid()
    assert pid
    os.close(terminal)  # hangs up
    os.kill(pid, signal.SIGUSR2)
    log = box.await_log("; end")
    refusal = os.strerror(errno.ENXIO)
    assert f"before: {refusal}; opened True; after: {refusal}; end" in log
    assert "reload" not in log
    assert stat_of(pid)[3] == 0
    for fd in (ours, theirs):
        os.close(fd)


# Row 4: a start that fails

FAILURES = {
    "raises": ("raise RuntimeError('no luck')", ["Traceback", "RuntimeError: no luck", "beat.py"]),
    "raises_a_base_exception": ("raise KeyboardInterrupt", ["KeyboardInterrupt"]),
    "has_a_syntax_error": ("def beat(:\n", ["SyntaxError", "beat.py"]),
    "is_not_utf_8": ("# \udcff\n", ["beat.py"]),
    "calls_sys_exit_0": ("sys.exit()", ["called sys.exit()"]),
    "calls_sys_exit_with_words": ("sys.exit('no licence')", ["called sys.exit('no licence')"]),
    "calls_os_exit_0": ("os._exit(0)", ["exited with status 0 before it was ready"]),
    "calls_os_exit_3": ("os._exit(3)", ["exited with status 3 before it was ready"]),
    "segfaults": ("import ctypes; ctypes.string_at(0)", ["was killed by SIGSEGV before it was ready"]),
    "is_killed": ("os.kill(os.getpid(), signal.SIGKILL)", ["was killed by SIGKILL before it was ready"]),
    "aborts": ("os.abort()", ["was killed by SIGABRT before it was ready"]),
    "gets_term": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", ["stopped by a signal before it was ready"]),
    "recurses_for_ever": ("def deep(): deep()\ndeep()", ["RecursionError"]),
    "declares_nothing": ("pass", ["declares nothing to do"]),
    "imports_what_is_not_there": ("import no_such_module", ["ModuleNotFoundError", "no_such_module"]),
    "raises_in_a_start_hook": ("@on('start')\ndef begin(): raise OSError('port taken')", ["OSError: port taken"]),
    "exits_in_a_start_hook": ("@on('start')\ndef begin(): sys.exit(0)", ["start hook begin", "SystemExit"]),
    "declares_nonsense": ("@every(-1)\ndef beat(): pass", ["beat.py, line 4", "-1"]),
}


@pytest.mark.parametrize("how", FAILURES)
def test_row_04_a_script_that_fails_tells_the_terminal_why_and_leaves_nothing(box: Box, how: str) -> None:
    text, expected = FAILURES[how]
    path = box.script("")
    path.write_bytes(path.read_bytes() + text.encode(errors="surrogateescape"))
    done = box.call("start", path)
    assert done.returncode == (2 if how == "declares_nonsense" else 1)
    assert "is running" not in done.stdout
    for words in expected:
        assert words in done.stderr
    assert "daemonkit itself failed" not in done.stderr
    nothing_is_left(box)


def test_row_04_the_traceback_is_seen_on_a_real_terminal(box: Box) -> None:
    process, terminal = on_a_terminal(box, "start", box.script("print('so far so good')\n1 / 0\n"))
    said = read_to_the_end(terminal)
    assert process.wait(PATIENCE) == 1
    os.close(terminal)
    assert "so far so good" in said
    assert "ZeroDivisionError" in said
    assert str(box.path / "beat.py") in said
    nothing_is_left(box)


def start_that_hangs(box: Box, text: str, where: str, *options: str) -> str:
    """What a start says that hangs ``where``; within the shortest time in which this machine, now, comes there."""
    for timeout in ("0.7", "3", "10", "30"):
        done = box.call("start", "--ready-timeout", timeout, *options, box.script(text))
        assert done.returncode == 1
        assert f"beat was not ready within ready_timeout, {timeout} s" in done.stderr
        nothing_is_left(box)
        if where in done.stderr:
            return done.stderr
    pytest.fail(f"it was never told that it hangs in {where}: {done.stderr}")


def test_row_04_a_hang_before_ready_is_bounded_and_named(box: Box) -> None:
    start_that_hangs(box, "time.sleep(600)", f"importing {box.path / 'beat.py'}")


def test_row_04_a_hanging_start_hook_is_bounded_and_named(box: Box) -> None:
    text = "@on('start')\ndef begin(): time.sleep(600)\n@on('stop')\ndef end(): log.info('cleaned up')\n"
    start_that_hangs(box, text, "start hook begin", "--graceful-timeout", "0.1")
    assert "cleaned up" in box.log.read_text()


def test_row_04_a_hang_that_ignores_term_is_killed(box: Box) -> None:
    text = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(600)\n"
    done = box.call("start", "--ready-timeout", "0.5", box.script(text))
    assert done.returncode == 1
    assert "was not ready within ready_timeout" in done.stderr
    nothing_is_left(box)


def test_row_04_a_child_that_the_script_forked_goes_with_it(box: Box) -> None:
    text = """
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.write(writer, b"x")
                time.sleep(600)
            time.sleep(600)
        os.read(reader, 1)
        raise RuntimeError("after the fork")
        """
    done = box.call("start", box.script(text))
    assert done.returncode == 1
    assert "RuntimeError: after the fork" in done.stderr
    nothing_is_left(box)


def test_row_04_a_death_is_noticed_at_once_although_a_forked_child_lives(box: Box) -> None:
    text = "if os.fork() == 0: time.sleep(600)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    done = box.call("start", "--ready-timeout", "100", box.script(text), timeout=50)
    assert done.returncode == 1
    assert "beat was killed by SIGKILL before it was ready" in done.stderr
    nothing_is_left(box)


def test_row_04_a_script_that_closes_every_descriptor_and_hangs_is_bounded(box: Box) -> None:
    done = box.call("start", "--ready-timeout", "1", box.script("os.closerange(3, 256)\ntime.sleep(600)"), timeout=50)
    assert done.returncode == 1
    assert "beat was not ready within ready_timeout, 1 s" in done.stderr
    nothing_is_left(box)


def test_row_04_a_script_that_becomes_a_daemon_by_itself_is_told_so_and_ends(box: Box) -> None:
    done = box.call("start", box.script("import daemon\ndaemon.DaemonContext().open()\n" + QUIET), timeout=50)
    assert done.returncode == 1
    assert done.stderr.strip()
    nothing_is_left(box)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_row_04_a_signal_to_the_launcher_ends_the_daemon_to_be(box: Box, number: signal.Signals) -> None:
    begun = box.path / "begun"
    with box.popen("start", box.script("open(sys.argv[1], 'w').close()\ntime.sleep(600)"), begun) as launcher:
        box.await_file(begun)
        launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 1
    assert f"interrupted by {number.name}; nothing was left running" in said
    assert "Traceback" not in said
    nothing_is_left(box)


def test_row_04_the_interrupt_key_ends_a_start_that_hangs(box: Box) -> None:
    begun = box.path / "begun"
    text = "open(sys.argv[1], 'w').close()\ntime.sleep(600)"
    process, terminal = on_a_terminal(box, "start", box.script(text), begun)
    box.await_file(begun)
    os.write(terminal, b"\x03")
    said = read_to_the_end(terminal)
    assert process.wait(PATIENCE) == 1
    os.close(terminal)
    assert "interrupted by SIGINT; nothing was left running" in said
    nothing_is_left(box)


def test_row_04_a_start_under_nohup_outlives_the_hangup(box: Box) -> None:
    gate, begun = box.path / "gate", box.path / "begun"
    os.mkfifo(gate)
    text = "open(sys.argv[2], 'w').close()\nopen(sys.argv[1]).read()\n" + QUIET
    hup_ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with box.popen("start", box.script(text), gate, begun, **hup_ignored) as launcher:
        box.await_file(begun)
        launcher.send_signal(signal.SIGHUP)
        gate.write_text("")
        said, _ = launcher.communicate(timeout=PATIENCE)
    assert (launcher.returncode, said) == (0, f"beat is running, pid {box.pid()}\n")


def test_row_04_after_a_failure_the_mended_script_starts(box: Box) -> None:
    assert box.call("start", box.script("raise RuntimeError")).returncode == 1
    assert box.start(QUIET)


# Row 5: a log that takes nothing

CHATTER = """
    @every(0.01)
    def beat():
        count = beat.count = getattr(beat, "count", 0) + 1
        log.info("beat %d %s end", count, "x" * int(sys.argv[2]))
        with open(sys.argv[1], "a") as file:
            file.write("beat\\n")
    """


def in_front(box: Box) -> dict[str, str]:
    """An environment in which `run` logs to stderr."""
    return {key: value for key, value in box.environ.items() if key != "DAEMONKIT_LOG"}


def test_row_05_a_full_pipe_under_stderr_stops_nothing_and_the_loss_is_counted(box: Box) -> None:
    beats = box.path / "beats"
    reader, writer = os.pipe()
    daemon = box.popen("run", box.script(CHATTER), beats, "4000", env=in_front(box), stdout=None, stderr=writer)
    with daemon:
        seen = box.await_file(beats, "beat", 40).count("beat")  # 160,000 bytes; a pipe takes 65,536
        assert box.status()["log_lost"] > 0
        assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK  # others write there too
        os.close(writer)
        heard = b""
        while b"lost: the log could not be written" not in heard:
            assert select.select([reader], [], [], PATIENCE)[0]
            heard += os.read(reader, 65536)
        os.close(reader)  # from here on, EPIPE
        box.await_file(beats, "beat", seen + 20)
        daemon.terminate()
        assert daemon.wait(PATIENCE) == 0
    nothing_is_left(box)


def test_row_05_closed_streams_under_run_stop_nothing(box: Box) -> None:
    beats = box.path / "beats"

    def close_streams() -> None:
        os.closerange(0, 3)

    with box.popen("run", box.script(CHATTER), beats, "1", env=in_front(box), preexec_fn=close_streams) as daemon:
        box.await_file(beats, "beat", 10)
        assert box.status()["pid"] == daemon.pid
        daemon.terminate()
        assert daemon.wait(PATIENCE) == 0
    nothing_is_left(box)


def test_row_05_a_reader_that_left_does_not_fail_a_start(box: Box) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    text = "for _ in range(1000): print('x' * 1000)\nlog.error('an error')\n" + QUIET
    with box.popen("start", box.script(text), stdout=writer, stderr=writer) as launcher:
        os.close(writer)
        assert launcher.wait(PATIENCE) == 0
    assert box.pid()
    box.await_log("an error")


@pytest.fixture
def small_disk(box: Box) -> Iterator[Path]:
    """A file system of 4 MB, gone after the test."""
    path = box.path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0755", "tmpfs", path], check=True)
    yield path
    with contextlib.suppress(AssertionError):
        box.close()  # what lives holds the log open
    subprocess.run(["umount", path], check=True)


@needs_root
def test_row_05_a_full_disk_under_the_log_stops_nothing_and_every_lost_line_is_counted(
    box: Box, small_disk: Path
) -> None:
    beats, box.log = box.path / "beats", small_disk / "daemon.log"
    box.environ["DAEMONKIT_LOG"] = str(box.log)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**22 - 32768))  # the room that this makes lasts until the daemon is stopped
    done = box.call("start", box.script(CHATTER), beats, "400")
    assert done.returncode == 0, done.stderr
    box.await_file(beats, "beat", 100)  # 45,000 bytes; there were 32,768
    assert box.status()["log_lost"] > 0
    ballast.unlink()
    box.await_log("lost: the log could not be written")
    assert box.call("kill", "beat").returncode == 0
    log = box.log.read_text()
    said = beats.read_text().count("beat")
    lost = sum(int(count) for count in re.findall(r"(\d+) lines? (?:was|were) lost", log))
    assert lost > 0
    assert said - len(re.findall(r"beat \d+ x{400} end\n", log)) == lost


@needs_root
def test_row_05_a_daemon_starts_although_the_disk_under_its_log_is_full(box: Box, small_disk: Path) -> None:
    box.log = small_disk / "daemon.log"
    box.environ["DAEMONKIT_LOG"] = str(box.log)
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    assert box.start(QUIET)
    assert box.status()["log_lost"] == 1  # "ready"


# Row 6: started from odd places


def test_row_06_from_cron(box: Box) -> None:
    """As cron(8) does it: a session of its own, next to no environment, output into a pipe that is read to its end."""
    own = {key: value for key, value in box.environ.items() if key.startswith("DAEMONKIT_") or key == "BOX_MARK"}
    environ = {"HOME": str(box.path), "LOGNAME": "root", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", **own}
    if path := os.environ.get("PYTHONPATH"):
        environ["PYTHONPATH"] = path
    line = " ".join(box.command("start", box.script(QUIET)))
    options: dict[str, Any] = {"env": environ, "cwd": box.path, "stdin": subprocess.DEVNULL, "start_new_session": True}
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=PATIENCE, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"beat is running, pid {box.pid()}\n"


def test_row_06_over_ssh_without_a_terminal(box: Box) -> None:
    """As sshd(8) does it: the streams are sockets, and the session ends when nobody holds them any more."""
    ours, theirs = socket.socketpair()
    box.environ |= {"SSH_CLIENT": "192.0.2.1 22 22", "SSH_CONNECTION": "192.0.2.1 22 192.0.2.2 22"}
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with ours, box.popen("start", box.script(QUIET), **options) as launcher:
        theirs.close()
        assert read_to_the_end(ours.fileno()) == f"beat is running, pid {box.pid()}\n"
        assert launcher.wait(PATIENCE) == 0
    pid = box.pid()
    assert pid
    assert not [key for key in environ_of(pid) if key.startswith("SSH_")]


@needs_root
@pytest.mark.skipif(shutil.which("sudo") is None, reason="sudo is not installed")
def test_row_06_inside_sudo_on_a_terminal_that_goes_away(box: Box) -> None:
    wanted = ("DAEMONKIT_", "BOX_MARK", "SPT_NOENV", "PYTHONPATH")
    kept = [f"{key}={value}" for key, value in box.environ.items() if key.startswith(wanted)]
    ours, theirs = pty.openpty()
    command = ["sudo", "-n", *kept, *box.command("start", box.script(QUIET))]
    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with subprocess.Popen(command, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **streams) as process:
        os.close(theirs)
        said = read_to_the_end(ours)
        assert process.wait(PATIENCE) == 0, said
    os.close(ours)
    pid = box.pid()
    assert pid
    assert f"beat is running, pid {pid}" in said
    assert not [key for key in environ_of(pid) if key.startswith("SUDO_")]
    assert stat_of(pid)[3] == 0
    assert box.status()["pid"] == pid


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_row_06_with_streams_closed(box: Box, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    done = box.call("start", box.script(QUIET), preexec_fn=close)
    assert (done.returncode, done.stderr) == (0, "")
    pid = box.pid()
    assert pid
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null", str(box.log), str(box.log)]
    assert (box.run_dir / "beat.pid").read_text() == f"{pid}\n"


def test_row_06_with_streams_closed_a_failure_still_has_its_exit_code(box: Box) -> None:
    done = box.call("start", box.script("raise RuntimeError"), preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 1
    nothing_is_left(box)


# Row 7: privileges

REGAIN = """
    # What is used after the drop is loaded before it: the interpreter's own directory may be root's alone.
    @on("SIGUSR2")
    def climb():
        tries = {
            "setuid": lambda: os.setuid(0),
            "seteuid": lambda: os.seteuid(0),
            "setreuid": lambda: os.setreuid(0, 0),
            "setresuid": lambda: os.setresuid(-1, 0, -1),
            "setgid": lambda: os.setgid(0),
            "setegid": lambda: os.setegid(0),
            "setgroups": lambda: os.setgroups([0]),
            "shadow": lambda: open("/etc/shadow"),
        }
        for name, attempt in tries.items():
            try:
                attempt()
            except PermissionError:
                log.info("%s: refused", name)
            else:
                log.info("%s: HAD", name)
        log.info("%s %s %s %s; end", os.getresuid(), os.getresgid(), os.getgroups(), os.environ["HOME"])
    """


@needs_root
def test_row_07_dropped_privileges_are_complete_and_cannot_be_regained(open_box: Box) -> None:
    import pwd

    nobody = pwd.getpwuid(NOBODY)
    path = open_box.script(REGAIN)
    done = open_box.call("start", "--user", "nobody", path, extra_groups=[0, 4, 27, 42])
    assert done.returncode == 0, done.stderr
    pid = open_box.pid()
    assert pid
    status = status_of(pid)
    assert status["Uid"].split() == [str(NOBODY)] * 4
    assert status["Gid"].split() == [str(nobody.pw_gid)] * 4
    assert {int(group) for group in status["Groups"].split()} == set(os.getgrouplist("nobody", nobody.pw_gid))
    assert {int(status[kind], 16) for kind in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == {0}
    os.kill(pid, signal.SIGUSR2)
    log = open_box.await_log("; end")
    assert log.count(": refused") == 8
    assert "HAD" not in log
    assert f"{(NOBODY,) * 3} {(nobody.pw_gid,) * 3}" in log
    assert f"{nobody.pw_dir}; end" in log


@needs_root
def test_row_07_a_group_alone_is_taken_on_by_number(open_box: Box) -> None:
    pid = open_box.start(QUIET, "--user", str(NOBODY), "--group", "12345")
    assert status_of(pid)["Gid"].split() == ["12345"] * 4
    assert 0 not in {int(group) for group in status_of(pid)["Groups"].split()}


@needs_root
def test_row_07_pid_file_and_log_still_work_without_privileges(open_box: Box) -> None:
    box = open_box
    logs = box.path / "logs"
    logs.mkdir()
    os.chown(logs, NOBODY, NOBODY)
    box.log = logs / "daemon.log"
    box.environ["DAEMONKIT_LOG"] = str(box.log)
    pid = box.start("@every(0.05)\ndef beat(): log.info('beat')\n", "--user", "nobody")
    assert inspect(str(box.run_dir / "beat.pid")) == State(True, True, pid)
    assert box.status()["state"] == "running"
    box.await_log("test: beat", 2)
    assert box.log.stat().st_uid == NOBODY
    box.log.rename(logs / "daemon.log.1")
    assert box.call("reload", "beat").returncode == 0
    box.await_log("test: beat", 2)
    assert box.log.stat().st_uid == NOBODY
    assert box.call("kill", "beat").returncode == 0
    nothing_is_left(box)


@needs_root
def test_row_07_a_log_that_can_no_longer_be_opened_stays_open(open_box: Box) -> None:
    box = open_box
    pid = box.start("@every(0.05)\ndef beat(): log.info('beat')\n", "--user", "nobody")
    rotated = box.path / "daemon.log.1"
    box.log.rename(rotated)
    os.kill(pid, signal.SIGUSR1)
    content = box.await_file(rotated, "the old one stays open")
    box.await_file(rotated, "test: beat", content.count("test: beat") + 2)


@needs_root
def test_row_07_stopped_without_the_right_to_remove_its_pid_file_it_still_counts_as_ended_well(open_box: Box) -> None:
    box = open_box
    pid = box.start(QUIET, "--user", "nobody")
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    assert box.call("status", "beat").returncode == 3
    assert box.start(QUIET, "--user", "nobody") != pid


@needs_root
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--user", "no-such-user"], "become user no-such-user: no such user"),
        (["--user", "nobody", "--group", "no-such-group"], "become group no-such-group: no such group"),
    ],
)
def test_row_07_an_unknown_account_is_refused_before_anything_is_started(
    box: Box, options: list[str], words: str
) -> None:
    done = box.call("start", *options, box.script("open(sys.argv[1], 'w')"), box.path / "ran")
    assert done.returncode == 1
    assert words in done.stderr
    assert not (box.path / "ran").exists()
    nothing_is_left(box)


@needs_root
def test_row_07_a_script_that_its_user_may_not_read_fails_the_start(open_box: Box) -> None:
    path = open_box.script(QUIET)
    path.chmod(0o600)
    done = open_box.call("start", "--user", "nobody", path)
    assert done.returncode == 1
    assert f"{path}: Permission denied" in done.stderr
    nothing_is_left(open_box)


# In front: service managers and containers


def stop_in_front(box: Box, daemon: subprocess.Popen[str]) -> None:
    daemon.terminate()
    assert daemon.wait(PATIENCE) == 0
    nothing_is_left(box)


def test_start_under_a_service_manager_that_waits_for_word_stays_in_front(box: Box) -> None:
    address = box.path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(PATIENCE)
        with box.popen("start", box.script(QUIET), env={**box.environ, "NOTIFY_SOCKET": str(address)}) as daemon:
            words: list[str] = []
            while "READY=1" not in words:
                words = manager.recv(4096).decode().split("\n")
            assert f"MAINPID={daemon.pid}" in words
            assert box.pid() == daemon.pid
            box.await_log("staying in front")
            stop_in_front(box, daemon)
            while "STOPPING=1" not in words:
                words = manager.recv(4096).decode().split("\n")


def test_start_as_a_systemd_service_stays_in_front(box: Box) -> None:
    with box.popen("start", box.script(QUIET), env={**box.environ, "INVOCATION_ID": "0" * 32}) as daemon:
        box.await_log(f"ready, pid {daemon.pid}")
        assert "staying in front" in box.log.read_text()
        stop_in_front(box, daemon)


@contextlib.contextmanager
def as_pid_1(box: Box, *args: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[int], None]]]:
    """Run the command as PID 1 of a PID namespace; a function that signals it from outside."""
    inside = ["sh", "-c", "trap '' CHLD; exec \"$@\"", "sh", *box.command(*args)]  # ignored, as by some runtimes
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *inside]
    with subprocess.Popen(command, env=box.environ, cwd=box.path) as outer:
        try:
            box.await_log("ready, pid")
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            yield outer, lambda number: os.kill(int(children[0]), number)
        finally:
            if outer.poll() is None:
                outer.kill()


ORPHANS = """
    import subprocess

    @every(0.02)
    def work():
        shell = "sh -c 'echo $$ >> orphans; exec sleep 0.1' & exit 7"
        done = subprocess.run(["sh", "-c", shell], cwd=sys.argv[1])
        log.info("job's own child: %d, init is %s", done.returncode, open("/proc/1/comm").read().strip())
        if work.runs > 10:
            gone = [pid for pid in open(f"{sys.argv[1]}/orphans").read().split() if not os.path.exists(f"/proc/{pid}")]
            if len(gone) > 10:
                log.info("reaped: %d", len(gone))
        work.runs += 1
    work.runs = 0
    """


@needs_root
def test_run_as_pid_1_reaps_orphans_and_a_jobs_own_child_keeps_its_exit_code(box: Box) -> None:
    with as_pid_1(box, "run", box.script(ORPHANS), box.path) as (outer, send):
        log = box.await_log("reaped: ")
        send(signal.SIGUSR1)
        box.await_log("INFO daemonkit: status")
        send(signal.SIGTERM)
        assert outer.wait(PATIENCE) == 0
    codes = set(re.findall(r"job's own child: (-?\d+),", log))
    assert codes == {"7"}
    assert "failed" not in log
    nothing_is_left(box)


@needs_root
def test_start_as_pid_1_stays_in_front_and_passes_on_the_exit_code(box: Box) -> None:
    text = "def loop():\n  while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n  sys.exit(5)\nmain(loop)\n"
    with as_pid_1(box, "start", box.script(text), box.path / "go") as (outer, _):
        assert "staying in front: this is PID 1" in box.log.read_text()
        (box.path / "go").touch()
        assert outer.wait(PATIENCE) == 5
    nothing_is_left(box)
