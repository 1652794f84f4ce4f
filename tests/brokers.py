"""Real servers for brokers: on sockets in temporary directories, ended by PID."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from harness import PATIENCE

from daemonkit.core.inotify import wait_until


class RedisServer:
    """A redis-server of our own."""

    def __init__(self, path: Path, *options: str) -> None:
        """Its files are in ``path``; ``options`` as on its command line, a configuration file before them."""
        self.path = path
        self.socket = path / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._options = options
        self.start()

    def start(self) -> None:
        """Start it, and return when it answers."""
        program = shutil.which("redis-server")
        assert program is not None, "redis-server is not installed (Debian: redis-server)"
        log, pidfile = self.path / "redis.log", self.path / "redis.pid"
        log.unlink(missing_ok=True)
        # A daemon of its own, and no child of ours: there are tests that look at those.
        where = ["--dir", str(self.path), "--logfile", str(log), "--pidfile", str(pidfile), "--daemonize", "yes"]
        file = [option for option in self._options[:1] if not option.startswith("--")]
        own = ["--port", "0", "--unixsocket", str(self.socket), *where]
        command = [program, *file, *own, *self._options[len(file) :]]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)

        def is_ready() -> bool | None:
            words = log.read_text() if log.exists() else ""
            return "ready to accept connections at" in words or "+monitor master" in words or None

        assert wait_until(str(self.path), is_ready, PATIENCE), log.read_text()
        self.pid = int(pidfile.read_text())

    def command(self, *words: str) -> bytes:
        """What it answers to a command, raw."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self.socket))
            sock.sendall(b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(w), w) for w in _bytes(words))]))
            return sock.recv(65536)

    def signal(self, number: int) -> None:
        """Send it one that it lives on after."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        with open(os.pidfd_open(self.pid), "rb", buffering=0) as pidfd:
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
            assert select.select([pidfd], [], [], PATIENCE)[0]


class Beanstalkd:
    """A beanstalkd of our own."""

    def __init__(self, path: Path, *options: str, port: int | None = None) -> None:
        """Its files are in ``path``; ``options`` as on its command line."""
        self.path = path
        self.socket = path / "beanstalkd.sock"
        self.url = f"beanstalk:{self.socket}" if port is None else f"beanstalk://127.0.0.1:{port}"
        self._where = ["-l", f"unix:{self.socket}"] if port is None else ["-l", "127.0.0.1", "-p", str(port)]
        self._port = port
        self._options = options
        self.start()

    def start(self) -> None:
        """Start it, and return when it answers."""
        program = shutil.which("beanstalkd")
        assert program is not None, "beanstalkd is not installed (Debian: beanstalkd)"
        self.socket.unlink(missing_ok=True)
        with open(self.path / "beanstalkd.log", "ab") as log:
            # A daemon of its own, and no child of ours: there are tests that look at those.
            command = ["setsid", "--fork", program, *self._where, *self._options]
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self.pid = int(dict(self._stats())["pid"])
                return
            except (FileNotFoundError, ConnectionRefusedError):  # it tells nobody when it is ready
                assert time.monotonic() < until, (self.path / "beanstalkd.log").read_text()
                wait_until(str(self.path), lambda: self.socket.exists() or None, 0.05)

    def command(self, *lines: bytes) -> bytes:
        """What it answers to commands, raw, when all of them are done: then it closes the connection, as told."""
        with self._connected() as sock, sock.makefile("rb") as reader:
            sock.sendall(b"".join(line + b"\r\n" for line in (*lines, b"quit")))
            return reader.read()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """kill -9."""
        with open(os.pidfd_open(self.pid), "rb", buffering=0) as pidfd:
            signal.pidfd_send_signal(pidfd.fileno(), number)
            assert select.select([pidfd], [], [], PATIENCE)[0]

    def signal(self, number: int) -> None:
        """Send it one that it lives on after."""
        os.kill(self.pid, number)

    def _connected(self) -> socket.socket:
        if self._port is not None:
            return socket.create_connection(("127.0.0.1", self._port), PATIENCE)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(str(self.socket))
        except OSError:
            sock.close()
            raise
        return sock

    def _stats(self) -> Iterator[tuple[str, str]]:
        for line in self.command(b"stats").decode().splitlines():
            key, colon, value = line.partition(": ")
            if colon:
                yield key, value


class Between:
    """Passes on what clients and the server say, until it is told to cut a line before a reply, or to hold one up."""

    def __init__(self, server: Path, path: Path) -> None:
        """Listen at ``path``, in front of ``server``."""
        self.path = path
        self.server = server
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.cut_before = b""  # a request with this is passed on, and its reply is not
        self.hold = b""  # a reply with this is passed on when it is ``let_go``
        self.is_holding = threading.Event()
        self.let_go = threading.Event()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._pass_on, args=[client]))
            self._threads[-1].start()

    def _pass_on(self, client: socket.socket) -> None:
        is_cut = False
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self.server))
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(65536)
                    if not data or (is_cut and ready is server):
                        return
                    if self.cut_before and self.cut_before in data:
                        self.cut_before, is_cut = b"", True
                    if ready is server and self.hold and self.hold in data:
                        self.hold = b""
                        self.is_holding.set()
                        self.let_go.wait(PATIENCE)
                    (server if ready is client else client).sendall(data)

    def close(self) -> None:
        """Once the clients have gone."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._threads:
            each.join(PATIENCE)


@contextlib.contextmanager
def beanstalkd(path: Path, *options: str, port: int | None = None) -> Iterator[Beanstalkd]:
    """A server that ends with the block."""
    server = Beanstalkd(path, *(options or ("-z", "1073741824")), port=port)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def redis_server(path: Path, *options: str) -> Iterator[RedisServer]:
    """A server that ends with the block."""
    server = RedisServer(path, *(options or ("--save", "", "--appendonly", "no")))
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def broker_server(engine: str, path: Path) -> Iterator[RedisServer | Beanstalkd]:
    """One that loses nothing that it has accepted, for "redis" or "beanstalk"."""
    log = path / engine
    log.mkdir()
    if engine == "redis":
        with redis_server(log, "--save", "", "--appendonly", "yes", "--appendfsync", "always") as redis:
            yield redis
    else:
        with beanstalkd(log, "-b", str(log), "-f", "0") as server:
            yield server


def _bytes(words: tuple[str, ...]) -> list[bytes]:
    return [word.encode() for word in words]
