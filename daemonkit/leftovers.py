"""Processes of a crashed daemon that nobody ended: found, and ended, before the next one starts.

The kernel ends them with their master (prctl(2)), so there are some only where that failed: a child that was set free
of it, or a fork server that was stopped.  They are known by the PID file in the environment that they were executed
with (proc(5), /proc/PID/environ), and by their titles or marks; whoever holds the lock on that file now knows that
none of them has a master.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import Final

from daemonkit.handover import PID_FILE
from daemonkit.processes.living import MARK

KILL_TIME: Final = 5.0  # seconds that the kernel may take to end them


def end(name: str, pid_path: str, master: int | None = None) -> int:
    """KILL what the daemon ``name`` has left, and wait until it is gone; tell how many there were.

    The caller holds the lock on ``pid_path``: so there is no ``master``, or it is the caller, who spares what descends
    from it.
    """
    pidfds = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(os.pidfd_open(int(entry)), "rb", buffering=0) as pidfd:
            # Looked at after the pidfd was opened: it means this process, and no later one of its number.
            if _is_left(int(entry), name, pid_path) and (master is None or not _descends(int(entry), master)):
                signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
                pidfds.append(os.dup(pidfd.fileno()))
    until = time.monotonic() + KILL_TIME
    for each in pidfds:
        select.select([each], [], [], max(until - time.monotonic(), 0))
        os.close(each)
    return len(pidfds)


def _is_left(pid: int, name: str, pid_path: str) -> bool:
    if os.stat(f"/proc/{pid}").st_uid != os.geteuid() and os.geteuid() != 0:
        return False
    environ = _read(pid, "environ").split(b"\0")
    if f"{PID_FILE}={pid_path}".encode() not in environ:
        return False
    is_marked = any(line.startswith(f"{MARK}=".encode()) for line in environ)
    return is_marked or _read(pid, "cmdline").startswith(f"{name}: ".encode())


def _descends(pid: int, ancestor: int) -> bool:
    while pid not in (0, ancestor):
        pid = int(_read(pid, "stat").rpartition(b")")[2].split()[1])
    return pid == ancestor


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()
