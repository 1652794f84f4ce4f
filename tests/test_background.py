"""background(): accepted at once, done by processes that are nobody's children and outlive whoever asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Box, await_end

JOBS = """
import fcntl, os, signal, subprocess, sys, threading, time

def note(path, *words):
    with open(path, "a") as file:
        file.write(" ".join(map(str, words)) + chr(10))

def gated(gate, path, name):
    note(path, "begun", name, os.getpid())
    with open(gate) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    note(path, "done", name)

async def coroutine():
    pass

def generator(number):
    yield number

def fail():
    raise ValueError("no such bucket")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def pause(path):
    note(path, "pauses") or signal.pause()  # one line: what has told is in it

def stubborn(path):
    child = subprocess.Popen(["sleep", "600"]).pid
    while True:
        try:
            note(path, "child", child)
            signal.pause()
        except BaseException:
            note(path, "ignored")

def nonsense():
    for fd in range(3, 64):
        for kind in range(8):
            try:
                os.write(fd, bytes([kind, 0]) + bytes(8) + b"nonsense")
            except OSError:
                pass

def lock():
    return threading.Lock()

def leave(code):
    sys.exit(code)

def facts(path):
    threads = len(os.listdir("/proc/self/task"))
    stdin = os.readlink("/proc/self/fd/0")
    note(path, "facts", os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0), stdin, threads)
    for fd in os.listdir("/proc/self/fd"):
        try:
            note(path, "fd", fd, os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass

def command(path):
    with open("/proc/self/cmdline") as file:
        note(path, "daemonkit.processes.freshcall" in sys.modules, file.read().rstrip(chr(0)))

def chain(path):
    from daemonkit import background
    background(note, path, "second")
    note(path, "first")
"""

HEAD = """
import contextlib, fcntl, functools, logging, os, select, signal, socket, sys, threading
import jobs
from daemonkit import Background, background
from daemonkit.core.inotify import wait_until
from daemonkit.errors import BackgroundFull
logging.basicConfig(format="%(message)s")
out = "out"
gate = os.open("gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)

def parent(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])

def state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]

def first_pid():
    with contextlib.suppress(FileNotFoundError), open(out) as file:
        line = file.readline()
        return int(line.split()[-1]) if line.endswith(chr(10)) else None

def fork_server():  # of the first call that has begun; and it has told so, for it sleeps again
    pid = parent(wait_until(".", first_pid, 30))
    while state(pid) != "S":
        os.sched_yield()
    return pid

def await_begun(later):  # until its server has told us that the first call has begun
    server = later._server
    while all(asked.request for asked in server._open.values()):
        assert select.select([server.wire], [], [], 30)[0]
        server.hear()

def kill(pid):  # and wait until it has ended, and the first call with it
    pidfds = [os.pidfd_open(each) for each in (pid, first_pid())]
    os.kill(pid, signal.SIGKILL)
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)
"""


def environ(box: Box) -> dict[str, str]:
    """The box's; titles must not write over it, or the box would not know whose a process is (setproctitle)."""
    return {**box.environ, "SPT_NOENV": "1"}


def run(box: Box, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a program that may use jobs.py; its asked work is done when this returns, for that holds its stderr."""
    (box.path / "jobs.py").write_text(JOBS)
    (box.path / "program.py").write_text(HEAD + program)
    return subprocess.run(
        [sys.executable, "-W", "error", *options, str(box.path / "program.py")],
        env=environ(box),
        cwd=box.path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def out(box: Box) -> list[str]:
    path = box.path / "out"
    return path.read_text().splitlines() if path.exists() else []


def succeed(box: Box, program: str, *options: str) -> list[str]:
    """What a program prints that has nothing to complain of, nor has its work."""
    done = run(box, program, *options)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.splitlines()


@pytest.mark.parametrize("start", ["server", "spawn"])
def test_what_was_accepted_is_done_after_its_process_has_ended(box: Box, start: str) -> None:
    succeed(
        box,
        f"""
fcntl.flock(gate, fcntl.LOCK_EX)  # until this process has ended
later = Background(2, start={start!r})
for number in range(5):
    later(jobs.gated, "gate", out, number)
""",
    )
    assert sorted(line.split()[1] for line in out(box) if line.startswith("done")) == list("01234")


def test_what_was_accepted_is_done_after_its_process_was_killed(box: Box) -> None:
    done = run(box, 'background(jobs.note, out, "here")\nos.kill(os.getpid(), signal.SIGKILL)')
    assert done.returncode == -9
    assert out(box) == ["here"]


def test_calls_are_begun_in_order_and_no_more_at_once_than_may(box: Box) -> None:
    succeed(box, 'later = Background(2)\nfor number in range(40): later(jobs.gated, "gate", out, number)')
    running = 0
    for line in out(box):
        running += 1 if line.startswith("begun") else -1
        assert 0 <= running <= 2
    assert len(out(box)) == 80


def test_the_caller_never_has_a_child_and_its_sigchld_is_its_own(box: Box) -> None:
    assert succeed(
        box,
        """
background(jobs.note, out, "one")
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError as error:
    print("no child")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # or a handler that reaps all: the server comes up all the same
again = Background()
again(jobs.note, out, "two")
""",
    ) == ["no child"]
    assert sorted(out(box)) == ["one", "two"]


def test_the_call_has_nothing_of_the_caller_but_its_output(box: Box) -> None:
    stdout = succeed(
        box,
        """
listening = socket.create_server(("127.0.0.1", 0))
listening.set_inheritable(True)  # as gunicorn has it
with socket.create_connection(listening.getsockname()) as one, listening.accept()[0] as other:
    other.set_inheritable(True)
    os.set_inheritable(gate, True)
    background(jobs.facts, out)
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            print(os.readlink(f"/proc/self/fd/{fd}"))
print(os.getpid(), os.getpgid(0), os.getsid(0))
listening.close()
""",
    )
    ours = {line for line in stdout if line.startswith("socket:")}
    assert len(ours) >= 3
    facts = next(line.split() for line in out(box) if line.startswith("facts"))
    pid, group, session = stdout[-1].split()
    assert pid not in facts
    assert group != facts[3]
    assert session != facts[4]
    assert facts[5:] == ["/dev/null", "1"]
    fds = [line.split(maxsplit=2) for line in out(box) if line.startswith("fd")]
    assert len(fds) == 4  # three streams, and its way to tell what comes of it
    assert not ours & {where for _, fd, where in fds}


def test_a_failure_is_told_on_stderr_with_time_pid_name_and_traceback(box: Box) -> None:
    done = run(box, "background(jobs.fail)")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("[20")
    assert "] [ERROR] background: jobs.fail failed: ValueError: no such bucket" in first
    assert 'raise ValueError("no such bucket")' in "".join(rest)


def test_each_of_many_failures_is_told_with_its_pid(box: Box) -> None:
    done = run(box, "[background(jobs.leave, 3) for _ in range(100)]")
    pids = [line.split()[3] for line in done.stderr.splitlines() if "[ERROR] background: jobs.leave" in line]
    assert len(pids) == 100
    assert all(pid.strip("[]").isdecimal() for pid in pids), pids


def test_a_call_that_writes_nonsense_into_all_that_is_open_takes_no_other_with_it(box: Box) -> None:
    done = run(
        box,
        """
later = Background(2)
fcntl.flock(gate, fcntl.LOCK_EX)
later(jobs.gated, "gate", out, "one")
later(jobs.nonsense)
later(jobs.note, out, "another")

def another():
    with contextlib.suppress(FileNotFoundError), open(out) as file:
        return "another" in file.read() or None

wait_until(".", another, 30)
""",
    )
    assert done.stderr == ""
    *first, last = [line.split()[0] for line in out(box)]
    assert (sorted(first), last) == (["another", "begun"], "done")


def test_a_call_that_is_killed_is_told(box: Box) -> None:
    done = run(box, 'background(jobs.die)\nbackground(jobs.note, out, "next")')
    assert "background: jobs.die failed: pid" in done.stderr
    assert "killed by SIGKILL" in done.stderr
    assert out(box) == ["next"]


def test_a_result_that_cannot_be_pickled_and_an_exit_with_0_are_no_failures(box: Box) -> None:
    succeed(box, "background(jobs.lock)\nbackground(jobs.leave, 0)\nbackground(jobs.leave, None)")


def test_an_exit_with_another_code_is_a_failure(box: Box) -> None:
    assert "jobs.leave failed: SystemExit: 3" in run(box, "background(jobs.leave, 3)").stderr


def overdue(box: Box, call: str, options: str = "") -> tuple[str, int]:
    """The stderr of a call whose time is up, and that time; it has more if it has not written a word by then."""
    for seconds in (2, 8, 32):
        done = run(box, f"Background(timeout={seconds}{options}){call}")
        if out(box):
            return done.stderr, seconds
    raise AssertionError(f"no call has come so far within its time; {done.stderr}")


@pytest.mark.parametrize("start", ["server", "spawn"])
def test_a_call_whose_time_is_up_is_told_where_it_was(box: Box, start: str) -> None:
    stderr, seconds = overdue(box, "(jobs.pause, out)", f", start={start!r}")
    assert f"jobs.pause failed: not done after {seconds}s" in stderr
    assert "signal.pause()" in stderr


def test_a_time_as_text_is_one_too(box: Box) -> None:
    assert "jobs.pause failed: not done after 200ms" in run(box, "Background(timeout='200ms')(jobs.pause, out)").stderr


def test_a_call_that_will_not_end_is_killed_with_all_that_it_has_started(box: Box) -> None:
    stderr, seconds = overdue(box, "(jobs.stubborn, out)")
    assert f"jobs.stubborn failed: not done after {seconds}s; pid" in stderr
    assert "killed by SIGKILL" in stderr
    assert out(box).count("ignored") == 1
    [pid] = {int(line.split()[1]) for line in out(box) if line.startswith("child")}
    await_end(pid)


def test_a_term_that_is_sent_to_all_ends_nothing_that_was_accepted(box: Box) -> None:
    (box.path / "out").touch()
    program = 'fcntl.flock(gate, fcntl.LOCK_EX)\nbackground(jobs.gated, "gate", out, 1)\nsys.stdin.read()'
    (box.path / "jobs.py").write_text(JOBS)
    (box.path / "program.py").write_text(HEAD + program)
    with subprocess.Popen(
        [sys.executable, str(box.path / "program.py")], env=environ(box), cwd=box.path, stdin=subprocess.PIPE
    ) as process:
        box.await_file(box.path / "out", "begun")
        theirs = box.processes().keys() - {process.pid}
        assert len(theirs) == 3  # the detached one, the fork server, the call
        for pid in theirs:
            os.kill(pid, signal.SIGTERM)
        process.communicate()
    box.await_file(box.path / "out", "done")
    for pid in box.processes():
        await_end(pid)


def test_one_more_than_may_wait_is_refused_and_accepted_when_there_is_room(box: Box) -> None:
    assert succeed(
        box,
        """
later = Background(1, max_pending=2)
fcntl.flock(gate, fcntl.LOCK_EX)
for number in range(3):
    later(jobs.gated, "gate", out, number)
try:
    later(jobs.gated, "gate", out, 3)
except BackgroundFull as error:
    print(error)
fcntl.flock(gate, fcntl.LOCK_UN)
print(later.drain(30))
later(jobs.note, out, "accepted")
""",
    ) == ["background(jobs.gated): 3 calls are waiting or running already", "True"]
    assert [line for line in out(box) if not line.startswith("begun")] == ["done 0", "done 1", "done 2", "accepted"]


def test_a_held_call_begins_when_it_is_released_and_others_pass_it(box: Box) -> None:
    succeed(
        box,
        """
later = Background(1)
begin = later.hold(jobs.note, out, "held")
later(jobs.gated, "gate", out, "passed")
later.hold(jobs.note, out, "never released: begins when the process has ended")
fcntl.flock(gate, fcntl.LOCK_EX)
begin()
begin()  # once is enough
""",
    )
    assert [line for line in out(box) if not line.startswith("begun")] == [
        "done passed",
        "held",
        "never released: begins when the process has ended",
    ]


def test_what_cannot_be_meant_or_pickled_is_told_to_the_caller(box: Box) -> None:
    told = succeed(
        box,
        """
def tell(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        print(type(error).__name__, error)
tell(background, 3)
tell(background, jobs.note, threading.Lock())
tell(Background, 0)
tell(Background, max_pending=-1)
tell(Background, timeout=0)
tell(Background, start="thread")
tell(background, jobs.coroutine)
tell(background, functools.partial(jobs.generator, 1))
""",
    )
    assert told[0] == "UsageError background(3): give it a function, and its arguments after it"
    assert told[1].startswith("TypeError cannot pickle '_thread.lock' object")
    assert told[2] == "UsageError max_workers=0 must be a whole number, 1 or more"
    assert told[3] == "UsageError max_pending=-1 must be a whole number, 1 or more"
    assert "timeout" in told[4]
    assert told[5] == "UsageError start='thread' is not one of server, spawn, daemon"
    assert told[6].startswith("UsageError background(jobs.coroutine): it is async")
    assert told[7].startswith("UsageError background(functools.partial): it is a generator")


def test_a_function_of_the_main_script_can_be_called(box: Box) -> None:
    succeed(
        box,
        """
def own(word):
    jobs.note(out, word)
if __name__ == "__main__":
    background(own, "mine")
""",
    )
    assert out(box) == ["mine"]


def test_a_large_argument_arrives_whole(box: Box) -> None:
    succeed(box, 'background(jobs.note, out, "x" * 10_000_000)')
    assert [len(line) for line in out(box)] == [10_000_000]


def test_a_spawned_call_has_an_interpreter_of_its_own(box: Box) -> None:
    succeed(box, 'Background(start="spawn")(jobs.command, out)\nBackground()(jobs.command, out)')
    assert sorted(out(box)) == ["False background: jobs.command", "True background: jobs.command"]


def test_a_call_may_ask_for_another_which_is_done_too(box: Box) -> None:
    succeed(box, "background(jobs.chain, out)")
    assert sorted(out(box)) == ["first", "second"]


def test_a_fork_has_a_server_of_its_own_and_leaves_its_parents_alone(box: Box) -> None:
    stdout = succeed(
        box,
        """
later = Background()
later(jobs.facts, out)
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(writer)
    later(jobs.facts, out)
    os.read(reader, 1)  # lives on
    os._exit(0)
os.close(reader)
print(later.drain(30))  # though the child is there
os.close(writer)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
""",
    )
    assert stdout == ["True", "0"]
    fork_servers = {line.split()[2] for line in out(box) if line.startswith("facts")}
    assert len(fork_servers) == 2


def test_threads_may_ask_at_once(box: Box) -> None:
    succeed(
        box,
        """
def ask(number):
    for _ in range(20):
        background(jobs.note, out, number)
threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
    )
    assert sorted(out(box)) == sorted(str(number) for number in range(10) for _ in range(20))


def test_when_the_server_is_killed_what_was_not_begun_goes_to_the_next_and_the_rest_is_told(box: Box) -> None:
    done = run(
        box,
        """
later = Background(1)
fcntl.flock(gate, fcntl.LOCK_EX)
later(jobs.gated, "gate", out, "begun one")
later(jobs.note, out, "waiting one")
await_begun(later)
kill(parent(fork_server()))
later(jobs.note, out, "later one")
""",
    )
    assert done.stderr == "background: its server has ended; lost: jobs.gated\n"
    assert [line.split(maxsplit=1)[0] for line in out(box)] == ["begun", "waiting", "later"]


def test_when_the_fork_server_is_killed_what_waits_is_done_and_the_rest_is_told(box: Box) -> None:
    done = run(
        box,
        """
later = Background(1)
fcntl.flock(gate, fcntl.LOCK_EX)
later(jobs.gated, "gate", out, "begun one")
later(jobs.note, out, "waiting one")
kill(fork_server())
""",
    )
    assert "jobs.gated is lost: the fork server, pid " in done.stderr
    assert done.stderr.count("ERROR") == 1
    assert [line.split(maxsplit=1)[0] for line in out(box)] == ["begun", "waiting"]


def test_what_waits_is_done_when_there_is_room_for_another_fork_server(box: Box) -> None:
    run(
        box,
        """
import resource
os.dup2(os.open("err", os.O_RDWR | os.O_CREAT | os.O_APPEND), 2)

def found(words, path):
    with open(path) as file:
        return words in file.read() or None

later = Background(1)
fcntl.flock(gate, fcntl.LOCK_EX)
later(jobs.gated, "gate", out, "begun one")
later(jobs.note, out, "waiting one")
server = fork_server()
backlog = parent(server)
usual = resource.prlimit(backlog, resource.RLIMIT_NOFILE)
resource.prlimit(backlog, resource.RLIMIT_NOFILE, (1, usual[1]))
kill(server)
assert wait_until(".", lambda: found("start a fork server: Too many open files; tried again", "err"), 30)
resource.prlimit(backlog, resource.RLIMIT_NOFILE, usual)
assert wait_until(".", lambda: found("waiting one", out), 30)
""",
    )
    assert out(box)[-1] == "waiting one"


def test_a_server_that_cannot_start_is_told_to_the_caller(box: Box, tmp_path: Path) -> None:
    done = run(box, f"import shutil\nsys.executable = {str(tmp_path / 'none')!r}\nbackground(len, 'x')")
    assert "FileNotFoundError" in done.stderr
    done = run(box, "sys.executable = '/bin/false'\nbackground(len, 'x')")
    assert "ForkServerLost: background: its server could not be started, status 1; see stderr" in done.stderr
