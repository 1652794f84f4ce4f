"""What goes wrong around a pool's children: many of them, what the parent holds, results that do not come whole."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path

import calls
import pytest
from forking import descriptors

from daemonkit import Pool
from daemonkit.errors import UnpicklableError, WorkerLost

LONG = 120.0  # seconds: only a bound


def servers() -> list[int]:
    """Our children: the fork servers."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            found += (task / "children").read_text().split()
    return [int(word) for word in found]


def status(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise KeyError(key)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_row_24_thousands_of_calls_in_a_row_leave_no_zombie_no_descriptor_and_no_memory() -> None:
    with Pool(2) as pool:
        assert list(pool.map(calls.square, range(500))) == [n**2 for n in range(500)]
        [server] = servers()
        before = [(descriptors(pid), status(pid, "VmRSS")) for pid in (os.getpid(), server)]
        for _ in range(4):
            assert list(pool.map(calls.square, range(500))) == [n**2 for n in range(500)]
        assert servers() == [server]
        after = [(descriptors(pid), status(pid, "VmRSS")) for pid in (os.getpid(), server)]
        # A child is reaped when its result is long here: those of the last calls may be on their way.
        assert len(children(server)) <= 4
        for (files, memory), (files_after, memory_after) in zip(before, after, strict=True):
            assert files_after <= files + 1
            assert memory_after <= memory + 4096  # KB
    assert not servers()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    path = tmp_path / "server.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {0} -out {1}"
    key = tmp_path / "server.key"
    subprocess.run(command.format(key, path).split(), check=True, capture_output=True)
    path.write_text(path.read_text() + key.read_text())
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[tuple[int, list[str]]]:
    """Sends back every line; notes each broken session and each unclean end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    broken: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True, suppress_ragged_eofs=False) as session:
                    while line := session.recv(1000):
                        session.sendall(line)
                    session.unwrap().close()
            except OSError as error:  # ssl.SSLError among them
                broken.append(repr(error))

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1], broken
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(LONG)


def test_row_26_children_never_see_the_parents_threads_tls_sessions_and_connections(
    tls_server: tuple[int, list[str]],
) -> None:
    port, broken = tls_server
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stop = threading.Event()
    busy = [threading.Thread(target=stop.wait) for _ in range(4)]
    for thread in busy:
        thread.start()
    plain = socket.create_connection(("127.0.0.1", port))
    plain.set_inheritable(True)  # as a C library's often is
    with context.wrap_socket(plain) as session, Pool(2) as pool:
        made = []
        for number in range(100):
            made.append(pool.submit(calls.open_files))
            session.sendall(b"%d" % number)
            assert session.recv(100) == b"%d" % number
        for call in as_completed(made, LONG):
            sockets = [name for fd, name in call.result().items() if fd > 2 and name.startswith("socket:")]
            assert len(sockets) == 1  # the one for results
        assert pool.submit(calls.threads).result(LONG) == 1
        session.sendall(b"still the same session")
        assert session.recv(100) == b"still the same session"
        session.unwrap().close()
    stop.set()
    for thread in busy:
        thread.join(LONG)
    assert broken == []


@pytest.mark.parametrize("reuse", [1, None])
def test_row_27_results_that_do_not_come_whole_fail_their_own_future(reuse: int | None) -> None:
    with Pool(2, reuse=reuse) as pool:
        quiet = [pool.submit(calls.square, number) for number in range(10)]
        with pytest.raises(WorkerLost, match="SIGKILL"):
            pool.submit(calls.half_a_result).result(LONG)
        with pytest.raises(TypeError, match="pickle"):
            pool.submit(calls.a_lock).result(LONG)
        with pytest.raises(UnpicklableError):
            pool.submit(calls.raise_stubborn).result(LONG)
        with pytest.raises(UnpicklableError):
            pool.submit(calls.unloadable).result(LONG)
        assert [call.result(LONG) for call in quiet] == [number**2 for number in range(10)]
        assert pool.submit(calls.square, 5).result(LONG) == 25


def test_row_27_a_result_of_a_gigabyte_comes_whole() -> None:
    free = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    if free["MemAvailable"] < 4 << 20:
        pytest.skip("4 GB of free memory are wanted")
    size = 1 << 30
    before = descriptors(os.getpid())
    with Pool(1) as pool:
        assert len(pool.submit(calls.blob, size).result(LONG)) == size
        assert pool.submit(calls.square, 5).result(LONG) == 25
    assert descriptors(os.getpid()) <= before + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_row_23_a_thread_that_cannot_be_started_is_told_and_the_next_call_is_done() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = 4 << 30
    with Pool(1) as pool:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        size = threading.stack_size(limit)  # a stack that there is no room for
        try:
            with pytest.raises(RuntimeError, match="start new thread"):
                pool.submit(calls.square, 2)
        finally:
            threading.stack_size(size)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        assert not servers()
        assert pool.submit(calls.square, 3).result(LONG) == 9
