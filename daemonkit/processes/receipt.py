"""How a child ended, and what it has used: told once, by whoever reaped it."""

from __future__ import annotations

import os
import signal
import struct
from typing import Final, NamedTuple

_KILL: Final = int(signal.SIGKILL)
_PACKED: Final = struct.Struct("=ii?dqd")  # pid, status as of wait(2), and the rest in Receipt's order
_STATUS: Final = struct.Struct("=ii")
_TOGETHER: Final = 1.0  # seconds: those that the kernel kills at once are reaped within this


class Receipt(NamedTuple):
    """The end of one child."""

    pid: int  # 0: it was never forked
    exit_code: int | None  # None: a signal ended it
    signal: int | None
    out_of_memory: bool  # probably: the kernel killed it while its cgroup counted such a kill
    cpu: float  # seconds, with what its own reaped children used
    max_rss: int  # bytes, at most at one time, as ps counts: with what it shares with the fork server, so never less
    wall: float  # seconds from fork to end

    @property
    def is_clean(self) -> bool:
        """Whether it ended by itself, with status 0."""
        return self.exit_code == 0

    @property
    def reason(self) -> str:
        """In words: ``exited with status 3``, ``killed by SIGKILL, probably out of memory``, ``never begun``."""
        if self.pid == 0:
            return "never begun"
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
        self._unexplained = 0
        self._looked = 0.0

    def explain_one(self, now: float) -> bool:
        """Whether one that was ended by SIGKILL, and is reaped ``now`` (monotonic seconds), is probably among them.

        Several may be killed at once, and each is counted before it ends.  What nobody came for was somebody else.
        """
        if now - self._looked > _TOGETHER:
            self._unexplained = 0
        before, self._seen, self._looked = self._seen, self._count(), now
        self._unexplained += self._seen - before
        if self._unexplained <= 0:
            return False
        self._unexplained -= 1
        return True

    def _count(self) -> int:
        try:
            with open(self._path) as file:
                words = file.read().split()
        except OSError:
            return 0
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def reap(pid: int, began: float, now: float, kills: MemoryKills) -> bytes | None:
    """Reap our own child ``pid`` if it has ended (wait4(2)); its receipt, for ``unpack``; None if it has not.

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
    out_of_memory = status & 0x7F == _KILL and kills.explain_one(now)
    cpu = usage.ru_utime + usage.ru_stime
    return _PACKED.pack(pid, status, out_of_memory, cpu, usage.ru_maxrss * 1024, now - began)


def never_begun(status: int) -> bytes:
    """The receipt of a child that was not forked, packed as ``reap`` does; ``status`` as of wait(2)."""
    return _PACKED.pack(0, status, False, 0.0, 0, 0.0)


def is_clean(packed: bytes) -> bool:
    """Whether a packed receipt is of a child that ended by itself, with status 0."""
    return _STATUS.unpack_from(packed)[1] == 0  # type: ignore[no-any-return]


def unpack(packed: bytes) -> Receipt:
    """The receipt that ``reap`` has packed."""
    pid, status, out_of_memory, cpu, max_rss, wall = _PACKED.unpack(packed)
    code = os.waitstatus_to_exitcode(status)
    number = -code if code < 0 else None
    return Receipt(pid, None if number else code, number, out_of_memory, cpu, max_rss, wall)


def _events_file() -> str:
    """The file of our cgroup that counts such kills (cgroups(7)): version 2's if it is there, else version 1's.

    The root of version 2 has none; there it is the whole machine's (proc(5), /proc/vmstat).
    """
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        groups = []
    for _, controllers, own in groups:
        if controllers == "":
            root, name = "/sys/fs/cgroup", "memory.events"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.oom_control"
        else:
            continue
        # In a container whose cgroup namespace is not its own, the path is the host's; our group is what is mounted.
        for path in (f"{root}{own.rstrip('/')}/{name}", f"{root}/{name}"):
            if os.path.exists(path):
                return path
    return "/proc/vmstat"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
