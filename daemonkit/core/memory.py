"""How much memory more processes could have: what the machine has left, and what our cgroups let us have."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

_V1_UNLIMITED: Final = 2**60  # version 1 says "no limit" by a number near 2**63


class _Group(NamedTuple):
    """A cgroup with a limit (cgroups(7); the kernel's cgroup-v2.rst and cgroup-v1/memory.rst)."""

    limit: str
    usage: str
    stat: str
    cache: bytes  # the field of ``stat`` that can be had back at once


class Memory:
    """Asked again and again, so what is looked at is found once."""

    def __init__(self) -> None:
        """Find our cgroups."""
        self._groups = _groups()

    def available(self) -> int:
        """Bytes; a large number if nothing can be known."""
        left = [_machine(), *(_left(group) for group in self._groups)]
        return min((each for each in left if each is not None), default=2**62)


def _machine() -> int | None:
    try:
        with open("/proc/meminfo", "rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _left(group: _Group) -> int | None:
    limit, usage = _number(group.limit), _number(group.usage)
    if limit is None or usage is None or limit >= _V1_UNLIMITED:
        return None
    return limit - usage + _cache(group)


def _cache(group: _Group) -> int:
    try:
        with open(group.stat, "rb") as file:
            for line in file:
                name, _, value = line.partition(b" ")
                if name == group.cache:
                    return int(value)
    except OSError:
        return 0
    return 0


def _number(path: str) -> int | None:
    try:
        with open(path, "rb") as file:
            return int(file.read())
    except (OSError, ValueError):  # or "max"
        return None


def _groups() -> list[_Group]:
    """Our own cgroup and those above it: each may have a limit."""
    try:
        with open("/proc/self/cgroup") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    found: list[_Group] = []
    for number, kinds, path in lines:
        if number == "0":
            found += _up_from("/sys/fs/cgroup", path, "memory.max", "memory.current", b"inactive_file")
        elif "memory" in kinds.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file"
            found += _up_from("/sys/fs/cgroup/memory", path, *names)
    return found


def _up_from(root: str, path: str, limit: str, usage: str, cache: bytes) -> list[_Group]:
    # In a container the path may be the host's; then what is mounted is our group.
    directory = root + path if os.path.isdir(root + path) else root
    found = []
    while directory.startswith(root):
        if os.path.exists(f"{directory}/{limit}"):
            found.append(_Group(f"{directory}/{limit}", f"{directory}/{usage}", f"{directory}/memory.stat", cache))
        directory = os.path.dirname(directory.rstrip("/"))
    return found
