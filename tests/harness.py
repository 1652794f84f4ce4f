"""One box a test: a run directory, a log, the real command, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemonkit.core.inotify import wait_until
from daemonkit.core.pidfile import inspect

PATIENCE = 30.0  # seconds: only a bound; every wait ends with its event
DYING = 5.0  # seconds, only a bound as well: what was told to end may take a moment for it


class Box:
    """Starts daemons in a directory of their own and ends whatever they leave."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_dir = path / "run"
        self.run_dir.mkdir(mode=0o755)
        self.log = path / "daemon.log"
        self.mark = uuid.uuid4().hex
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("DAEMONKIT_")},
            "BOX_MARK": self.mark,
            "DAEMONKIT_RUN_DIR": str(self.run_dir),
            "DAEMONKIT_LOG": str(self.log),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for key in ("NOTIFY_SOCKET", "INVOCATION_ID"):
            self.environ.pop(key, None)

    def script(self, text: str, name: str = "beat.py") -> Path:
        """Write a script; the usual imports are there."""
        path = self.path / name
        head = "import logging, os, signal, sys, time\nfrom daemonkit import *\nlog = logging.getLogger('test')\n"
        path.write_text(head + textwrap.dedent(text))
        return path

    def command(self, *args: str | Path) -> list[str]:
        """The command line of ``daemonkit ARGS``."""
        return [sys.executable, "-m", "daemonkit", *map(str, args)]

    def call(self, *args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run ``daemonkit ARGS`` to its end."""
        options = {"env": self.environ, "cwd": self.path, "timeout": 120, **options}
        return subprocess.run(self.command(*args), capture_output=True, text=True, check=False, **options)

    def popen(self, *args: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start ``daemonkit ARGS`` and do not wait."""
        options = {
            "env": self.environ,
            "cwd": self.path,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            **options,
        }
        return subprocess.Popen(self.command(*args), text=True, **options)

    def start(self, text: str, *args: str, name: str = "beat.py") -> int:
        """Start a script as a daemon; its PID."""
        done = self.call("start", *args, self.script(text, name))
        assert done.returncode == 0, done.stdout + done.stderr
        pid = self.pid(name.removesuffix(".py"))
        assert pid is not None
        return pid

    def pid(self, name: str = "beat") -> int | None:
        """Who holds the PID file."""
        state = inspect(str(self.run_dir / f"{name}.pid"))
        return state.pid if state.locked else None

    def status(self, name: str = "beat") -> dict[str, Any]:
        """What ``status --json`` says."""
        answer: dict[str, Any] = json.loads(self.call("status", "--json", name).stdout)
        return answer

    def job(self, job: str, name: str = "beat") -> dict[str, Any]:
        """One job of ``status --json``."""
        found: dict[str, Any] = next(each for each in self.status(name)["jobs"] if each["name"] == job)
        return found

    def await_status(self, holds: Callable[[dict[str, Any]], object], name: str = "beat") -> dict[str, Any]:
        """Ask for the status, each time by a process, until what is said ``holds``; that status."""
        until = time.monotonic() + PATIENCE
        while not holds(answer := self.status(name)):
            assert time.monotonic() < until, answer
        return answer

    def children(self, name: str = "beat") -> list[dict[str, Any]]:
        """All rows of the children's table, once whoever is to run has a PID there.

        A child may have logged a line before its fork server has told the master that there is one.
        """

        def are_forked(answer: dict[str, Any]) -> bool:
            rows = answer.get("children")  # None: it was too busy to answer
            return rows is not None and all(row["pid"] or row["state"] in ("backoff", "fatal") for row in rows)

        rows: list[dict[str, Any]] = self.await_status(are_forked, name)["children"]
        return rows

    def await_child(self, child: str, state: str, name: str = "beat") -> dict[str, Any]:
        """The row of ``child``, once it is in ``state`` and forked: it may work before the master has heard so."""

        def found(answer: dict[str, Any]) -> list[dict[str, Any]]:
            rows = answer.get("children", [])
            return [row for row in rows if (row["name"], row["state"]) == (child, state) and row["pid"]]

        return found(self.await_status(found, name))[0]

    def await_log(self, text: str, count: int = 1) -> str:
        """Sleep until ``text`` stands in the log ``count`` times; the whole log."""
        return self.await_file(self.log, text, count)

    def await_file(self, path: Path, text: str = "", count: int = 1) -> str:
        """Sleep until ``text`` stands in ``path`` ``count`` times; its content."""

        def look() -> str | None:
            try:
                content = path.read_text(errors="replace")
            except FileNotFoundError:
                return None
            return content if content.count(text) >= count else None

        content = wait_until(str(path.parent), look, PATIENCE)
        assert content is not None, f"{text!r} x {count} not in {path}:\n{path.read_text() if path.exists() else ''}"
        return content

    def processes(self) -> dict[int, str]:
        """Living processes that descend from this box, by their environment's mark."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if f"BOX_MARK={self.mark}".encode() in (entry / "environ").read_bytes() and state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def close(self) -> None:
        """Stop what holds a PID file here; fail if anything else does not end by itself soon, and end it."""
        for pidfile in self.run_dir.glob("*.pid"):
            with contextlib.suppress(Exception):
                if inspect(str(pidfile)).locked:
                    self.call("kill", "--timeout", "2", "--run-dir", self.run_dir, pidfile.stem)
        until = time.monotonic() + DYING
        for pid in self.processes():
            with contextlib.suppress(AssertionError):
                await_end(pid, max(0, until - time.monotonic()))
        left = self.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"left running: {left}"


def await_end(pid: int, timeout: float = PATIENCE) -> None:
    """Sleep until process ``pid`` has ended."""
    import select

    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], timeout)[0], f"pid {pid} did not end"
    finally:
        os.close(pidfd)
