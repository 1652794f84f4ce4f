"""Who has reserved a task, so that others on this host can see whether he lives."""

from __future__ import annotations

import os


def myself() -> str:
    """This process: the namespace of its number (pid_namespaces(7)), the number, and when it began (proc(5), stat)."""
    return f"{_namespace()}.{os.getpid()}.{_began(os.getpid())}"


def is_dead(owner: str | None) -> bool:
    """Whether the owner has ended for certain; one in another namespace cannot be seen."""
    if owner is None:
        return False
    namespace, _, rest = owner.partition(".")
    pid, _, began = rest.partition(".")
    if namespace != _namespace() or not pid.isdecimal():
        return False
    return _began(int(pid)) != began


def _namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "0"


def _began(pid: int) -> str:
    """In clock ticks since the boot; empty for a process that has ended, reaped or not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if words[0] in (b"Z", b"X") else words[19].decode()
