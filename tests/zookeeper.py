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
from ports import free_ports

from daemonkit.core.inotify import SLEEP, wait_until

MAIN = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
JAR = "/usr/share/java/zookeeper.jar"
# For TLS; what zookeeper.jar itself names lacks them.
NETTY = ":".join(f"/usr/share/java/netty-{name}.jar" for name in ("codec", "resolver", "transport-native-unix-common"))
LOCAL = ("127.0.0.1",)
_REPLY = 0.5  # seconds
TICK = 200  # milliseconds: a session's time-out is two ticks at least
# A small and short-lived JVM: no second compiler, one collector.
_JAVA = ("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m", "-Xss512k", "-XX:-UsePerfData")


class Server:
    """One server."""

    def __init__(self, path: Path, number: int, address: tuple[str, int], more: Sequence[str]) -> None:
        """Its files are in ``path``, and its clients come to ``address``; nothing runs yet."""
        path.mkdir()
        self.path = path
        self.host, self.port = address
        self.pid = 0
        self.java: Sequence[str] = ()  # options of the JVM
        (path / "myid").write_text(f"{number}\n")
        lines = [
            f"tickTime={TICK}",
            "maxSessionTimeout=60000",  # else it is 20 ticks, whatever is asked for
            "initLimit=50",
            "syncLimit=10",
            f"dataDir={path}",
            f"clientPort={self.port}",
            f"clientPortAddress={self.host}",
            "admin.enableServer=false",
            "4lw.commands.whitelist=*",
            "maxClientCnxns=0",
            "forceSync=no",
            *more,
        ]
        (path / "zoo.cfg").write_text("\n".join(lines) + "\n")

    def start(self, prefix: Sequence[str] = ()) -> None:
        """Start it, and do not wait; ``prefix`` stands before its command."""
        assert os.path.exists(JAR), "ZooKeeper is not installed (Debian: zookeeper)"
        command = [*prefix, *_JAVA, *self.java, "-cp", f"{JAR}:{NETTY}", MAIN, str(self.path / "zoo.cfg")]
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
        """What it is: standalone, leader or follower; empty while it does not serve, or is slow to say so."""
        found = re.search(r"^Mode: (\w+)$", self.ask("srvr"), re.MULTILINE)
        return found[1] if found else ""

    def ask(self, word: str) -> str:
        """What it answers to a word of four letters; nothing while it does not.

        One that is only just starting accepts connections that it then forgets.
        """
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), _REPLY) as sock:
            sock.sendall(word.encode())
            answer = b""
            while data := sock.recv(65536):
                answer += data
            return answer.decode(errors="replace")
        return ""

    def told(self, word: str) -> str:
        """The same of one that serves, however slow it is."""
        until = time.monotonic() + PATIENCE
        while not (answer := self.ask(word)):
            assert time.monotonic() < until, (self.path / "output").read_text()
        return answer

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

    def __init__(self, path: Path, hosts: Sequence[str] = LOCAL * 3, settings: Sequence[str] = ()) -> None:
        """One on each of ``hosts``, files in directories below ``path``; ``settings`` are lines of zoo.cfg."""
        count = len(hosts)
        ports = free_ports(3 * count)
        numbered = list(enumerate(hosts))
        others = [
            f"server.{n + 1}={host}:{ports[count + n]}:{ports[2 * count + n]}" for n, host in numbered if count > 1
        ]
        self.prefixes: dict[str, Sequence[str]] = {}  # before the command of a server on that host
        self.servers = [
            Server(path / f"zk{n + 1}", n + 1, (host, ports[n]), [*others, *settings]) for n, host in numbered
        ]

    @property
    def hosts(self) -> str:
        """As in a URL."""
        return ",".join(f"{server.host}:{server.port}" for server in self.servers)

    def url(self, chroot: str = "", **options: object) -> str:
        """A coordinator's."""
        query = "&".join(f"{key}={value}" for key, value in options.items())
        return f"zookeeper://{self.hosts}{chroot}{'?' if query else ''}{query}"

    def start(self) -> None:
        """Start all, and return when they serve."""
        for server in self.servers:
            server.start(self.prefixes.get(server.host, ()))
        for server in self.servers:
            server.await_ready()

    def leader(self) -> Server:
        """The one that leads the others, once there is one and says so."""
        until = time.monotonic() + PATIENCE
        while True:
            for server in self.servers:
                if server.pid and server.mode in ("leader", "standalone"):
                    return server
            assert time.monotonic() < until, [server.mode for server in self.servers]
            time.sleep(SLEEP)

    def end_session(self, session: str) -> None:
        """Let the servers end somebody's session."""
        from kazoo.client import KazooClient

        number = int(session, 16)
        thief = KazooClient(self.hosts, client_id=(number - (number >> 63 << 64), session_password(session)))
        thief.start(PATIENCE)
        assert thief.client_id[0] & (1 << 64) - 1 == number
        thief.stop()
        thief.close()

    def close(self) -> None:
        """End all."""
        for server in self.servers:
            server.kill()


@contextlib.contextmanager
def ensemble(path: Path, hosts: Sequence[str] = LOCAL * 3, settings: Sequence[str] = ()) -> Iterator[Ensemble]:
    """Servers that end with the block."""
    made = Ensemble(path, hosts, settings)
    try:
        made.start()
        yield made
    finally:
        made.close()


class Network:
    """A network name space with one cable to us (ip-netns(8), veth(4)), which can be pulled."""

    def __init__(self) -> None:
        """Make it."""
        number = os.getpid() % 200, random.SystemRandom().randrange(60) * 4
        self.ours, self.theirs = (f"10.{number[0] + 20}.{number[1]}.{n}" for n in (1, 2))
        self.name = f"dk{os.getpid()}n{number[1]}"
        self.cable = f"dk{os.getpid()}"
        _ip("netns", "add", self.name)
        _ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("addr", "add", f"{self.ours}/30", "dev", self.cable)
        _ip("-n", self.name, "addr", "add", f"{self.theirs}/30", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        self.heal()

    @property
    def prefix(self) -> list[str]:
        """Before a command that is to run in there."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.cable, "down")

    def heal(self) -> None:
        """Plug it in."""
        _ip("link", "set", self.cable, "up")

    def close(self) -> None:
        """Remove it."""
        _ip("link", "del", self.cable)
        _ip("netns", "del", self.name)


def session_password(session: str) -> bytes:
    """Its password, which the servers compute (ZooKeeperServer.generatePasswd, java.util.Random)."""
    seed = ((int(session, 16) ^ 0xB3415C00) ^ 0x5DEECE66D) & ((1 << 48) - 1)
    found = b""
    while len(found) < 16:
        seed = (seed * 0x5DEECE66D + 0xB) & ((1 << 48) - 1)
        found += (seed >> 16 & 0xFFFFFFFF).to_bytes(4, "little")
    return found


def stop(*pids: int) -> None:
    """SIGSTOP them, and return when none of their threads runs any more."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + PATIENCE
    while not all(map(_is_stopped, pids)):  # nobody tells but their parents
        assert time.monotonic() < until
        time.sleep(SLEEP)


def _is_stopped(pid: int) -> bool:
    states = set()
    for thread in Path("/proc").glob(f"{pid}/task/*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            states.add(thread.read_text().rpartition(")")[2].split()[0])
    return states <= {"T", "Z", "X"}  # proc_pid_stat(5)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
