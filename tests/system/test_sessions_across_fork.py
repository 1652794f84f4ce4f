"""Row 26: sessions with a real TLS server, Redis and PostgreSQL outlive whatever a child does with its copy of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import PATIENCE, Box
from ports import free_ports

POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=None, key=lambda path: int(path.parts[4]))

TLS_SERVER = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[1:3])
listener = socket.create_server(("127.0.0.1", 0))
print("ready on", listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
try:
    with context.wrap_socket(sock, server_side=True) as session:
        while data := session.recv(100):
            print("heard", data.decode(), flush=True)
            session.send(data)
        session.unwrap().close()
        print("the session ended in order", flush=True)
except OSError as error:
    print("the session broke:", error, flush=True)
"""

SESSIONS = """
import contextlib, gc, json, os, select, signal, socket, ssl, sys
from daemonkit.processes import child
from daemonkit.processes.children import Children, fork_server
from daemonkit.processes.guard import Guard

class TLS:
    def __init__(self, port):
        context = ssl.create_default_context(cafile=os.environ["CERTIFICATE"])
        raw = socket.create_connection(("127.0.0.1", port))
        self.socket = context.wrap_socket(raw, server_hostname="localhost")
    def use(self, text):
        self.socket.sendall(text.encode())
        return self.socket.recv(100).decode() == text
    def part(self):
        self.socket.unwrap().close()

class Redis:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.id = self.ask("CLIENT ID")
    def ask(self, command):
        self.socket.sendall(command.encode() + b"\\r\\n")
        if not (reply := self.socket.recv(100)):
            raise ConnectionError("closed by the server")
        return reply
    def use(self, text):
        echo = f"${len(text)}\\r\\n{text}\\r\\n".encode()
        return self.ask("CLIENT ID") == self.id and self.ask("ECHO " + text) == echo
    def part(self):
        self.ask("QUIT")
        self.socket.close()

class PostgreSQL:
    def __init__(self, port):
        import pg8000.native
        self.connection = pg8000.native.Connection("postgres", host="127.0.0.1", port=port)
        self.socket = self.connection._usock
        self.pid = self.ask("SELECT pg_backend_pid()")
        self.connection.run("CREATE TEMPORARY TABLE words (word text)")
    def ask(self, query, **values):
        return self.connection.run(query, **values)[0][0]
    def use(self, text):
        word = self.ask("INSERT INTO words VALUES (:word) RETURNING word", word=text)
        return self.ask("SELECT pg_backend_pid()") == self.pid and word == text
    def part(self):
        self.connection.close()

def tried(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def tell(**found):
    print(json.dumps(found), flush=True)

sessions = {"tls": TLS, "redis": Redis, "postgresql": PostgreSQL}
"""

PARENT = """
kind, port, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
session = sessions[kind](port)
tell(before=tried(session.use, "parent"))
pid = os.fork() if way == "os.fork" else Guard(way).fork()
if pid == 0:
    tell(in_child=tried(session.use, "child"))
    if "and parts" in sys.argv:
        tried(session.part)
    del session
    gc.collect()
    child.leave(0)
os.waitpid(pid, 0)
session.socket.settimeout(5 if way == "os.fork" else 30)  # an answer that the child has taken never comes
tell(after=tried(session.use, "again"), end=tried(session.part))
"""

SERVED = """
def live(message):
    signal.pause()
    child.leave(0)
server, wire = fork_server(live, lambda: None)
found = {kind: sessions[kind](int(port)) for kind, port in (arg.split("=") for arg in sys.argv[1:])}
links = {os.readlink(f"/proc/self/fd/{session.socket.fileno()}") for session in found.values()}
children = Children(wire)
pids, ends = [], []
for _ in range(3):
    children.spawn(b"", on_end=lambda made, receipt: ends.append(receipt), on_start=lambda made: pids.append(made.pid))
def hear(heard, count):
    while len(heard) < count:
        select.select([wire], [], [], 30)[0] or sys.exit("the fork server says nothing")
        children.receive()
hear(pids, 3)
held = set()
for pid in (server, *pids):
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # a child that has just begun closes what is the server's
            held.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
tell(sessions=len(links), held_by_children=sorted(held & links))
for made in children:
    made.kill_tree()
hear(ends, 3)
wire.close()
os.waitpid(server, 0)
tell(**{kind: tried(session.use, "again") for kind, session in found.items()})
for session in found.values():
    session.part()
"""


class Server(NamedTuple):
    """A server of this test: where it listens, and what it says."""

    port: int
    process: subprocess.Popen[str]

    def rest(self) -> list[str]:
        """What it says until its end."""
        return self.process.communicate(timeout=PATIENCE)[0].splitlines()


@contextlib.contextmanager
def served(
    command: Sequence[str | Path], ready: str, port: int = 0, become: Sequence[str] = (), end: str = "TERM"
) -> Iterator[Server]:
    """Run a server that says ``ready``; the signal ``end`` ends it with the block, or with us, whatever ends us."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", end, *become, "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    patience = threading.Timer(PATIENCE, process.kill)
    patience.start()
    try:
        said = ready_line = ""
        assert process.stdout
        while ready not in ready_line:
            ready_line = process.stdout.readline()
            said += ready_line
            assert ready_line, f"{command[0]} did not become ready:\n{said}"
        patience.cancel()
        yield Server(port or int(ready_line.split()[-1]), process)
    finally:
        patience.cancel()
        process.send_signal(signal.Signals[f"SIG{end}"])
        try:
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()


@contextlib.contextmanager
def served_at(
    command: Callable[[int], Sequence[str | Path]], ready: str, become: Sequence[str] = (), end: str = "TERM"
) -> Iterator[Server]:
    """As ``served``, a server that has to be told its port: another one if somebody has taken that meanwhile."""
    with contextlib.ExitStack() as stack:
        for left in reversed(range(5)):
            (port,) = free_ports(1)
            try:
                server = stack.enter_context(served(command(port), ready, port, become, end))
            except AssertionError:
                if not left:
                    raise
            else:
                break
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of localhost, and its key."""
    path = tmp_path_factory.mktemp("certificate")
    files = path / "localhost.pem", path / "localhost.key"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run([*make.split(), *names], check=True, capture_output=True, timeout=PATIENCE)
    return files


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> Iterator[Server]:
    """A TLS server for one session; it says what it has heard, and whether the session ended in order."""
    with served([sys.executable, "-c", TLS_SERVER, *certificate], "ready on") as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[Server]:
    """A Redis that keeps nothing."""
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server (Debian: redis-server)")
    options = "--bind 127.0.0.1 --appendonly no --dir /tmp --save"
    command = ["redis-server", *options.split(), ""]
    with served_at(lambda port: [*command, "--port", str(port)], "Ready to accept connections") as server:
        yield server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A PostgreSQL with a cluster of its own."""
    if POSTGRES is None or importlib.util.find_spec("pg8000") is None:
        pytest.skip("needs PostgreSQL (Debian: postgresql) and pg8000")
    with tempfile.TemporaryDirectory(prefix="daemonkit-postgresql-") as path:
        become = []
        if os.geteuid() == 0:  # as root it will not run
            become = ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
            shutil.chown(path, "postgres", "postgres")
        options = "-U postgres -A trust --no-sync --no-locale"
        initdb = ["setpriv", *become, "--", str(POSTGRES.parent / "initdb"), "-D", path, *options.split()]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/", timeout=PATIENCE)
        command = [str(POSTGRES), "-D", path, "-h", "127.0.0.1", "-k", "", "-F"]
        ready = "ready to accept connections"
        with served_at(lambda port: [*command, "-p", str(port)], ready, become, end="INT") as server:  # INT: at once
            yield server


@pytest.fixture(params=["tls", "redis", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kinds of sessions."""
    name: str = request.param
    return name


@pytest.fixture
def server(kind: str, request: pytest.FixtureRequest) -> Server:
    """The server of that kind."""
    found: Server = request.getfixturevalue(kind)
    return found


def told(box: Box, certificate: tuple[Path, Path], program: str, *args: str) -> dict[str, Any]:
    """What the processes of a program say they have seen."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SESSIONS + program, *args],
        env={**box.environ, "CERTIFICATE": str(certificate[0])},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE * 2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {key: value for line in done.stdout.splitlines() for key, value in json.loads(line).items()}


def test_row_26_a_guarded_child_can_neither_use_nor_end_its_parents_session(
    box: Box, certificate: tuple[Path, Path], kind: str, server: Server
) -> None:
    found = told(box, certificate, PARENT, kind, str(server.port), "close", "and parts")
    assert (found["before"], found["after"], found["end"]) == (True, True, None)
    assert "Error" in found["in_child"]  # and not: seemingly sent
    if kind == "tls":
        assert server.rest() == ["heard parent", "heard again", "the session ended in order"]


def test_row_26_without_the_guard_the_same_child_breaks_the_session(
    box: Box, certificate: tuple[Path, Path], kind: str, server: Server
) -> None:
    found = told(box, certificate, PARENT, kind, str(server.port), "os.fork", "and parts")
    assert (found["before"], found["in_child"]) == (True, True)
    assert found["after"] is not True
    if kind == "tls":
        assert "heard again" not in server.rest()


def test_row_26_without_the_guard_a_child_that_only_speaks_makes_a_bad_record_mac(
    box: Box, certificate: tuple[Path, Path], tls: Server
) -> None:
    assert told(box, certificate, PARENT, "tls", str(tls.port), "os.fork")["after"] is not True
    assert "bad record mac" in tls.rest()[-1]


def test_row_26_children_of_the_fork_server_hold_no_session_that_was_opened_after_it(
    box: Box, certificate: tuple[Path, Path], tls: Server, redis: Server
) -> None:
    found = told(box, certificate, SERVED, f"tls={tls.port}", f"redis={redis.port}")
    assert found == {"sessions": 2, "held_by_children": [], "tls": True, "redis": True}
    assert tls.rest() == ["heard again", "the session ended in order"]
