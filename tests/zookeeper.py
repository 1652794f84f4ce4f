"""Real ZooKeeper servers: on free ports of the loopback, in temporary directories, ended by PID."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import PATIENCE

from daemonkit.core.inotify import SLEEP, wait_until

MAIN = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
JAR = "/usr/share/java/zookeeper.jar"
_REPLY = 0.5  # seconds
TICK = 200  # milliseconds: a session's time-out is two ticks at least
# A small and short-lived JVM: no second compiler, one collector.
_JAVA = ("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m", "-Xss512k", "-XX:-UsePerfData")


class Server:
    """One server."""

    def __init__(self, path: Path, number: int, port: int, others: Sequence[str], settings: Sequence[str]) -> None:
        """Its files are in ``path``; nothing runs yet."""
        path.mkdir()
        self.path = path
        self.number = number
        self.port = port
        self.pid = 0
        (path / "myid").write_text(f"{number}\n")
        lines = [
            f"tickTime={TICK}",
            "initLimit=50",
            "syncLimit=10",
            f"dataDir={path}",
            f"clientPort={port}",
            "clientPortAddress=127.0.0.1",
            "admin.enableServer=false",
            "4lw.commands.whitelist=*",
            "maxClientCnxns=0",
            "forceSync=no",
            *others,
            *settings,
        ]
        (path / "zoo.cfg").write_text("\n".join(lines) + "\n")

    def start(self, prefix: Sequence[str] = ()) -> None:
        """Start it, and do not wait; ``prefix`` stands before its command."""
        assert os.path.exists(JAR), "ZooKeeper is not installed (Debian: zookeeper)"
        command = [*prefix, *_JAVA, "-cp", JAR, MAIN, str(self.path / "zoo.cfg")]
        with open(self.path / "output", "ab") as output:
            # No child of ours: there are tests that look at those.
            launcher = ["setsid", "--fork", "sh", "-c", 'echo $$ > pid.new; mv pid.new pid; exec "$@"', "sh"]
            (self.path / "pid").unlink(missing_ok=True)
            subprocess.run(
                [*launcher, *command],
                cwd=self.path,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
            )
        found = wait_until(str(self.path), lambda: (self.path / "pid").exists() or None, PATIENCE)
        assert found
        self.pid = int((self.path / "pid").read_text())

    def await_ready(self) -> None:
        """Return when it serves clients."""
        until = time.monotonic() + PATIENCE
        while not self.mode:  # it tells nobody when it does
            assert time.monotonic() < until, (self.path / "output").read_text()
            time.sleep(SLEEP)

    @property
    def mode(self) -> str:
        """What it is: standalone, leader or follower; empty while it does not serve."""
        found = re.search(r"^Mode: (\w+)$", self.ask("srvr"), re.MULTILINE)
        return found[1] if found else ""

    def ask(self, word: str) -> str:
        """What it answers to a word of four letters; nothing while it does not.

        One that is only just starting accepts connections that it then forgets.
        """
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), _REPLY) as sock:
            sock.sendall(word.encode())
            answer = b""
            while data := sock.recv(65536):
                answer += data
            return answer.decode(errors="replace")
        return ""

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait for its end."""
        pid, self.pid = self.pid, 0
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
            assert select.select([pidfd], [], [], PATIENCE)[0]


class Ensemble:
    """One server, or several that elect a leader."""

    def __init__(self, path: Path, count: int = 3, settings: Sequence[str] = ()) -> None:
        """Their files are in directories below ``path``; ``settings`` are lines of zoo.cfg."""
        ports = free_ports(3 * count)
        others = [
            f"server.{n + 1}=127.0.0.1:{ports[count + n]}:{ports[2 * count + n]}" for n in range(count) if count > 1
        ]
        self.servers = [Server(path / f"zk{n + 1}", n + 1, ports[n], others, settings) for n in range(count)]

    @property
    def hosts(self) -> str:
        """As in a URL."""
        return ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    def url(self, chroot: str = "", **options: object) -> str:
        """A coordinator's."""
        query = "&".join(f"{key}={value}" for key, value in options.items())
        return f"zookeeper://{self.hosts}{chroot}{'?' if query else ''}{query}"

    def start(self) -> None:
        """Start all, and return when they serve."""
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.await_ready()

    def leader(self) -> Server:
        """The one that leads the others."""
        return next(server for server in self.servers if server.mode in ("leader", "standalone"))

    def close(self) -> None:
        """End all."""
        for server in self.servers:
            server.kill()


@contextlib.contextmanager
def ensemble(path: Path, count: int = 3, settings: Sequence[str] = ()) -> Iterator[Ensemble]:
    """Servers that end with the block."""
    made = Ensemble(path, count, settings)
    try:
        made.start()
        yield made
    finally:
        made.close()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has.

    Below those that the kernel gives to clients: who knocks at one of those before the server does may get it himself.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")
