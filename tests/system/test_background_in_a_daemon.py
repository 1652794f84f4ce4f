"""background(start="daemon"): calls that run below a daemon, which shows, logs, finishes and ends them."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, Box, await_end

from daemonkit.core import asking

BEAT = "@every(60)\ndef beat(): pass\n"
# The program that asks: it does each line that it reads, and says what came of it.
WEB = """
import fcntl, logging, os, select, sys
from daemonkit import Background
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
later = Background(2, start="daemon", daemon="beat", timeout=os.environ.get("TIMEOUT", "1h"))

def note(*words):
    fd = os.open("out", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, words)) + chr(10)).encode())
    os.close(fd)

def work(number):
    note("begun", number)
    with open("gate") as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
    note("done", number)

def fail():
    raise ConnectionError("no bucket")

def await_begun(count):  # until that many of ours have begun as far as we were told
    server = later._server
    while sum(not asked.request for asked in server._open.values()) < count:
        assert select.select([server.wire], [], [], 30)[0]
        server.hear()

if __name__ == "__main__":
    for line in sys.stdin:
        try:
            exec(line)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        else:
            print("ok", flush=True)
"""


class Web:
    """The program that asks, in a box with a gate that its work waits for."""

    def __init__(self, box: Box, **environ: str) -> None:
        self.box = box
        (box.path / "web.py").write_text(WEB)
        self._gate = (box.path / "gate").open("w")
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        with (box.path / "err").open("a") as err:
            self.process = subprocess.Popen(
                [sys.executable, "web.py"],
                cwd=box.path,
                env={**box.environ, **environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )

    def do(self, line: str) -> str:
        """Have it do a line; what it says to that."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def await_begun(self, count: int) -> None:
        """Until that many calls have begun, and the program that asks was told so: else it would ask for them again."""
        self.await_out("begun", count)
        assert self.do(f"await_begun({count})") == "ok"

    def open_gate(self) -> None:
        self._gate.close()

    def await_out(self, text: str, count: int = 1) -> list[str]:
        return self.box.await_file(self.box.path / "out", text, count).splitlines()

    def end(self) -> None:
        """Let it leave, as a web worker that is restarted does."""
        self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0

    def close(self) -> None:
        self.open_gate()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def web(box: Box) -> Iterator[Web]:
    made = Web(box)
    yield made
    made.close()


def children(box: Box) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = box.status()["children"]
    return found


def await_children(box: Box, *names: str) -> None:
    """Until the daemon knows of no others: it hears of an end a moment after it."""
    until = time.monotonic() + PATIENCE
    while (found := [child["name"] for child in children(box)]) != list(names):
        assert time.monotonic() < until, found


def test_calls_run_below_the_daemon_which_had_no_fork_server_before(box: Box, web: Web) -> None:
    master = box.start(BEAT)
    assert children(box) == []
    assert web.do("later(work, 1)") == "ok"
    web.await_out("begun")
    server, program = children(box)
    assert [server["name"], program["name"]] == ["fork server", f"background of pid {web.process.pid}"]
    assert program["state"] == "running"
    titles = box.processes()
    assert titles[program["pid"]] == f"beat: background of pid {web.process.pid}"
    assert "background: __mp_main__.work" in titles.values()
    parent = Path(f"/proc/{server['pid']}/stat").read_text().rpartition(")")[2].split()[1]
    assert int(parent) == master
    web.open_gate()
    assert web.await_out("done") == ["begun 1", "done 1"]


def test_a_failure_stands_in_the_daemons_log_with_its_traceback(box: Box, web: Web) -> None:
    box.start(BEAT)
    assert web.do("later(fail)") == "ok"
    log = box.await_log("ConnectionError: no bucket", 2)
    assert "[ERROR] background: __main__.fail failed: ConnectionError: no bucket\nTraceback" in log


def test_a_call_whose_time_is_up_is_ended_and_told_in_the_daemons_log(box: Box) -> None:
    web = Web(box, TIMEOUT="0.2")
    box.start(BEAT)
    assert web.do("later(work, 1)") == "ok"
    box.await_log("__main__.work failed: not done after 200ms")
    web.close()


def test_what_was_accepted_is_done_when_who_asked_has_ended_and_then_the_program_ends(box: Box, web: Web) -> None:
    box.start(BEAT)
    for number in range(4):
        assert web.do(f"later(work, {number})") == "ok"
    web.await_out("begun", 2)
    program = children(box)[1]["pid"]
    web.end()
    web.open_gate()
    await_end(program)
    assert sorted(line for line in web.await_out("done", 4) if "done" in line) == [f"done {n}" for n in range(4)]
    await_children(box, "fork server")


def test_a_stop_lets_the_calls_finish_that_were_taken_in_and_the_next_daemon_gets_the_next(box: Box, web: Web) -> None:
    first = box.start(BEAT)
    for number in range(4):
        assert web.do(f"later(work, {number})") == "ok"
    assert web.do("held = later.hold(work, 4)") == "ok"
    web.await_out("begun", 2)
    stopping = box.popen("kill", "beat")
    box.await_log("beat is to stop; it finishes first: __main__.work, __main__.work")
    web.open_gate()
    assert stopping.communicate(timeout=PATIENCE)[0].strip() == f"beat was stopped, pid {first}"
    assert sorted(line for line in web.await_out("done", 5) if "done" in line) == [f"done {n}" for n in range(5)]
    assert web.do("held()") == "ok"
    box.start(BEAT)
    assert web.do("later(work, 5)") == "ok"
    begun = [line for line in web.await_out("done 5") if "begun" in line]
    assert (len(begun), begun[-1]) == (6, "begun 5")  # the held one once, by the daemon that had it
    assert "lost: no call" in (box.path / "err").read_text()


def test_a_stop_kills_what_does_not_finish_in_time(box: Box, web: Web) -> None:
    box.start(BEAT, "--graceful-timeout", "0.3")
    assert web.do("later(work, 1)") == "ok"
    web.await_out("begun")
    assert box.call("kill", "beat").returncode == 0
    box.await_log("killed: pid")


def test_with_a_daemon_that_is_killed_all_is_gone_and_what_had_not_begun_goes_to_the_next(box: Box, web: Web) -> None:
    master = box.start(BEAT)
    for number in range(4):
        assert web.do(f"later(work, {number})") == "ok"
    web.await_begun(2)
    below = box.processes().keys() - {web.process.pid}
    os.kill(master, signal.SIGKILL)
    for pid in below:
        await_end(pid)
    web.open_gate()
    assert web.do("later(work, 4)").startswith("ForkServerLost background: hand calls to the daemon beat: ask")
    assert "ERROR background: its server has ended; lost: __main__.work, __main__.work" in box.await_file(
        box.path / "err", "lost:"
    )


def test_what_was_not_begun_is_kept_while_no_daemon_runs_and_given_to_the_next(box: Box, web: Web) -> None:
    master = box.start(BEAT)
    for number in range(4):
        assert web.do(f"later(work, {number})") == "ok"
    assert web.do("begin = later.hold(work, 4)") == "ok"
    web.await_begun(2)
    below = box.processes().keys() - {web.process.pid}
    os.kill(master, signal.SIGKILL)
    for pid in below:
        await_end(pid)
    web.open_gate()
    assert web.do("begin()").startswith("ForkServerLost")
    assert web.do("later(work, 'never accepted')").startswith("ForkServerLost")
    assert web.do("print(later.drain(1))").startswith("False")
    assert web.process.stdout is not None
    assert web.process.stdout.readline() == "ok\n"
    box.start(BEAT)
    assert web.do("later(work, 5)") == "ok"
    lines = web.await_out("done", 4)
    assert sorted(line for line in lines if "done" in line) == ["done 2", "done 3", "done 4", "done 5"]


def test_a_stop_refuses_what_comes_late_and_leaves_with_its_owner_what_it_did_not_begin(box: Box, web: Web) -> None:
    box.start(BEAT, "--graceful-timeout", "5")  # within that one more is asked for
    for number in range(4):
        assert web.do(f"later(work, {number})") == "ok"
    web.await_begun(2)
    stopping = box.popen("kill", "beat")
    box.await_log("beat is to stop; it finishes first: ")
    assert "takes no more calls, for the daemon stops" in web.do("later(work, 'late')")
    stopping.communicate(timeout=PATIENCE)
    web.open_gate()
    box.start(BEAT)
    assert web.do("later(work, 4)") == "ok"
    lines = web.await_out("done", 3)
    assert sorted(line for line in lines if "done" in line) == ["done 2", "done 3", "done 4"]
    assert "lost: __main__.work, __main__.work" in (box.path / "err").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to be somebody else")
def test_a_socket_of_another_users_is_not_spoken_to(open_box: Box) -> None:
    box = open_box
    web = Web(box)
    program = f"""
import os, socket, sys
os.seteuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.bind({str(box.run_dir / "beat.sock")!r})
sock.listen()
print("listening", flush=True)
sys.stdin.read()
"""
    box.run_dir.chmod(0o777)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listening\n"
        assert "a process of user 65534 listens there, not one of user 0" in web.do("later(work, 1)")
        other.communicate()
    web.close()
    box.run_dir.chmod(0o755)
    (box.run_dir / "beat.sock").unlink()


def test_no_daemon_no_name_and_no_such_socket_are_each_told_in_a_sentence(box: Box, web: Web) -> None:
    assert web.do("later(work, 1)").endswith("does it run?")
    assert web.do("Background(start='daemon')") == 'UsageError start="daemon": say which with daemon="NAME"'
    assert web.do("Background(start='daemon', daemon=5)").startswith("UsageError")
    assert "name a daemon '../x'" in web.do("Background(start='daemon', daemon='../x')")
    assert (
        web.do("Background(daemon='beat')")
        == "UsageError start='server': daemon= and run_dir= are for start=\"daemon\""
    )


def test_what_comes_with_a_request_that_does_not_want_it_is_closed(box: Box) -> None:
    pid = box.start(BEAT)
    path = str(box.run_dir / "beat.sock")
    ask = functools.partial(asking.ask, path, timeout=PATIENCE)
    refused = '"pid" must be the number of who asks, and a socket must come with the request'
    assert ask({"do": "background", "pid": 1})["error"] == refused
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as null:
        assert ask({"do": "background", "pid": "x"}, fds=[theirs.fileno()])["error"] == refused
        assert ask({"do": "background", "pid": 1}, fds=[null.fileno()])["error"] == refused
        assert ask({"do": "status"}, fds=[theirs.fileno()])["ok"]
        theirs.close()
        ours.settimeout(PATIENCE)
        assert ours.recv(1) == b""  # nobody has it any more
    assert children(box) == []
    assert box.pid() == pid


def test_a_program_that_is_told_nothing_sensible_ends_and_the_daemon_goes_on(box: Box) -> None:
    pid = box.start(BEAT)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        path = str(box.run_dir / "beat.sock")
        assert asking.ask(path, {"do": "background", "pid": 1}, fds=[theirs.fileno()], timeout=PATIENCE)["ok"]
        ours.sendall(b"x" * 100)
        box.await_log("background of pid 1: pid ")
    assert box.pid() == pid
