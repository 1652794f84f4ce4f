"""How a child ended, and what it has used: told once, by whoever reaped it."""

from __future__ import annotations

import os
import signal
from typing import NamedTuple


class Receipt(NamedTuple):
    """The end of one child."""

    pid: int
    exit_code: int | None  # None: a signal ended it
    signal: int | None
    out_of_memory: bool  # probably: the kernel killed it while its cgroup counted such a kill
    cpu: float  # seconds, with what its own reaped children used
    max_rss: int  # bytes
    wall: float  # seconds from fork to end

    @property
    def is_clean(self) -> bool:
        """Whether it ended by itself, with status 0."""
        return self.exit_code == 0

    @property
    def reason(self) -> str:
        """In words: ``exited with status 3``, ``killed by SIGKILL, probably out of memory``."""
        if self.signal is None:
            return f"exited with status {self.exit_code}"
        why = ", probably out of memory" if self.out_of_memory else ""
        return f"killed by {_name(self.signal)}{why}"

    def __str__(self) -> str:
        used = f"{self.cpu:.2f} s of CPU, {self.max_rss / 2**20:.0f} MB"
        return f"pid {self.pid} {self.reason} after {self.wall:.2f} s ({used})"


class MemoryKills:
    """How many processes of our cgroup the kernel has killed for want of memory (cgroups(7))."""

    def __init__(self) -> None:
        """Remember the count as it is now."""
        self._path = _events_file()
        self._seen = self._count()

    def has_grown(self) -> bool:
        """Whether there was another one since the last call."""
        before, self._seen = self._seen, self._count()
        return self._seen > before

    def _count(self) -> int:
        if self._path is None:
            return 0
        try:
            with open(self._path) as file:
                words = file.read().split()
        except OSError:
            return 0
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def reap(pid: int, began: float, now: float, kills: MemoryKills) -> Receipt | None:
    """Reap our own child ``pid`` if it has ended (wait4(2)); None if it has not.

    Args:
        pid: a child that nobody else waits for.
        began: when it was forked, and
        now: the present, in seconds of the monotonic clock.
        kills: the kernel's count of such ends.

    Raises:
        ChildProcessError: it is no child of ours, or somebody else has reaped it.
    """
    done, status, usage = os.wait4(pid, os.WNOHANG)
    if done == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    number = -code if code < 0 else None
    return Receipt(
        pid,
        None if number else code,
        number,
        number == signal.SIGKILL and kills.has_grown(),
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
        now - began,
    )


def _events_file() -> str | None:
    """The file of our cgroup that counts such kills (cgroups(7)): version 2's if it is there, else version 1's."""
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return None
    for _, controllers, own in groups:
        if controllers == "":
            path = f"/sys/fs/cgroup{own.rstrip('/')}/memory.events"
        elif "memory" in controllers.split(","):
            path = f"/sys/fs/cgroup/memory{own.rstrip('/')}/memory.oom_control"
        else:
            continue
        if os.path.exists(path):
            return path
    return None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
