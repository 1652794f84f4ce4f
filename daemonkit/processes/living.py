"""The children of a fork server that live: reaped as they end, signalled, and swept up after."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import time
from typing import Final

from daemonkit.core import tree
from daemonkit.processes.receipt import MemoryKills, is_clean, reap

MARK: Final = "DAEMON_CHILD"  # in the environment of all that children start: whose they are
_SWEEP: Final = 0.05  # seconds after a child that ended well, until it is seen whether it has left processes


class _Child:
    __slots__ = ("adopts", "began", "id", "pid")

    def __init__(self, id: int, pid: int, began: float, adopts: bool) -> None:
        self.id, self.pid, self.began, self.adopts = id, pid, began, adopts


class Living:
    """The table of them, in a process that nobody else waits for a child in."""

    def __init__(self) -> None:
        """None yet."""
        self._by_pid: dict[int, _Child] = {}
        self._by_id: dict[int, _Child] = {}
        self._kills = MemoryKills()
        self.closing: set[int] = set()  # PIDs of those that have something to close at the end
        self.sweep_at = math.inf  # when ``end_orphans`` is to be called (monotonic seconds)

    def add(self, number: int, pid: int, began: float, *, adopts: bool) -> None:
        """Child ``number`` was forked; it ``adopts`` what its descendants leave behind (prctl(2), subreaper).

        ``began``: in monotonic seconds, before the fork: else it could live longer than its receipt says.
        """
        self._by_pid[pid] = self._by_id[number] = _Child(number, pid, began, adopts)

    def reap(self) -> list[tuple[int, bytes]]:
        """Reap all that have ended; return their numbers and packed receipts.

        What one has left that could not clean up itself, is killed by then; what another has left, a moment later.
        """
        ended: list[tuple[int, bytes]] = []
        all_clean = True
        while (pid := _next_ended()) is not None:
            now = time.monotonic()
            made = self._by_pid.pop(pid, None)
            self.closing.discard(pid)
            receipt = reap(pid, made.began if made else now, now, self._kills)
            if made is not None and receipt is not None:  # else it is an orphan of a child's
                del self._by_id[made.id]
                ended.append((made.id, receipt))
                all_clean = all_clean and is_clean(receipt)
        if not all_clean:
            self.end_orphans()
        elif self.sweep_at == math.inf:  # not each time: to list our children costs more, the more there are
            self.sweep_at = time.monotonic() + _SWEEP
        return ended

    def signal(self, number: int, sent: int) -> bool:
        """Send signal ``sent``; False if no such child lives."""
        made = self._by_id.get(number)
        if made is None:
            return False
        try:
            os.kill(made.pid, sent)
        except OSError as error:  # it has become another user's
            print(f"fork server: send signal {sent} to pid {made.pid}: {error.strerror}", file=sys.stderr)
        return True

    def kill_tree(self, number: int) -> bool:
        """SIGKILL it and all that descends from it; False if no such child lives."""
        made = self._by_id.get(number)
        if made is None:
            return False
        _kill(made.pid)
        return True

    def await_closing(self, timeout: float) -> None:
        """Wait for the end of those that have something to close, for ``timeout`` seconds at most."""
        until = time.monotonic() + timeout
        for pid in self.closing:  # ours, and not reaped: its number is its own
            with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll(max(until - time.monotonic(), 0) * 1000)

    def end_orphans(self) -> None:
        """Kill what children have left that did not clean up themselves (row 25).

        A living child adopts what its own leave behind: what we have adopted, was left by one that has ended.  But for
        the others that do not adopt, whose are known by their environment (programs), or by their title and by being
        younger (only forked): the next of the same title may live by now.
        """
        self.sweep_at = math.inf
        orphans = tree.children() - self._by_pid.keys()
        if not orphans:
            return
        others = [made for made in self._by_pid.values() if not made.adopts]
        ages: dict[bytes, int] = {}
        for made in others:
            title, age = _read(made.pid, "cmdline"), _started(made.pid)
            ages[title] = min(age, ages.get(title, age))
        marks = {f"{MARK}={mark(os.getpid(), made.id)}".encode() for made in others}
        for pid in orphans:
            since = ages.get(_read(pid, "cmdline"))
            is_forked = since is not None and _started(pid) >= since
            if not is_forked and not marks & set(_read(pid, "environ").split(b"\0")):
                _kill(pid)


def _next_ended() -> int | None:
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if ended is None else ended.si_pid


def mark(server: int, number: int) -> str:
    """The value of ``MARK`` for child ``number`` of the fork server with PID ``server``."""
    return f"{server}.{number}"


def _kill(pid: int) -> None:
    """Kill our child, living or ended, with all below it: not reaped, its number is its own."""
    try:
        with open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
            tree.kill(pid, pidfd.fileno())
    except OSError as error:  # it has become another user's, or there is no room for a descriptor
        print(f"fork server: kill pid {pid} and all below it: {error.strerror}", file=sys.stderr)


def _started(pid: int) -> int:
    """When it was forked, in ticks since the system's start (proc(5), stat); 0 if it is gone."""
    words = _read(pid, "stat").rpartition(b")")[2].split()
    return int(words[19]) if words else 0


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""
