"""The kernel objects that one daemon and its children make with daemonkit.ipc: gone when it is.

Neither daemonkit.ipc nor logging is loaded here unless there is something to remove: each kill comes by.
"""

from __future__ import annotations

import contextlib
import os

from daemonkit.errors import DaemonkitError


def registry_of(pid_path: str) -> str:
    """The registry beside a PID file, as daemonkit.ipc.registry has it, which is not to be loaded for that."""
    return f"{pid_path.removesuffix('.pid')}.ipc"


def make_registry_for(pid_path: str, uid: int, gid: int) -> None:
    """Make the registry, while we are root, for the user that we become: who may not make files in root's directory."""
    with open(os.open(registry_of(pid_path), os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)) as file:
        os.fchown(file.fileno(), uid, gid)


def remove_left(pid_path: str) -> None:
    """Remove what a crashed daemon has left; the caller holds its PID file."""
    _remove(pid_path, only_of_the_dead=True)


def remove_own(pid_path: str) -> None:
    """Remove what this daemon has made."""
    _remove(pid_path, only_of_the_dead=False)


def sweep(pid_path: str) -> None:
    """Remove what a crashed daemon has left, and its registry: it may be root's to remove, made for another user."""
    remove_left(pid_path)
    if not _has_entries(registry_of(pid_path)):
        with contextlib.suppress(OSError):
            os.unlink(registry_of(pid_path))


def _remove(pid_path: str, *, only_of_the_dead: bool) -> None:
    path = registry_of(pid_path)
    if not _has_entries(path):
        return
    import logging

    from daemonkit.ipc import registry

    log = logging.getLogger("daemonkit")
    try:
        removed = registry.remove_of_dead_creators(path) if only_of_the_dead else registry.remove_all(path)
    except (DaemonkitError, OSError) as error:
        log.error("kernel objects of %s are left: %s", path, error)
        return
    for found in removed:
        why = f", left by pid {found.entry.pid}, which is dead" if only_of_the_dead else ""
        log.info("removed %s%s", found.title, why)


def _has_entries(path: str) -> bool:
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False
