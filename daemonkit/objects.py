"""The kernel objects that one daemon and its children make with daemonkit.ipc: gone when it is.

Nothing of daemonkit.ipc is loaded here unless there is something to remove.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

from daemonkit.errors import DaemonkitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemonkit.ipc.registry import Found

log = logging.getLogger("daemonkit")


def registry_of(pid_path: str) -> str:
    """The registry beside a PID file, as daemonkit.ipc.registry has it, which is not to be loaded for that."""
    return f"{pid_path.removesuffix('.pid')}.ipc"


def make_registry_for(pid_path: str, uid: int, gid: int) -> None:
    """Make the registry, while we are root, for the user that we become: who may not make files in root's directory."""
    with open(os.open(registry_of(pid_path), os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as file:
        os.fchown(file.fileno(), uid, gid)


def remove_left(pid_path: str) -> None:
    """Remove what a crashed daemon has left; the caller holds its PID file."""
    path = registry_of(pid_path)
    if _has_entries(path):
        from daemonkit.ipc import registry

        for found in _removed(registry.remove_of_dead_creators, path):
            log.info("removed %s, left by pid %d, which is dead", found.title, found.entry.pid)


def sweep(pid_path: str) -> None:
    """The same, and no registry is left: it may be root's to remove what he has made for the daemon's user."""
    remove_left(pid_path)
    if not _has_entries(registry_of(pid_path)):
        with contextlib.suppress(OSError):
            os.unlink(registry_of(pid_path))


def remove_own(pid_path: str) -> None:
    """Remove what this daemon has made."""
    path = registry_of(pid_path)
    if _has_entries(path):
        from daemonkit.ipc import registry

        for found in _removed(registry.remove_all, path):
            log.info("removed %s", found.title)


def _has_entries(path: str) -> bool:
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False


def _removed(remove: Callable[[str], list[Found]], path: str) -> list[Found]:
    try:
        return remove(path)
    except (DaemonkitError, OSError) as error:
        log.error("kernel objects of %s are left: %s", path, error)
        return []
