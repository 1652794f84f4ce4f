"""Who may do what: other users, and whoever speaks nonsense to the control socket (FAULTS, rows 35 and 36)."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, Box

import daemonkit
from daemonkit.cli import call
from daemonkit.control import MAX_REQUEST

STRANGER = 65534  # a user who has an account
QUIET = "@on('start')\ndef begin(): pass\n"
WITNESS = "open({marker!r}, 'w').close()\n" + QUIET  # leaves a trace if it is ever run
MEGABYTE = 1 << 20

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="is several users")


@pytest.fixture
def open_box() -> Iterator[Box]:
    """A box that every user may enter, unlike pytest's own directories."""
    path = Path(tempfile.mkdtemp(prefix="box-"))
    path.chmod(0o755)
    made = Box(path)
    made.environ["SPT_NOENV"] = "1"  # a process title would overwrite the environment, by which a box finds its own
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(path)


@pytest.fixture
def victim() -> Iterator[int]:
    """A process that nobody may signal."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    yield pid
    os.close(writer)
    assert os.waitpid(pid, 0)[1] == 0, "it was signalled"


def as_stranger(act: Callable[[], Any]) -> str:
    """What ``act``, called by another user in a process of his own, returned or raised, as text."""
    _load_everything()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            said = repr(act())
        except BaseException:  # noqa: BLE001 - told to the parent
            said = traceback.format_exc()
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


def command_of_stranger(box: Box, *args: str) -> str:
    """Exit code and output of ``daemonkit ARGS``, given by another user."""

    def act() -> tuple[int, str]:
        os.environ.clear()
        os.environ |= {"DAEMONKIT_RUN_DIR": str(box.run_dir), "HOME": "/nonexistent"}
        sys.stdout = sys.stderr = output = io.StringIO()
        return call(list(args), None, "daemonkit"), output.getvalue()

    return as_stranger(act)


def _load_everything() -> None:
    """The interpreter's own directory may be closed to others; so all that a command imports is there before."""
    for module in pkgutil.walk_packages(daemonkit.__path__, "daemonkit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("difflib", "json", "tomllib", "grp", "click.shell_completion", "click._compat", "click._textwrap"):
        importlib.import_module(name)


def traces_of(*roots: Path) -> dict[str, tuple[object, ...]]:
    """Everything below ``roots`` that a write, a removal or a change of owner would alter."""
    found: dict[str, tuple[object, ...]] = {}
    for root in roots:
        for path in (root, *root.rglob("*")):
            status = path.lstat()
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path)] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_ino,
                status.st_mtime_ns,
                content,
            )
    return found


def owned(path: Path, uid: int = STRANGER) -> Path:
    os.chown(path, uid, uid, follow_symlinks=False)
    return path


@pytest.fixture
def lair(open_box: Box) -> Path:
    """A directory of another user's."""
    path = open_box.path / "lair"
    path.mkdir()
    return owned(path)


def is_one_sentence(said: str) -> bool:
    return said.startswith("daemonkit: ") and said.count("\n") == 1 and "Traceback" not in said


# Row 35: the control socket

COUNTED = "@every(3600)\ndef work(): log.info('the job ran')\n@on('reload')\ndef again(): log.info('reloaded it')\n"


@needs_root
def test_row_35_another_user_cannot_connect_to_the_control_socket(open_box: Box) -> None:
    open_box.start(COUNTED)
    path = open_box.run_dir / "beat.sock"
    assert path.lstat().st_mode & 0o777 == 0o600

    def knock() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))

    assert "PermissionError" in as_stranger(knock)


@needs_root
def test_row_35_another_user_who_can_connect_is_not_heard(open_box: Box) -> None:
    open_box.start(COUNTED)
    path = open_box.run_dir / "beat.sock"
    path.chmod(0o666)

    def speak() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(path))
            try:
                sock.sendall(b'{"do": "trigger", "job": "work"}\n')
                return sock.recv(100)
            except (BrokenPipeError, ConnectionResetError):
                return b""

    assert as_stranger(speak) == "b''"
    assert open_box.job("work")["runs"] == 0


@needs_root
@pytest.mark.parametrize(
    "args",
    [("kill", "beat"), ("trigger", "beat", "work"), ("reload", "beat"), ("pause", "beat"), ("reexec", "beat"),
     ("restart", "beat"), ("jobs", "beat")],
    ids=lambda args: str(args[0]),
)  # fmt: skip
def test_row_35_a_command_of_another_user_is_refused_and_does_nothing(open_box: Box, args: tuple[str, ...]) -> None:
    pid = open_box.start(COUNTED)
    before = traces_of(open_box.run_dir), open_box.log.read_bytes()
    said = command_of_stranger(open_box, *args)
    assert said.startswith("(4, 'daemonkit: "), said
    assert "belongs to another user" in said
    assert (traces_of(open_box.run_dir), open_box.log.read_bytes()) == before
    status = open_box.status()
    assert (status["pid"], status["jobs"][0]["runs"], status["jobs"][0]["state"]) == (pid, 0, "waiting")


@needs_root
def test_row_35_another_user_may_ask_whether_it_runs_and_no_more(open_box: Box) -> None:
    pid = open_box.start(COUNTED)
    said = command_of_stranger(open_box, "status", "beat")
    assert said.startswith("(0, ")
    assert f"pid {pid}" in said
    assert "work" not in said


@needs_root
def test_row_35_another_user_cannot_become_root_by_an_option(open_box: Box) -> None:
    marker, path = open_box.path / "ran", open_box.path / "his"
    path.mkdir(mode=0o700)
    owned(path)
    script = open_box.script(WITNESS.format(marker=str(marker)))
    said = command_of_stranger(open_box, "start", "--user", "root", "--run-dir", str(path), str(script))
    assert said.startswith("(1, 'daemonkit: become user root"), said
    assert not marker.exists()
    assert list(path.iterdir()) == []


# Row 35: what is planted for root to fall over


def plant(lair: Path, what: str, secret: Path, marker: Path) -> None:
    """Put ``what`` where a run directory would have the daemon's files."""
    if what == "pid file of init":
        (lair / "beat.pid").write_text("1\n")
        owned(lair / "beat.pid")
    elif what == "empty pid file":
        (lair / "beat.pid").touch()
        owned(lair / "beat.pid")
    elif what == "pid symlink":
        (lair / "beat.pid").symlink_to(secret)
    elif what == "pid fifo":
        os.mkfifo(lair / "beat.pid")
    elif what == "pid hard link":
        os.link(secret, lair / "beat.pid")
    elif what == "pid directory":
        (lair / "beat.pid").mkdir()
    elif what == "socket symlink":
        (lair / "beat.sock").symlink_to(secret)
    elif what == "dangling symlink":
        (lair / "beat.pid").symlink_to(marker)


PLANTS = ["nothing", "pid file of init", "empty pid file", "pid symlink", "pid fifo", "pid hard link", "pid directory",
          "socket symlink", "dangling symlink"]  # fmt: skip


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777], ids=oct)
def test_row_35_a_run_directory_that_others_may_write_is_refused_untouched(open_box: Box, mode: int) -> None:
    secret, marker = open_box.path / "secret", open_box.path / "ran"
    secret.write_text("root's own\n")
    script = open_box.script(WITNESS.format(marker=str(marker)))
    for number, what in enumerate(PLANTS):
        lair = open_box.path / f"lair{number}"
        lair.mkdir()
        owned(lair, STRANGER if mode == 0o755 else 0)
        lair.chmod(mode)
        plant(lair, what, secret, marker)
    before = traces_of(open_box.path)
    for number, what in enumerate(PLANTS if mode == 0o755 else PLANTS[:2]):
        done = open_box.call("start", "--run-dir", open_box.path / f"lair{number}", script)
        assert done.returncode == 1, what
        assert is_one_sentence(done.stderr), (what, done.stderr)
    assert traces_of(open_box.path) == before
    assert not marker.exists()


@needs_root
def test_row_35_a_run_directory_that_is_another_users_symlink_is_refused(open_box: Box, lair: Path) -> None:
    (lair / "run").symlink_to(open_box.run_dir)
    owned(lair / "run")
    before = traces_of(lair)
    done = open_box.call("start", "--run-dir", lair / "run", open_box.script(QUIET))
    assert done.returncode == 1
    assert is_one_sentence(done.stderr), done.stderr
    assert traces_of(lair) == before
    assert list(open_box.run_dir.iterdir()) == []


@needs_root
@pytest.mark.parametrize("what", PLANTS[3:])
def test_row_35_kill_and_status_do_not_follow_what_is_planted(open_box: Box, lair: Path, what: str) -> None:
    secret, marker = open_box.path / "secret", open_box.path / "ran"
    secret.write_text("1\n")
    plant(lair, what, secret, marker)
    before = traces_of(secret)
    for command in ("status", "kill", "reload"):
        done = open_box.call(command, "--run-dir", lair, "beat")
        assert done.returncode in (1, 3, 4, 7, 0), (command, done)
        assert "Traceback" not in done.stderr
        assert "running, pid" not in done.stdout
        assert "was stopped" not in done.stdout
    assert traces_of(secret) == before
    assert not marker.exists()


@needs_root
@pytest.mark.parametrize("locked", [False, True], ids=["unlocked", "locked"])
def test_row_35_a_planted_number_of_an_innocent_process_is_never_signalled(
    open_box: Box, lair: Path, victim: int, locked: bool
) -> None:
    path = lair / "beat.pid"
    path.write_text(f"{victim}\n")
    owned(path)
    with path.open("r+") as file, socket.socket(socket.AF_UNIX) as listener:
        if locked:
            fcntl.flock(file, fcntl.LOCK_EX)
        listener.bind(str(lair / "beat.sock"))
        listener.listen()
        status = open_box.call("status", "--run-dir", lair, "beat")
        assert status.returncode == (4 if locked else 1)
        assert "running, pid" not in status.stdout
        done = open_box.call("kill", "--timeout", "1", "--run-dir", lair, "beat", timeout=PATIENCE)
        assert done.returncode == (4 if locked else 1)  # somebody listens: who, is not known
        assert is_one_sentence(done.stderr), done.stderr
    assert Path(f"/proc/{victim}").exists()


@needs_root
def test_row_35_a_planted_socket_is_not_taken_for_the_daemons(open_box: Box) -> None:
    """A run directory that became writable after the start: who listens is not who holds the PID file."""
    pid = open_box.start(COUNTED)
    path = open_box.run_dir / "beat.sock"
    os.kill(pid, signal.SIGSTOP)  # or it would put its own socket back at once
    path.unlink()
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(str(path))
        impostor.listen()
        done = open_box.call("trigger", "beat", "work")
        assert done.returncode == 1
        assert is_one_sentence(done.stderr), done.stderr
        assert f"pid {os.getpid()} listens there, not the daemon, pid {pid}" in done.stderr
    path.unlink()
    os.kill(pid, signal.SIGCONT)
    assert open_box.call("kill", "beat").returncode == 0


# Row 35: configuration, script, log


@needs_root
@pytest.mark.parametrize("mode", ["his", "everybody's", "a link to his", "in his directory"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_row_35_a_planted_configuration_is_refused(open_box: Box, lair: Path, mode: str, named: bool) -> None:
    marker = open_box.path / "ran"
    script = open_box.script(WITNESS.format(marker=str(marker)))
    etc = open_box.path / "etc"
    etc.mkdir()
    path = (lair if mode == "in his directory" else etc) / "daemonkit.toml"
    text = f"[daemon]\nlog = '{open_box.path / 'elsewhere.log'}'\n"
    if mode == "a link to his":
        (lair / "x.toml").write_text(text)
        path.symlink_to(owned(lair / "x.toml"))
    else:
        path.write_text(text)
    if mode == "his":
        owned(path)
    if mode == "everybody's":
        path.chmod(0o666)
    if mode == "in his directory" and not named:
        etc.rmdir()
        etc.symlink_to(lair)
    before = traces_of(open_box.path)
    del open_box.environ["DAEMONKIT_LOG"]
    for command in ("start", "check"):
        option = ["--config", str(path)] if named else []
        done = open_box.call(command, *option, script)
        assert done.returncode == 1, (command, done)
        assert is_one_sentence(done.stderr), done.stderr
        assert "daemonkit.toml" in done.stderr
    assert traces_of(open_box.path) == before
    assert not marker.exists()


@needs_root
@pytest.mark.parametrize("command", ["start", "run", "restart", "check", "timetable"])
@pytest.mark.parametrize("mode", ["his", "everybody's", "a link to his", "in his directory"])
def test_row_35_a_planted_script_is_not_run(open_box: Box, lair: Path, mode: str, command: str) -> None:
    marker = open_box.path / "ran"
    made = open_box.script(WITNESS.format(marker=str(marker)))
    path = made
    if mode == "his":
        owned(path)
    elif mode == "everybody's":
        path.chmod(0o646)
    elif mode == "a link to his":
        os.rename(path, lair / "x.py")
        path.symlink_to(owned(lair / "x.py"))
    else:
        path = lair / "beat.py"
        os.rename(made, path)
    before = traces_of(open_box.path)
    done = open_box.call(command, path)
    assert done.returncode == 1, done
    assert is_one_sentence(done.stderr), done.stderr
    assert str(path) in done.stderr
    assert not marker.exists()
    assert traces_of(open_box.path) == before


def test_a_log_that_is_a_directory_is_told(box: Box) -> None:
    done = box.call("start", "--log", box.run_dir, box.script(""))
    assert done.returncode == 1
    assert done.stderr == f"daemonkit: open the log {box.run_dir}: Is a directory; name another with --log\n"


@needs_root
@pytest.mark.parametrize("what", ["symlink", "dangling symlink", "fifo"])
def test_row_35_a_planted_log_is_refused_untouched(open_box: Box, lair: Path, what: str) -> None:
    secret, log, marker = open_box.path / "secret", lair / "beat.log", open_box.path / "ran"
    secret.write_text("root's own\n")
    if what == "fifo":
        os.mkfifo(log)
    else:
        log.symlink_to(secret if what == "symlink" else open_box.path / "new")
    owned(log)
    before = traces_of(secret, lair)
    done = open_box.call("start", "--log", log, "--user", "nobody", open_box.script(WITNESS.format(marker=str(marker))))
    assert done.returncode == 1
    assert is_one_sentence(done.stderr), done.stderr
    assert f"open the log {log}" in done.stderr
    assert traces_of(secret, lair) == before
    assert not (open_box.path / "new").exists()
    assert not marker.exists()
    assert list(open_box.run_dir.iterdir()) == []


@needs_root
@pytest.mark.parametrize("lie", ["target", "log"])
def test_row_35_a_daemon_without_privileges_cannot_tell_root_what_to_restart(open_box: Box, lie: str) -> None:
    """Whoever has taken over a daemon that had dropped root must not get it back from `restart NAME`."""
    box = open_box
    marker, secret = box.path / "ran", box.path / "secret"
    secret.write_text("root's own\n")
    text = """
        from daemonkit.master import requests
        lies = {
            "target": {"target": "timeit", "is_module": True, "args": ["-n1", "-r1", f"open({sys.argv[1]!r}, 'w')"],
                       "command_line": {}},
            "log": {"command_line": {"log": sys.argv[2], "user": "nobody"}},
        }

        @on("SIGUSR2")
        def turn_evil():
            honest = requests._REQUESTS["launch"]
            requests._REQUESTS["launch"] = lambda *args: {**honest(*args), **lies[sys.argv[3]]}
            log.info("evil; end")
        """
    path = box.script(text)
    assert box.call("start", "--user", "nobody", path, marker, secret, lie).returncode == 0
    pid = box.pid()
    assert pid
    os.kill(pid, signal.SIGUSR2)
    box.await_log("evil; end")
    before = traces_of(secret)
    done = box.call("restart", "beat")
    assert not marker.exists()
    assert traces_of(secret) == before
    assert done.returncode in (1, 4)
    assert is_one_sentence(done.stderr), done.stderr
    assert box.pid() == pid


# Row 36: hostile frames

INTERVAL = 2.0  # seconds: less than an attack that holds it up, more than a busy machine does
TICKING = f"""
    @every({INTERVAL})
    def tick():
        with open(sys.argv[1], "a") as file:
            file.write("tick\\n")
    """


class Target:
    """A daemon under attack, and what it must still be able to do."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.ticks = box.path / "ticks"
        box.environ["SPT_NOENV"] = "1"

    def start(self, **options: Any) -> Target:
        done = self.box.call("start", self.box.script(TICKING), self.ticks, **options)
        assert done.returncode == 0, done.stderr
        pid = self.box.pid()
        assert pid
        self.pid = pid
        self.ask(b'{"do": "status"}\n')
        self.memory = self.resident()
        return self

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.box.run_dir / "beat.sock"))  # waits if too many others do; with a time-out it would not
        sock.settimeout(PATIENCE)
        return sock

    def ask(self, request: bytes) -> Any:
        """The answer to one line; None if we were hung up on."""
        with self.connect() as sock:
            try:
                sock.sendall(request)
                line = sock.makefile("rb").readline()
            except (BrokenPipeError, ConnectionResetError):
                return None
        return json.loads(line) if line else None

    def resident(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def processor_time(self) -> float:
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def ticks_on(self) -> None:
        """The next tick comes; none was missed so far; little memory was taken; the command answers."""
        seen = self.ticks.read_text().count("tick") if self.ticks.exists() else 0
        self.box.await_file(self.ticks, "tick", seen + 1)
        status = self.box.status()
        assert (status["pid"], status["state"]) == (self.pid, "running")
        job = status["jobs"][0]
        assert (job["missed"], job["failures"]) == (0, 0)
        assert job["max_lateness"] < INTERVAL
        assert self.resident() - self.memory < 16 * MEGABYTE


@pytest.fixture
def target(box: Box) -> Target:
    """A daemon that ticks."""
    return Target(box).start()


def push(sock: socket.socket, data: bytes, limit: int) -> int:
    """Send ``data`` again and again until we are hung up on, or ``limit`` bytes are sent; how many went out."""
    sent = 0
    try:
        while sent < limit:
            sent += sock.send(data)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


@pytest.mark.parametrize("data", [b"x" * 65536, b"[" * 65536, b'{"do": "' + b"y" * 65536], ids=["x", "[", "do"])
def test_row_36_an_endless_frame_is_hung_up_on(target: Target, data: bytes) -> None:
    with target.connect() as sock:
        assert push(sock, data, 256 * MEGABYTE) < 4 * MEGABYTE  # its limit, and what the kernel buffers
    target.ticks_on()


def test_row_36_an_oversized_frame_is_hung_up_on_and_one_of_the_greatest_size_is_answered(target: Target) -> None:
    frame = b'{"do": "status", "pad": "%s"}\n'
    pad = MAX_REQUEST - len(frame % b"")
    answer = target.ask(frame % (b"x" * pad))
    assert answer["pid"] == target.pid
    assert target.ask(frame % (b"x" * (pad + 1))) is None
    target.ticks_on()


def test_row_36_a_frame_that_comes_byte_by_byte_is_bounded_too(target: Target) -> None:
    with target.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        assert push(sock, b"x", 4 * MEGABYTE) < MEGABYTE
    target.ticks_on()


def test_row_36_half_open_connections_hold_nobody_up(target: Target) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(60):
            sock = stack.enter_context(target.connect())
            sock.send((b"", b'{"do"', b'{"do": "status"}')[number % 3])
            if number % 2:
                sock.shutdown(socket.SHUT_WR)
        target.ticks_on()
    for _ in range(1000):
        target.connect().close()
    target.ticks_on()


def test_row_36_a_thousand_idle_connections_keep_nobody_out(target: Target) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(target.connect())
        assert target.ask(b'{"do": "jobs"}\n')["ok"] is True
        target.ticks_on()
        assert len(os.listdir(f"/proc/{target.pid}/fd")) < 100


def test_row_36_when_descriptors_run_out_connections_are_dropped_and_the_processor_rests(box: Box) -> None:
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))}
    target = Target(box).start(**few)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(target.connect())
        began, spent = time.monotonic(), target.processor_time()
        target.ticks_on()
        assert target.processor_time() - spent < (time.monotonic() - began) / 2
    target.ticks_on()


GARBAGE = [
    b"\n", b"null\n", b"[]\n", b"1e999\n", b"NaN\n", b'""\n', b"{}\n", b'{"do": 5}\n', b'{"do": null}\n',
    b'{"do": "nonsense"}\n', b'{"do": "__class__"}\n', b'{"do": ["status"]}\n', b'{"do": "status", "do": "x"}\n',
    b"\xff\xfe\xfd\n", b"\0\0\0\n", b'{"do": "\\ud800"}\n', b"\xef\xbb\xbf{}\n", b"{'do': 'status'}\n",
    b'{"do": "trigger"}\n', b'{"do": "trigger", "job": {}}\n', b'{"do": "trigger", "job": "\\ud800"}\n',
    b'{"do": "pause", "job": [1]}\n', b'{"do": "pause", "job": 1e400}\n', b'{"do": "resume", "job": false}\n',
    b'{"do": "trigger", "job": "%s"}\n' % (b"t" * 60000), b'{"do": "x%s"}\n' % (b"x" * 60000),
    b'{"do": "trigger", "job": %s}\n' % (b"1" * 60000),
]  # fmt: skip


def test_row_36_garbage_is_answered_with_an_error(target: Target) -> None:
    for line in GARBAGE:
        answer = target.ask(line)
        assert answer is not None, line[:60]
        assert answer["ok"] is False, line[:60]
        assert answer["error"], line[:60]
    chance = random.Random(36)
    for _ in range(300):
        target.ask(chance.randbytes(chance.randrange(1, 3000)) + b"\n")
    target.ticks_on()


@pytest.mark.parametrize("request_", ["status", "trigger", "pause", "launch"])
def test_row_36_deep_nesting_is_refused_at_any_depth(target: Target, request_: str) -> None:
    for depth in (*range(900, 1010), 1500, 3000, 5000, 9000, 10000, 20000, 30000):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            nested = opening * depth + b"1" + closing * depth
            line = b'{"do": "%s", "job": %s}\n' % (request_.encode(), nested)
            if len(line) <= MAX_REQUEST:
                answer = target.ask(line)
                assert answer is not None, (depth, opening)
                assert answer["ok"] is (request_ in ("status", "launch")) or "error" in answer
    target.ticks_on()


def test_row_36_clients_that_ask_and_never_read_are_bounded(target: Target) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            sock = stack.enter_context(target.connect())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                push(sock, b'{"do": "status"}\n' * 100, 4 * MEGABYTE)
        target.ticks_on()


def test_row_36_requests_sent_together_are_answered_one_by_one(target: Target) -> None:
    with target.connect() as sock, sock.makefile("rb") as answers:
        sock.sendall(b'{"do": "jobs"}\n' * 1000 + b'{"do": "status"}\n')
        assert [json.loads(answers.readline())["ok"] for _ in range(1001)] == [True] * 1001
    target.ticks_on()


def test_row_36_a_script_with_its_own_main_loop_is_asked_and_attacked_as_well(box: Box) -> None:
    target = Target(box)
    text = "@on('reload')\ndef again(): pass\ndef loop():\n  while True: time.sleep(600)\nmain(loop)\n"
    target.pid = box.start(text)
    for _ in range(100):
        assert target.ask(b'{"do": "status"}\n')["pid"] == target.pid
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(target.connect())
        assert target.ask(b'{"do": "status"}\n')["pid"] == target.pid
        assert box.status()["state"] == "running"
