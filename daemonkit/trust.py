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


def prepare_run_dir(path: str, *, uid: int | None = None) -> None:
    """Make sure that ``path`` is a directory in which nobody else can plant files; create it if its parent exists.

    Root's directory is readable by all (0755: ``status`` is for everybody), another user's is private (0700).

    Args:
        path: absolute.
        uid: a user who may own it besides root; default: the effective one.

    Raises:
        RunDirectoryError: it cannot be made, or must not be used; nothing in it was touched.
    """
    owners = {0, os.geteuid() if uid is None else uid}
    _make(path)
    try:
        _check_run_dir(path, owners)
    except OSError as error:
        raise RunDirectoryError(f"use {path} as run directory: {_reason(error)}; {_ELSEWHERE}") from error


_ELSEWHERE: Final = "choose another --run-dir"


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
        # An existing directory on a read-only file system ends here too (EROFS precedes EEXIST on some).
        if not os.path.lexists(path):
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
        raise _unusable(path, f"it belongs to {_user(there.st_uid)}, not to {_user(max(owners))}", "chown it")
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
    sticky = False
    for part, status in _walk(path):
        owner, mode = status.st_uid, status.st_mode
        if trusted is not None and owner not in trusted:
            return f"{part} belongs to {_user(owner)}"
        if stat.S_ISLNK(mode):
            continue  # a link has no mode of its own (symlink(7))
        if sticky and owner != 0 and trusted is None and owner != os.geteuid():
            return f"{part} belongs to {_user(owner)} in a directory that everybody may write"
        # A sticky directory lets others add names, not replace ours: its parts' owners decide (checked above).
        sticky = stat.S_ISDIR(mode) and bool(mode & stat.S_ISVTX)
        if sticky:
            continue
        if mode & forbidden & stat.S_IWOTH:
            return f"everybody may write {part}"
        # Members of root's own group are taken for root: images often hold files with mode 0664 root:root.
        if mode & forbidden & stat.S_IWGRP and status.st_gid != ROOT_GROUP:
            return f"group {_group(status.st_gid)} may write {part}"
    return None


def _walk(path: str) -> Iterator[Part]:
    """Every part that the kernel would visit, links before their targets (path_resolution(7))."""
    todo = os.path.join(os.getcwd(), path).split("/")[::-1] if not path.startswith("/") else path.split("/")[::-1]
    here, links = "/", 0
    yield Part("/", os.lstat("/"))
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)  # `here` holds no links: they were resolved on the way
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
        here = "/" if target.startswith("/") else here
        todo += target.split("/")[::-1]


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


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
