"""The side that asks: what it is told when the server goes, or cannot be asked."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys

import pytest
from forking import IMPORTS, Serving, await_end, descriptors
from harness import PATIENCE

from daemonkit.errors import ForkServerLost

SLEEP = "os.write(READY, b'.')\nsignal.pause()"


def test_a_server_that_is_killed_takes_its_children_with_it_and_is_told_as_lost() -> None:
    with Serving() as serving:
        asked = [serving.started(SLEEP) for _ in range(5)]
        serving.process.kill()
        with pytest.raises(ForkServerLost, match="has ended, and its children with it"):
            serving.until(lambda: False)
        for each in asked:
            await_end(each.pid)
        assert {each.child for each in asked} == set(serving.children.abandon())
        assert len(serving.children) == 0
        serving.close()


def test_what_a_server_has_said_before_it_was_killed_is_heard_though_it_was_asked_for_more() -> None:
    with Serving() as serving:
        last = serving.started(SLEEP)
        asked = serving.spawn("signal.pause()")
        # That it was STARTED waits in our socket, a request in the server's.
        assert select.select([serving.children.wire], [], [], PATIENCE)[0]
        serving.process.send_signal(signal.SIGSTOP)
        serving.spawn("")
        serving.process.kill()
        serving.process.wait()
        with pytest.raises(ForkServerLost):
            serving.until(lambda: False)
        await_end(asked.pid)
        await_end(last.pid)
        serving.close()


def test_asking_a_server_that_is_gone_is_an_error_and_makes_no_row() -> None:
    with Serving() as serving:
        asked = serving.started(SLEEP)
        serving.process.kill()
        serving.process.wait()
        gc.collect()  # what other tests have left must not be closed meanwhile
        before = descriptors()
        for fds in ([], [0]):
            with pytest.raises(ForkServerLost, match="fork a child: the fork server has ended"):
                serving.spawn("", fds)
        asked.child.signal(signal.SIGTERM)  # it is gone with the server: nothing to say
        asked.child.kill_tree()
        assert serving.children.abandon() == [asked.child]
        assert descriptors() == before
        await_end(asked.pid)
        serving.close()


def test_asking_with_what_is_no_descriptor_makes_no_row() -> None:
    with Serving() as serving:
        with pytest.raises(OSError, match="Bad file descriptor"):
            serving.spawn("", [9999])
        with pytest.raises(ValueError, match="254 descriptors"):
            serving.spawn("", [0] * 254)
        assert len(serving.children) == 0
        assert serving.run("").is_clean


def test_a_forked_server_gives_back_what_prepare_says_and_writes_nothing_twice() -> None:
    program = f"""{IMPORTS}
import select
print("once")
private = os.open(os.devnull, os.O_RDONLY)
answers, writer = os.pipe()
def enter(message):
    os.write(writer, b"%d" % len(os.listdir("/proc/self/fd")))
    child.leave(0)
def prepare():
    os.close(private)
    os.close(answers)
pid, wire = fork_server(enter, prepare)
os.close(writer)
children = Children(wire)
receipts = []
children.spawn(b"", lambda made, receipt: receipts.append(receipt))
while not receipts:
    assert select.select([wire.fileno()], [], [], 30)[0]
    children.receive()
assert os.read(answers, 100) == b"5"  # 0, 1, 2, writer, the directory that is listed
wire.close()
assert os.waitpid(pid, 0)[1] == 0
assert os.read(answers, 100) == b""
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")


def test_a_forked_server_whose_prepare_fails_says_why_and_never_runs_its_parents_code() -> None:
    program = f"""{IMPORTS}
def prepare():
    raise RuntimeError("not prepared")
try:
    pid, wire = fork_server(None, prepare)
finally:
    print("finally")
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
try:
    Children(wire).receive()
except Exception as error:
    print(type(error).__name__)
wire.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stdout == "finally\nForkServerLost\n"
    assert done.stderr.count("RuntimeError: not prepared") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="takes on another user")
def test_a_server_that_cannot_be_forked_leaks_nothing() -> None:
    program = f"""{IMPORTS}
before = len(os.listdir("/proc/self/fd"))
os.setresuid(65533, 65533, 65533)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    fork_server(None, None)
except BlockingIOError:
    print(len(os.listdir("/proc/self/fd")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
