"""The other processes of the tests of daemonkit.ipc, and a check that no object is left in the kernel."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

from daemonkit.ipc import kernel, registry

PATIENCE = 30.0  # seconds: only a bound; every wait ends with its event
HEAD = """\
import os, signal, sys, time
from daemonkit import ipc
from daemonkit.errors import *
name = sys.argv[1]
def say(what): os.write(1, f"{what}\\n".encode())  # print could not be called by the handler of a signal in a print
def hear(): return sys.stdin.readline().strip()
"""


class Peer:
    """A Python process that says lines and is told lines."""

    def __init__(self, text: str, name: str) -> None:
        command = [sys.executable, "-c", HEAD + textwrap.dedent(text), name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    def hear(self) -> str:
        """The next line that it says; fails if it ends instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the process ended: {self.process.communicate(timeout=PATIENCE)[1]}")
        return line.rstrip("\n")

    def tell(self, what: str = "") -> None:
        """Say a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def await_sleep(self) -> None:
        """Return when it sleeps in a system call.  A signal just before would be seen by Python only after that."""
        until = time.monotonic() + PATIENCE
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":  # proc_pid_stat(5)
            assert time.monotonic() < until
            time.sleep(0.001)

    def kill(self) -> None:
        """SIGKILL it, and wait until it is gone."""
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def end(self) -> str:
        """Wait until it has ended well; the rest that it says."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, err
        return out


class Objects:
    """The objects of one test."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = str(run_dir / registry.SCRIPTS)
        self.name = f"test-{uuid.uuid4().hex}"
        self._peers: list[Peer] = []

    def start(self, text: str) -> Peer:
        """A process that knows ``name``."""
        peer = Peer(text, self.name)
        self._peers.append(peer)
        return peer

    def run(self, text: str) -> str:
        """The same, to its end; what it says."""
        return self.start(text).end()

    def close(self) -> None:
        """End what runs still; remove what is left, and fail if there was something."""
        running = [peer.pid for peer in self._peers if peer.process.poll() is None]
        for peer in self._peers:
            peer.kill()
        left = [found.title for path in registry.registries(str(self.run_dir)) for found in registry.remove_all(path)]
        for kind in kernel.KINDS:
            try:
                found = kernel.find(kind, self.name)
            except FileNotFoundError:
                continue
            kernel.remove(kind, found.id)
            left.append(str(found))
        assert not running, f"left running: {running}"
        assert not left, f"left in the kernel: {left}"
