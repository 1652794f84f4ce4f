"""A fork server of its own for a test; its children run the Python text that they are sent."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from harness import PATIENCE, await_end

from daemonkit.processes.children import Child, Children
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import Wire, pair

IMPORTS = """\
import ctypes, os, resource, signal, socket, subprocess, sys, time
import setproctitle
from daemonkit.core import prctl, tree, waitid
from daemonkit.processes import child
from daemonkit.processes.children import Children, fork_server, serve_wire
from daemonkit.processes.wire import Message, Wire, pair
"""
ENTER = """
def enter(message):
    text = bytes(message.payload).decode()
    child.run(lambda: exec(text, {**globals(), "message": message}), TITLE)
"""
SERVE = "serve_wire(Wire(socket.socket(fileno=FD)), enter)\n"


class Asked:
    """One child that was asked for."""

    def __init__(self) -> None:
        self.child: Child
        self.receipt: Receipt | None = None

    @property
    def pid(self) -> int:
        assert self.child.pid is not None
        return self.child.pid


class Serving:
    """A fork server in a process of its own, and this process as the one that asks."""

    def __init__(self, before: str = "", wrap: Sequence[str] = (), enter: str = ENTER) -> None:
        """Start it; ``before`` runs in it first, ``wrap`` is a command that executes it."""
        self.title = f"test-{uuid.uuid4().hex}"
        ours, theirs = pair()
        ours.setblocking(False)
        text = f"{IMPORTS}\nTITLE, FD = '{self.title}: child', {theirs.fileno()}\n{before}\n{enter}\n{SERVE}"
        self.process = subprocess.Popen(
            [*wrap, sys.executable, "-c", text, self.title],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            env={**os.environ, "FORKING": self.title},
        )
        theirs.close()
        self.delays: list[OSError] = []
        self.children = Children(Wire(ours), lambda late, error: self.delays.append(error))
        self._poll = select.poll()
        self._poll.register(ours, select.POLLIN)

    def spawn(self, text: str = "", fds: Sequence[int] = (), *, adopts: bool = True) -> Asked:
        """Ask for a child that runs ``text``."""
        asked = Asked()

        def ended(child: Child, receipt: Receipt) -> None:
            asked.receipt = receipt

        asked.child = self.children.spawn(text.encode(), ended, fds=fds, adopts=adopts)
        return asked

    def until(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Hear the server until ``condition`` holds."""
        until = time.monotonic() + timeout
        while not condition():
            assert self._poll.poll(max(until - time.monotonic(), 0) * 1000), "the server says nothing"
            self.children.wire.flush()
            self.children.receive()

    def end_of(self, asked: Asked) -> Receipt:
        """Wait for its end."""
        self.until(lambda: asked.receipt is not None)
        assert asked.receipt is not None
        return asked.receipt

    def run(self, text: str, fds: Sequence[int] = ()) -> Receipt:
        """Ask for a child, and wait for its end."""
        return self.end_of(self.spawn(text, fds))

    def started(self, text: str, *, adopts: bool = True) -> Asked:
        """Ask for a child, and wait until it was forked and its text has written a byte into the descriptor READY."""
        reader, writer = os.pipe()
        asked = self.spawn(f"READY = message.fds[0]\n{text}", [writer], adopts=adopts)
        os.close(writer)
        try:
            self.until(lambda: asked.child.pid is not None)
            assert select.select([reader], [], [], PATIENCE)[0]
            assert os.read(reader, 1), "it ended before it was ready"
        finally:
            os.close(reader)
        return asked

    def told(self, text: str) -> tuple[Asked, str]:
        """Ask for a child; it, and the line that its text has written into the descriptor TELL."""
        reader, writer = os.pipe()
        asked = self.spawn(f"TELL = message.fds[0]\n{text}", [writer])
        os.close(writer)
        with open(reader) as file:
            self.until(lambda: asked.child.pid is not None)
            assert select.select([reader], [], [], PATIENCE)[0]
            return asked, file.readline()

    def close(self) -> str:
        """Close the wire, wait for the server's end, and return what it had on stderr; nothing may be left."""
        self.children.wire.close()
        _, error = self.process.communicate(timeout=PATIENCE)
        assert not living(self.title)
        return error.decode()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        said = self.close() if self.process.returncode is None else ""
        if error is not None and said:
            error.add_note(said)


def living(mark: str) -> dict[int, str]:
    """Processes, no zombies, with ``mark`` in their title or their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                title = (entry / "cmdline").read_bytes()
                if state not in "ZX" and mark.encode() in title + (entry / "environ").read_bytes():
                    found[int(entry.name)] = title.replace(b"\0", b" ").decode(errors="replace")[:80]
            except OSError:
                continue
    return found


def zombies(parent: int) -> int:
    """How many of the children of ``parent`` have ended and are not reaped."""
    count = 0
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            count += Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            continue
    return count


def descriptors(pid: int | str = "self") -> int:
    """How many it has open; but for files of /proc, which are read just now."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += not os.readlink(entry).startswith("/proc/")
    return count


__all__ = ["ENTER", "IMPORTS", "Asked", "Serving", "await_end", "descriptors", "living", "zombies"]
