"""Who has made an object: a process, known by PID and start time, in a world in which these numbers mean something."""

from __future__ import annotations

import os
import select


def world() -> str:
    """This boot, and these namespaces of objects and processes (namespaces(7))."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot} {os.stat('/proc/self/ns/ipc').st_ino} {os.stat('/proc/self/ns/pid').st_ino}"


def lives(pid: int, start: int) -> bool:
    """Whether the process that began at ``start`` under that number has not ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    try:
        # Read after the pidfd was opened: what differs now is another process that has the number.
        if start_of(pid) not in (start, None):
            return False
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return not poll.poll(0)  # readable: ended, perhaps not yet reaped
    finally:
        os.close(pidfd)


def start_of(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); None if it cannot be read, as under hidepid."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return None
