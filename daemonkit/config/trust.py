"""Whom we obey: a file that somebody else may change is his command, not ours.

For root the whole path counts, link by link from ``/`` down, as for sshd's StrictModes: who may write a directory
may replace all that is below it.  Once every part belongs to root alone, nobody but root can change the answer
between this check and the ``open`` that follows it.

Other users are asked less: a service account runs code that a deployer owns.  For them no part of the path may be
open to everybody; and a file that nobody named, but that was merely found in the current directory, must be their
own or root's (the same reasoning as git's ``safe.directory``).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

from daemonkit.errors import RunDirectoryError, UntrustedFile

MAX_LINKS: Final = 40  # as the kernel: path_resolution(7)
ROOT_GROUP: Final = 0
_ELSEWHERE: Final = "choose another --run-dir"


class Part(NamedTuple):
    """One step on the way to a file: a directory, a symbolic link, or the file itself."""

    path: str
    status: os.stat_result


def check_trusted(path: str, *, uid: int | None = None, named: bool = True) -> None:
    """Refuse a file or directory that another user may change or replace.

    Args:
        path: looked at as the kernel resolves it, every link and its target.
        uid: a user who is trusted besides root; default: the effective one.
        named: False if the file was found rather than asked for.

    Raises:
        UntrustedFile: names the first part of the path that is not safe, and the remedy.
        OSError: the path cannot be followed to its end.
    """
    strict = os.geteuid() == 0
    trusted = {0, os.geteuid() if uid is None else uid} if strict or not named else None
    fault = _fault(path, trusted, stat.S_IWGRP | stat.S_IWOTH if strict else stat.S_IWOTH)
    if fault is None:
        return
    remedy = "chown and chmod it" if strict or named else "chown it, or name the file with --config if you trust it"
    raise UntrustedFile(f"trust {path}: {fault}; {remedy}")


def prepare_run_dir(path: str, *, owner: str | None = None) -> None:
    """Make sure that ``path`` is a directory in which nobody else can plant files; create it if its parent exists.

    Root's directory is readable by all (0755: ``status`` is for everybody), another user's is private (0700).

    Args:
        path: absolute.
        owner: name or number of a user who may own it besides root and ourselves: the one that the daemon becomes.

    Raises:
        RunDirectoryError: it cannot be made, or must not be used; nothing in it was touched.
    """
    _make(path)
    try:
        _check_run_dir(path, {0, os.geteuid(), *_uid(owner)})
    except OSError as error:
        raise RunDirectoryError(f"use {path} as run directory: {_reason(error)}; {_ELSEWHERE}") from error


def _make(path: str) -> None:
    mode = 0o755 if os.geteuid() == 0 else 0o700
    try:
        os.mkdir(path, mode)
        os.chmod(path, mode)  # mkdir's mode goes through the umask
    except FileExistsError:
        return  # also if another start made it a moment ago
    except FileNotFoundError as error:
        parent = os.path.dirname(path)
        raise RunDirectoryError(
            f"create run directory {path}: {parent} does not exist; create it, or {_ELSEWHERE}"
        ) from error
    except OSError as error:
        raise RunDirectoryError(f"create run directory {path}: {_reason(error)}; {_ELSEWHERE}") from error


def _check_run_dir(path: str, owners: set[int]) -> None:
    here = os.lstat(path)
    if stat.S_ISLNK(here.st_mode) and here.st_uid not in owners:
        raise _unusable(path, f"it is a symbolic link that belongs to {_user(here.st_uid)}", "remove it")
    try:
        there = os.stat(path)
    except FileNotFoundError:
        raise _unusable(path, "it is a symbolic link to nothing", "remove it") from None
    if not stat.S_ISDIR(there.st_mode):
        raise _unusable(path, f"it is {_kind(there.st_mode)}, not a directory", "remove it")
    if there.st_uid not in owners:
        raise _unusable(path, f"it belongs to {_user(there.st_uid)}, not to {_user(os.geteuid())}", "chown it")
    if there.st_mode & stat.S_IWOTH:
        # The sticky bit would not help: it forbids removing, not planting, NAME.pid or NAME.sock.
        raise _unusable(path, "everybody may write it", f"chmod o-w {path}")
    if os.geteuid() == 0 and (fault := _fault(path, owners, stat.S_IWGRP | stat.S_IWOTH)):
        raise _unusable(path, fault, "chown and chmod it")
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise _unusable(path, "its file system is read-only", "remount it")
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise _unusable(path, f"{_user(os.geteuid())} may not write it", "chown it")


def _unusable(path: str, why: str, remedy: str) -> RunDirectoryError:
    return RunDirectoryError(f"use {path} as run directory: {why}; {remedy}, or {_ELSEWHERE}")


def _fault(path: str, trusted: set[int] | None, forbidden: int) -> str | None:
    """The first reason not to trust ``path``: an owner outside ``trusted`` or a mode within ``forbidden``."""
    excused: str | None = None
    for part, status in _walk(path):
        # Who comes next in a sticky directory cannot be replaced by others, but may have been put there by them.
        planted = excused and status.st_uid not in (0, os.geteuid())
        if planted or (trusted is not None and status.st_uid not in trusted):
            return f"{part} belongs to {_user(status.st_uid)}"
        if stat.S_ISLNK(status.st_mode):
            continue  # a link has no mode of its own (symlink(7))
        fault = _open_to(part, status, forbidden)
        excused = fault if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX else None
        if fault and not excused:
            return fault
    return excused  # the sticky bit excuses a directory on the way, not the one that is meant


def _open_to(part: str, status: os.stat_result, forbidden: int) -> str | None:
    if status.st_mode & forbidden & stat.S_IWOTH:
        return f"everybody may write {part}"
    # Members of root's own group are taken for root: images often hold files with mode 0664 root:root.
    if status.st_mode & forbidden & stat.S_IWGRP and status.st_gid != ROOT_GROUP:
        return f"group {_group(status.st_gid)} may write {part}"
    return None


def _walk(path: str) -> Iterator[Part]:
    """Every part that the kernel would visit, links before their targets (path_resolution(7))."""
    todo = (path if path.startswith("/") else os.path.join(os.getcwd(), path)).split("/")[::-1]
    here, links = "/", 0
    yield Part(here, os.lstat(here))
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)  # `here` holds no links: they were resolved on the way
            yield Part(here, os.lstat(here))
            continue
        part = os.path.join(here, name)
        status = os.lstat(part)
        yield Part(part, status)
        if not stat.S_ISLNK(status.st_mode):
            here = part
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        target = os.readlink(part)
        if target.startswith("/"):
            here = "/"
            yield Part(here, os.lstat(here))
        todo += target.split("/")[::-1]


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _uid(owner: str | None) -> set[int]:
    """The number of ``owner``; of an unknown one nothing can be (taking it on will fail, and say so)."""
    if owner is None or owner.isdigit():
        return set() if owner is None else {int(owner)}
    import pwd

    try:
        return {pwd.getpwnam(owner).pw_uid}
    except KeyError:
        return set()


def _user(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid {uid}"


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
