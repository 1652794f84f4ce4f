"""One fork, one reset, one way out: small programs that fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from forking import IMPORTS
from harness import PATIENCE


def program(text: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    command = [sys.executable, "-W", "error", "-c", IMPORTS + text]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)  # type: ignore[call-overload, no-any-return]


def said(text: str) -> str:
    """What a program that ends well has written."""
    done = program(text)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


_STATE = """
def state():
    with open("/proc/self/status") as file:
        lines = dict(line.split(":\\t") for line in file.read().splitlines() if line.startswith("Sig"))
    def numbers(key):
        # 32 and 33 are the C library's own (nptl(7))
        return sorted(n for n in {*range(1, 65)} - {32, 33} if int(lines[key], 16) >> (n - 1) & 1)
    return {key: numbers(key) for key in ("SigBlk", "SigIgn", "SigCgt")}
"""


def test_a_child_has_no_signal_handler_mask_wakeup_descriptor_or_stdin_of_its_parents() -> None:
    text = """
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, lambda number, frame: None)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
reader, writer = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(writer)
pid = child.fork([signal.SIGINT])
if pid == 0:
    expected = sorted([signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT])
    assert state() == {"SigBlk": [], "SigIgn": expected, "SigCgt": []}, state()
    assert signal.set_wakeup_fd(-1) == -1
    assert os.readlink("/proc/self/fd/0") == "/dev/null"
    assert os.get_inheritable(0)
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))
    assert number.value == signal.SIGKILL
    child.leave(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert state()["SigBlk"] == sorted([signal.SIGUSR2, signal.SIGTERM])
assert state()["SigIgn"] == [signal.SIGUSR1]
assert signal.set_wakeup_fd(-1) == writer
"""
    assert said(_STATE + text) == ""


def test_a_child_of_a_process_without_stdin_gives_its_programs_one() -> None:
    text = """
os.close(0)
if (pid := child.fork()) == 0:
    subprocess.run(["cat"], check=True)
    child.leave(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    assert said(text) == ""


def test_what_is_in_the_buffers_is_written_once() -> None:
    text = """
print("once")
if (pid := child.fork()) == 0:
    print("child")
    child.leave(0)
os.waitpid(pid, 0)
print("parent")
"""
    assert said(text).split() == ["once", "child", "parent"]


def test_children_have_random_numbers_of_their_own() -> None:
    text = """
import random
random.seed(1)
for _ in range(2):
    if (pid := child.fork()) == 0:
        print(random.random())
        child.leave(0)
    os.waitpid(pid, 0)
"""
    assert len(set(said(text).split())) == 2


@pytest.mark.parametrize("action", ["signal.SIG_IGN", "lambda number, frame: None", "signal.SIG_DFL"])
def test_a_signal_sent_right_after_the_fork_is_not_lost(action: str) -> None:
    text = f"""
signal.signal(signal.SIGTERM, {action})
forker = child.Forker()
for _ in range(200):
    pid = forker.fork()
    if pid == 0:
        while True:
            signal.pause()
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
"""
    assert said(text) == ""


def test_a_handler_that_raises_in_the_fork_leaves_no_child() -> None:
    text = """
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    child.fork()
except KeyboardInterrupt:
    assert not waitid.has_children()
    print("interrupted")
"""
    assert said(text) == "interrupted\n"


def test_a_child_dies_with_its_parent() -> None:
    text = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if (pid := child.fork()) == 0:
    signal.pause()
print(pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", IMPORTS + text], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        with open(pidfd):
            assert parent.stdout.read() == b""  # the child had it, too


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("pass", 0, ""),
        ("return 5", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('the reason')", 1, "the reason\n"),
        ("raise ValueError('broken')", 1, "ValueError: broken\n"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt\n"),
        ("print('said', flush=False); os._exit(9)", 9, ""),
        ("sys.stdout.close(); sys.stderr.close()", 0, ""),
    ],
)
def test_the_exit_status_of_a_child_is_what_became_of_its_function(body: str, code: int, error: str) -> None:
    text = f"""
def function():
    {body}
if (pid := child.fork()) == 0:
    child.run(function, "a title")
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = program(text)
    assert done.returncode == code
    assert done.stderr.endswith(error) if error else not done.stderr


def test_what_a_function_left_behind_ends_with_it_also_if_it_tried_to_leave() -> None:
    text = """
def leave_things():
    os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
    subprocess.run(["setsid", "sh", "-c", "sleep 1001 & sleep 1002 &"], check=True)
    if os.fork() == 0:
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            signal.pause()
        os._exit(0)
    print("left")
prctl.become_subreaper()
if (pid := child.fork()) == 0:
    child.run(leave_things, "a title")
os.waitpid(pid, 0)
assert not waitid.has_children()
"""
    assert said(text) == "left\n"


def test_ending_all_descendants_counts_those_that_lived() -> None:
    text = """
for _ in range(3):
    os.posix_spawnp("sleep", ["sleep", "1000"], os.environ)
ended = os.posix_spawnp("true", ["true"], os.environ)
os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
print(child.end_descendants(), child.end_descendants())
"""
    assert said(text) == "3 0\n"


def test_descendants_are_ended_where_the_kernel_reaps_them() -> None:
    text = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
sleepers = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
child.end_descendants()
assert not waitid.has_children()
os._exit(0)
"""
    assert said(text) == ""


@pytest.mark.skipif(os.getuid() != 0, reason="takes on another user")
def test_what_belongs_to_another_user_is_named_and_left() -> None:
    text = """
pid = os.fork()
if pid == 0:
    sleeper = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(sleeper.pid, flush=True)
    os.setresuid(65534, 65534, 65534)
    child.end_descendants()
    child.leave(5)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
"""
    done = program(text)
    pid = int(done.stdout)
    os.kill(pid, 9)  # it was left
    assert f"kill pid {pid}, left by pid " in done.stderr
    assert "it belongs to another user" in done.stderr
    assert "Traceback" not in done.stderr
