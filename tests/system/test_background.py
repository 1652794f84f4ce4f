"""background() in a real web server: gunicorn with threads and TLS, a Flask application, work that takes its time."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import signal
import ssl
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import PATIENCE, Box, await_end

pytest.importorskip("flask")
pytest.importorskip("gunicorn")

EXAMPLES = Path(__file__).parents[2] / "etc" / "examples"
APPLICATION = """
import fcntl, os
from flask import Flask, request
from daemonkit import Background
from daemonkit.errors import BackgroundFull

app = Flask(__name__)
later = Background(4, max_pending=60, timeout=os.environ.get("TIMEOUT", "1h"))

def note(*words):
    fd = os.open("out", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, words)) + chr(10)).encode())
    os.close(fd)

def upload(number):
    note("begun", number, os.getpid(), *sockets())
    with open("gate") as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
    note("done", number)

def fail(number):
    raise ConnectionError(f"no bucket for {number}")

def sockets():
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if name.startswith("socket:"):
            yield name

@app.get("/later/<number>")
def plain(number):
    try:
        later(upload, number)
    except BackgroundFull:
        return "full", 503
    return str(os.getpid()), 202

@app.get("/held/<number>")
def held(number):
    begin = later.hold(upload, number)
    def slowly():
        yield "accepted"
        with open("client") as client:
            fcntl.flock(client, fcntl.LOCK_SH)
    response = app.response_class(slowly(), 202)
    response.call_on_close(begin)
    return response

@app.get("/fail")
def failing():
    later(fail, 7)
    return "", 202
"""


class Shut:
    """A file that is locked until it is opened: who waits for it waits in the kernel."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        self._file.close()


class Web:
    """A gunicorn in a box."""

    def __init__(self, box: Box, certificate: tuple[Path, Path], *options: str, application: str = "web:app") -> None:
        self.box = box
        self.trust = ssl.create_default_context(cafile=str(certificate[0]))
        (box.path / "web.py").write_text(APPLICATION)
        (box.path / "out").touch()
        self.log = box.path / f"gunicorn-{len(list(box.path.glob('gunicorn-*')))}.log"
        keys = ["--certfile", str(certificate[0]), "--keyfile", str(certificate[1])]
        command = ["--worker-class=gthread", "--threads=16", "--bind=127.0.0.1:0", "--log-level=debug", *keys]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gunicorn",
                    *command,
                    "--keep-alive=60",
                    "--graceful-timeout=10",
                    *options,
                    application,
                ],
                cwd=box.path,
                env={**box.environ, "SPT_NOENV": "1"},  # or the box would not know whose a titled process is
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        said = box.await_file(self.log, "Listening at: https://127.0.0.1:")
        self.port = int(said.partition("Listening at: https://127.0.0.1:")[2].split()[0])

    def connect(self) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection("localhost", self.port, context=self.trust, timeout=PATIENCE)
        connection.connect()
        return connection

    def get(self, path: str) -> tuple[int, str]:
        with contextlib.closing(self.connect()) as connection:
            return ask(connection, path)

    def await_out(self, text: str, count: int = 1) -> list[str]:
        return self.box.await_file(self.box.path / "out", text, count).splitlines()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        self.send(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0


def ask(connection: http.client.HTTPSConnection, path: str) -> tuple[int, str]:
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of localhost, and its key."""
    path = tmp_path_factory.mktemp("certificate")
    files = path / "certificate.pem", path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run([*make.split(), *names], check=True, capture_output=True, timeout=60)
    return files


StartWeb = Callable[..., Web]


@pytest.fixture
def start_web(box: Box, certificate: tuple[Path, Path], gate: Shut) -> Iterator[StartWeb]:
    """Start a web server; in the end all that it has been asked for is done, and it is gone."""
    started: list[Web] = []

    def start(*options: str, application: str = "web:app") -> Web:
        started.append(Web(box, certificate, *options, application=application))
        return started[-1]

    yield start
    gate.open()
    for web in started:
        if web.process.poll() is None:
            web.stop()
    for pid in box.processes():
        await_end(pid)


@pytest.fixture
def gate(box: Box) -> Iterator[Shut]:
    """What the uploads wait for."""
    made = Shut(box.path / "gate")
    yield made
    made.open()


def test_the_response_is_out_while_the_work_waits_and_the_client_keeps_its_connection(
    box: Box, start_web: StartWeb, gate: Shut
) -> None:
    web = start_web()
    with contextlib.closing(web.connect()) as connection:
        sock = connection.sock
        for number in range(20):
            assert ask(connection, f"/later/{number}")[0] == 202  # and none of it can be done
            assert connection.sock is sock
        web.await_out("begun", 4)
        assert "done" not in (box.path / "out").read_text()
        gate.open()
        web.await_out("done", 20)
        assert ask(connection, "/later/20")[0] == 202
        assert connection.sock is sock
    web.await_out("done", 21)


def test_a_held_call_begins_when_the_whole_response_is_out(box: Box, start_web: StartWeb, gate: Shut) -> None:
    gate.open()
    client = Shut(box.path / "client")
    web = start_web()
    with contextlib.closing(web.connect()) as connection:
        connection.request("GET", "/held/first")
        response = connection.getresponse()
        assert response.read(8) == b"accepted"
        web.get("/later/second")  # accepted after it, and nothing in its way
        assert "first" not in "".join(web.await_out("done second"))
        client.open()
        assert response.read() == b""
    web.await_out("done first")


def test_fifty_clients_at_once_over_tls_each_have_their_work_done_once(
    box: Box, start_web: StartWeb, gate: Shut
) -> None:
    web = start_web()

    def be_a_client(number: int) -> bool:
        with contextlib.closing(web.connect()) as connection:
            sock = connection.sock
            first = ask(connection, f"/later/{number}")[0]
            again = ask(connection, "/nothing")[0]
            return (first, again) == (202, 404) and connection.sock is sock

    with ThreadPoolExecutor(50) as clients:
        assert all(clients.map(be_a_client, range(50)))  # all responses are out before any work is done
    assert "done" not in (box.path / "out").read_text()
    with contextlib.closing(web.connect()) as connection:
        extra = [ask(connection, f"/later/{number}")[0] for number in range(50, 65)]
    assert extra == [202] * 14 + [503]
    theirs = {name for pid in box.processes() for name in sockets_of(pid) if is_gunicorn(pid)}
    assert len(theirs) > 2  # it listens, and has connections
    for line in web.await_out("begun", 4):
        _, _, pid, *own = line.split()
        assert len(own) == 1  # its way to tell what comes of it
        assert not theirs & set(own)
        assert int(pid) not in children(web.process.pid)
    assert not zombies(web.process.pid)
    gate.open()
    lines = web.await_out("done", 64)
    running = 0
    for line in lines:
        running += 1 if line.startswith("begun") else -1
        assert 0 <= running <= 4
    assert sorted(int(line.split()[1]) for line in lines if line.startswith("done")) == list(range(64))
    web.stop()
    assert "unknown child" not in web.log.read_text()  # gunicorn waits for all of them, and says so
    assert "Traceback" not in web.log.read_text()


@pytest.mark.parametrize("way", ["reload", "restart", "kill -9"])
def test_started_work_survives_what_may_happen_to_the_web_server(start_web: StartWeb, gate: Shut, way: str) -> None:
    web = start_web()
    worker = 0
    for number in range(6):  # four begin, two wait
        worker = int(web.get(f"/later/{number}")[1])
    web.await_out("begun", 4)
    if way == "reload":
        web.send(signal.SIGHUP)
    elif way == "restart":
        web.stop()
        web = start_web()
    else:
        os.kill(worker, signal.SIGKILL)
    await_end(worker)
    assert web.get("/later/new")[1] != str(worker)
    gate.open()
    lines = web.await_out("done", 7)
    assert sorted(line.split()[1] for line in lines if line.startswith("done")) == [*"012345", "new"]


def test_a_failure_and_a_time_that_is_up_stand_in_the_log_of_gunicorn(
    box: Box, start_web: StartWeb, gate: Shut
) -> None:
    box.environ["TIMEOUT"] = "10s"  # the first call imports flask within that
    web = start_web("--preload")
    assert web.get("/fail")[0] == 202
    said = box.await_file(web.log, "ConnectionError: no bucket for 7", 2)
    assert "[ERROR] background: web.fail failed: ConnectionError: no bucket for 7\nTraceback" in said
    assert web.get("/later/1")[0] == 202
    said = box.await_file(web.log, "TimeUp: not done after 10s")
    assert "[ERROR] background: web.upload failed: not done after 10s\nTraceback" in said
    assert "fcntl.flock(gate, fcntl.LOCK_SH)" in said


def test_the_example_uploads_what_it_is_sent(box: Box, start_web: StartWeb) -> None:
    bucket, spool = box.path / "bucket", box.path / "spool"
    bucket.mkdir()
    spool.mkdir()
    box.environ |= {"UPLOAD_TO": str(bucket), "TMPDIR": str(spool)}
    web = start_web(f"--chdir={EXAMPLES}", application="upload:app")
    body = textwrap.dedent("""\
        --mark
        Content-Disposition: form-data; name="file"; filename="../picture.jpg"

        all the pixels
        --mark--
        """).replace("\n", "\r\n")
    with contextlib.closing(web.connect()) as connection:
        connection.request("POST", "/", body, {"Content-Type": "multipart/form-data; boundary=mark"})
        response = connection.getresponse()
        assert (response.status, response.read()) == (202, b"thank you\n")
    box.await_file(bucket / "picture.jpg", "all the pixels")
    web.stop()
    for pid in box.processes():
        await_end(pid)
    assert not list(spool.glob("upload-*"))


def test_the_example_with_a_task_uploads_also_what_was_sent_before_the_daemon_runs(
    box: Box, start_web: StartWeb
) -> None:
    bucket = box.path / "bucket"
    bucket.mkdir()
    box.environ |= {"UPLOAD_TO": str(bucket), "TMPDIR": str(box.path)}
    web = start_web(f"--chdir={EXAMPLES}", application="upload_task:app")
    body = (
        '--mark\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\nall the pixels\r\n--mark--\r\n'
    )
    with contextlib.closing(web.connect()) as connection:
        connection.request("POST", "/", body, {"Content-Type": "multipart/form-data; boundary=mark"})
        response = connection.getresponse()
        assert (response.status, response.read()) == (202, b"thank you, your upload is task 1\n")
    web.stop()
    assert box.call("start", EXAMPLES / "upload_task.py").returncode == 0
    box.await_file(bucket / "a.jpg", "all the pixels")
    assert box.call("queue", "drain", "upload", "--timeout", "60").stdout == "upload is drained\n"
    assert not list(box.path.glob("upload-*"))
    assert box.call("kill", "upload_task").returncode == 0


def children(pid: int) -> set[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return set(map(int, file.read().split()))


def zombies(pid: int) -> list[int]:
    """Below ``pid``."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                found.append(child)
            found += zombies(child)
    return found


def is_gunicorn(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"gunicorn" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def sockets_of(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("socket:"):
                    found.add(name)
    return found
