"""The nodes of a local tree as files: a directory each, whose file ``=`` is the node's own.

A node is made elsewhere and renamed into its place, and renamed away before it is taken apart: who is killed meanwhile
leaves nothing half done (rename(2)).

Whoever reads or writes holds the lock of the whole tree (flock(2)); the locked file counts the nodes that were created.
A session is a file, too, locked for as long as it lives, and its lines are the ephemeral nodes that it has created.  So
the kernel tells who has died, and whoever comes by next removes what that has left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Iterator
from typing import Final
from urllib.parse import quote, unquote

from daemonkit.cluster.tree import Node, parent_of
from daemonkit.config.trust import check_trusted
from daemonkit.errors import CoordinatorError, UntrustedFile, VersionMismatch

OWN: Final = "="  # in a node's directory; the name of a child is quoted, and so never this
_NEW: Final = "+"  # what is to become that
_MODE: Final = 0o700
_LONGEST: Final = 255  # bytes of a file's name
_COUNTER: Final = 20  # digits
_TRIM_AT: Final = 4096  # bytes of a session's file, from which on it is freed of what is no more
PATIENCE: Final = 10.0  # seconds that one waits for the others to read and write

_libc = ctypes.CDLL(None, use_errno=True)


class Files:
    """All below one directory."""

    def __init__(self, root: str) -> None:
        """Make what is not there.

        Raises:
            CoordinatorError: that cannot be, or the directory is somebody else's.
        """
        self.root = root
        self._trim_at = _TRIM_AT
        self._nodes = os.path.join(root, "nodes")
        self._sessions = os.path.join(root, "sessions")
        self._making = os.path.join(root, "making")  # a node that is no node yet
        self._removing = os.path.join(root, "removing")  # and one that is none any more
        with self._told("use"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(root, _MODE)
            _check_ours(root)  # before anything is written there
            for path in (self._nodes, self._sessions):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, _MODE)
            self._lock_file = os.path.join(root, "lock")
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open(self._lock_file, flags, 0o600)

    @contextlib.contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Nobody else reads or writes within the block; what the system refuses is told as the error of ``doing``.

        Raises:
            CoordinatorError: also when somebody else does so for more than ``PATIENCE`` seconds.
        """
        with self._told(doing):
            self._take_lock()
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def is_in_place(self, session: str, fd: int) -> bool:
        """Whether others who come to the directory's path find our lock, the nodes and the session's file.

        They do not when these were removed, or moved away: then they know nothing of us, nor we of them.
        """
        try:
            lock, file = os.stat(self._lock_file), os.stat(self.session_file(session))
            os.stat(self._nodes)
        except OSError:
            return False
        return os.path.samestat(lock, os.fstat(self._lock)) and os.path.samestat(file, os.fstat(fd))

    def places(self, session: str) -> tuple[list[str], list[str]]:
        """The directories and the files that ``is_in_place`` depends on."""
        directories = [self._sessions, self._nodes, self.root]
        while directories[-1] != "/":
            directories.append(os.path.dirname(directories[-1]))
        return directories, [self._lock_file, self.session_file(session)]

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._lock)

    def count(self) -> int:
        """The next number: higher than any before, also if the directory was lost since.

        So it is no lower than the present moment, in microseconds since the epoch: nobody counts faster than that.
        """
        last = os.pread(self._lock, _COUNTER, 0)
        number = max(int(last) + 1 if last.isdigit() else 0, time.time_ns() // 1000)
        os.pwrite(self._lock, b"%0*d" % (_COUNTER, number), 0)
        return number

    def directory(self, path: str) -> str:
        """Where the node ``path`` is."""
        if path == "/":
            return self._nodes
        names = [quote(name, safe=" @:,()[]!") for name in path[1:].split("/")]
        if any(len(name) > _LONGEST for name in names):
            raise CoordinatorError(f"{path}: a part of it is too long for a file's name; choose a shorter one")
        return "/".join((self._nodes, *names))

    def create(self, node: Node) -> None:
        """Write a node that is not there, and those above it: all of it, or nothing."""
        self._make(parent_of(node.path))
        directory = self.directory(node.path)
        if os.path.isdir(directory):  # what is no node (see ``_read``) may stand there
            self._remove(node.path)
        _clear(self._making)
        os.mkdir(self._making, _MODE)
        _write(self._making, node)
        os.rename(self._making, directory)

    def write(self, node: Node) -> None:
        """Write a node whose directory is there: all of it, or nothing."""
        _write(self.directory(node.path), node)

    def read(self, path: str) -> Node | None:
        """Read a node; None: there is none, or its session is dead, which is cleaned up."""
        node = self._read(path)
        if node is None or not node.session or self.is_alive(node.session):
            return node
        self.bury(node.session)
        if self._read(path) is not None:  # the file of its session, which would have named it, was removed
            self._remove(path)
        return None

    def names(self, path: str) -> list[str] | None:
        """The names right below ``path``, also those of dead sessions; None: there is no such node."""
        try:
            found = os.listdir(self.directory(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return [unquote(name) for name in found if name not in (OWN, _NEW)]

    def change(self, path: str, data: bytes, version: int | None) -> int | None:
        """Write new data; return its version.  None: there is no such node."""
        node = self.read(path)
        if node is None:
            return None
        _check(node, version)
        self.write(node._replace(data=data, version=node.version + 1))
        return node.version + 1

    def remove(self, path: str, version: int | None) -> bool:
        """Remove a node; False: there is none."""
        node = self.read(path)
        if node is None:
            return False
        _check(node, version)
        for name in self.names(path) or ():
            if self.read(f"{path.rstrip('/')}/{name}") is not None:
                raise CoordinatorError(f"delete {path}: there are nodes below it; delete those first")
        self._remove(path)
        return True

    def open_session(self) -> tuple[str, int]:
        """Begin a session, which lives as long as any process has its descriptor open."""
        name = str(self.count())
        fd = os.open(self.session_file(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return name, fd

    def note(self, session: str, fd: int, path: str) -> None:
        """Let the node ``path``, which is about to be created, be removed with the session."""
        os.write(fd, f"{path}\n".encode())
        if os.fstat(fd).st_size < self._trim_at:
            return
        live = [each for each in self._noted(session) if each == path or self._belongs(each, session)]
        text = "".join(f"{each}\n" for each in live).encode()
        # Who is killed in between leaves nodes that are removed when somebody comes by: their session has no file.
        os.ftruncate(fd, 0)
        os.write(fd, text)
        self._trim_at = max(_TRIM_AT, 2 * len(text))

    def session_file(self, name: str) -> str:
        """Where the session ``name`` is."""
        return os.path.join(self._sessions, name)

    def is_alive(self, session: str) -> bool:
        """Whether any process has its descriptor open."""
        try:
            # For reading: so it is nobody's close of a writer, which is what the others wait for (inotify(7)).
            fd = os.open(self.session_file(session), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def bury(self, session: str) -> None:
        """Remove a session, and all that it has created as ephemeral."""
        try:
            paths = self._noted(session)
        except FileNotFoundError:
            return
        for path in paths:
            if self._belongs(path, session):
                self._remove(path)
        os.unlink(self.session_file(session))

    def bury_dead(self) -> None:
        """Do so for all sessions that are dead."""
        for session in os.listdir(self._sessions):
            if session.isdecimal() and not self.is_alive(session):
                self.bury(session)

    def _noted(self, session: str) -> list[str]:
        with open(self.session_file(session), errors="replace") as lines:
            return [line for line in lines.read().splitlines() if line.startswith("/")]

    def _belongs(self, path: str, session: str) -> bool:
        node = self._read(path)
        return node is not None and node.session == session

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            end = time.monotonic() + PATIENCE
        else:
            return
        from daemonkit.ipc.bound import interrupted_after

        while (left := end - time.monotonic()) > 0:
            with interrupted_after(left):
                if _libc.flock(self._lock, fcntl.LOCK_EX) == 0:
                    return
                if ctypes.get_errno() != errno.EINTR:  # that may be a signal for somebody else
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise CoordinatorError(
            f"use {self.root}: another process has held {self._lock_file} for {PATIENCE:g} s; see lslocks(8) for its "
            "number: it may be stopped"
        )

    def _read(self, path: str) -> Node | None:
        directory = self.directory(path)
        try:
            with open(f"{directory}/{OWN}", "rb") as file:
                return _node(path, file.read())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            # A power cut may have lost what was written, not by us.  It stands for those below it, if there are any.
            return Node(path, b"", 0, 0, "", 0.0) if path == "/" or self.names(path) else None

    def _make(self, path: str) -> None:
        if path != "/" and not os.path.isdir(self.directory(path)):
            self._make(parent_of(path))
            self.create(Node(path, b"", 0, self.count(), "", time.time()))

    def _remove(self, path: str) -> None:
        _clear(self._removing)
        os.rename(self.directory(path), self._removing)
        _clear(self._removing)

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except CoordinatorError:
            raise
        except OSError as error:
            raise CoordinatorError(f"{doing} {self.root}: {(error.strerror or str(error)).lower()}") from error


def _check_ours(root: str) -> None:
    """Raise CoordinatorError if somebody else has, or may have, a say in what is at ``root``."""
    link, found = os.lstat(root), os.stat(root)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid()):
        raise CoordinatorError(f"use {root}: it is a symbolic link of another user's; remove it")
    if not stat.S_ISDIR(found.st_mode):
        raise CoordinatorError(f"use {root}: it is no directory; name another")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise CoordinatorError(f"use {root}: it must be ours, and nobody else may write there (chmod 700)")
    if os.geteuid() == 0:
        try:
            check_trusted(root)
        except UntrustedFile as error:
            raise CoordinatorError(str(error)) from error


def _write(directory: str, node: Node) -> None:
    head = json.dumps(node._replace(path="", data=b"")._asdict() | {"data": None}).encode()
    new = f"{directory}/{_NEW}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(head + b"\n" + node.data)
        if not node.session:  # a power cut after the rename would leave an empty file; it ends all sessions anyway
            file.flush()
            os.fsync(fd)
    os.rename(new, f"{directory}/{OWN}")


def _clear(directory: str) -> None:
    """Remove a directory with all that is in it, if it is there."""
    try:
        found = list(os.scandir(directory))
    except FileNotFoundError:
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            _clear(entry.path)
        else:
            os.unlink(entry.path)
    os.rmdir(directory)


def _node(path: str, text: bytes) -> Node:
    """What ``_write`` has written; ValueError: somebody else has."""
    head, _, data = text.partition(b"\n")
    words = json.loads(head)
    try:
        version, number, session, created = (words[name] for name in ("version", "number", "session", "created"))
        node = Node(path, data, int(version), int(number), str(session), float(created))
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: no node") from error
    if node.session and not node.session.isdecimal():
        raise ValueError(f"{path}: no session of ours")
    if not math.isfinite(node.created):
        raise ValueError(f"{path}: no moment")
    return node


def _check(node: Node, version: int | None) -> None:
    if version is not None and version != node.version:
        raise VersionMismatch(f"{node.path} has version {node.version}, not {version}: read it again")
