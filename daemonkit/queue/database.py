"""One SQLite file, many processes: each with a connection of its own, writing one after the other.

Writers wait for each other at a lock file, with flock(2): in the kernel's order and woken at once, where SQLite itself
looks again after up to 100 ms.  Under the lock checkpoints are made, too, so none ever meets a writer: SQLite before
3.51.3 can damage a file then (sqlite.org/wal.html, "The WAL-Reset Bug").  A program that knows nothing of the lock may
write as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sqlite3
import weakref
from collections.abc import Iterator
from typing import Final

from daemonkit.errors import BrokerError, BrokerFull
from daemonkit.ipc.bound import interrupted_after
from daemonkit.queue import statements

PATIENCE: Final = 10.0  # seconds that a writer waits for the others
_DISKS: Final = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "afs",
    "ceph",
    "lustre",
    "gpfs",
    "beegfs",
    "gfs2",
    "ocfs2",
    "9p",
)
_FUSE: Final = ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph")
_NETWORK: Final = frozenset((*_DISKS, *_FUSE))
_VANISHING: Final = frozenset(["tmpfs", "ramfs"])
_FULL: Final = 2  # PRAGMA synchronous
_MENDED: Final = (3, 51, 3)
_libc = ctypes.CDLL(None, use_errno=True)


class Database:
    """A connection."""

    def __init__(self, path: str, synchronous: str, *, make: bool) -> None:
        """Open ``path``; if it is not there and ``make`` says so, make it, for its owner alone.

        Raises:
            BrokerError: it cannot be opened, is no queue of ours, or lies on a network file system.
        """
        self.path = path
        self._pid = os.getpid()
        directory = os.path.dirname(path)
        if (kind := file_system_of(directory)) in _NETWORK:
            raise BrokerError(
                f"open {path}: it lies on {kind}; SQLite's write-ahead log needs the memory of one host "
                "(sqlite.org/wal.html): name a file on a local disk"
            )
        if not make and not os.path.exists(path):
            raise BrokerError(f"open {path}: no queue is there; nothing was put yet, or another --broker is meant")
        with self._told():
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(path, flags, 0o600))  # SQLite gives its other files the same mode
            self._lock = os.open(f"{path}-lock", flags, 0o600)
            self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            _open.add(self)
            with self._alone():
                self._begin(synchronous)

    def _begin(self, synchronous: str) -> None:
        connection = self.connection
        for line in statements.SETTINGS.format(synchronous=synchronous).split(";"):
            connection.execute(line)
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise BrokerError(
                f"open {self.path}: SQLite cannot keep a write-ahead log there; name a file on a local disk"
            )
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            connection.executescript(f"BEGIN IMMEDIATE;{statements.TABLES}COMMIT;")
        elif version != statements.VERSION:
            raise BrokerError(f"open {self.path}: it is no queue of this version of daemonkit; name another file")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all that is done within ``with``, or nothing of it.

        Raises:
            BrokerFull: there is no room on the disk.
            BrokerError: the file cannot be written.
        """
        self._check()
        with self._told(), self._alone():
            connection = self.connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For queries whose rows are all fetched; one left open would keep the log from being used anew.

        Raises:
            BrokerError: the file cannot be read.
        """
        self._check()
        with self._told():
            yield self.connection

    def await_writer(self) -> None:
        """Return when whoever writes now has done so: a change of the log is seen before it counts.

        Raises:
            BrokerError: that takes too long.
        """
        with self._told(), self._alone():
            pass

    def close(self) -> None:
        """Close the connection; the last one to do so folds the log into the file."""
        if self._pid != os.getpid():
            return
        _open.discard(self)
        with self._told(), self._alone():
            self.connection.close()
        os.close(self._lock)

    def doctor(self) -> list[str]:
        """What would be lost when, in sentences."""
        with self.reading() as connection:
            level = connection.execute("PRAGMA synchronous").fetchone()[0]
            sound = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        space = os.statvfs(os.path.dirname(self.path))
        kind = file_system_of(os.path.dirname(self.path)) or "an unknown file system"
        lines = [
            f"{self.path}, on {kind}, {space.f_bavail * space.f_frsize / 2**20:,.0f} MB free",
            "a killed process loses nothing",
            "a power cut loses nothing that was accepted (synchronous=FULL)"
            if level >= _FULL
            else "a power cut loses the last puts, and repeats the last tasks (synchronous=NORMAL)",
            "the file is sound"
            if sound == "ok"
            else f"THE FILE IS DAMAGED: {sound}; stop all, and try sqlite3's .recover",
        ]
        if kind in _VANISHING:
            lines.append(f"A BOOT LOSES ALL: {kind} is kept in memory; name a file on a disk as broker")
        if sqlite3.sqlite_version_info < _MENDED:
            lines.append(
                f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug (mended in 3.51.3); we keep clear of it, "
                "as long as nobody else writes the file"
            )
        return lines

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise BrokerError(f"use {self.path}: this connection is that of pid {self._pid}; open one after the fork")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._await_lock()
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _await_lock(self) -> None:
        with interrupted_after(PATIENCE):
            if _libc.flock(self._lock, fcntl.LOCK_EX) != 0:
                raise BrokerError(
                    f"write {self.path}: another process has held {self.path}-lock for {PATIENCE:g} s; "
                    "see lslocks(8) for its number: it may be stopped"
                )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what SQLite or the system says in a word, in a sentence."""
        try:
            yield
        except sqlite3.Error as error:
            words = str(error)
            if "full" in words or "disk I/O" in words:
                raise BrokerFull(f"write {self.path}: {words}; make room on the disk") from error
            advice = _ADVICE.get(type(error), "look at the file and its directory")
            raise BrokerError(f"use {self.path}: {words}; {advice}") from error
        except OSError as error:
            if isinstance(error, BrokerError):
                raise
            raise BrokerError(
                f"open {self.path}: {error.strerror}; make its directory writable for this user"
            ) from error


_ADVICE: Final[dict[type[sqlite3.Error], str]] = {
    sqlite3.DatabaseError: "it is no SQLite file, or damaged: move it away, and try sqlite3's .recover on it",
    sqlite3.OperationalError: "see who has it open (lsof), and that this user may write it and its directory",
}
_open: weakref.WeakSet[Database] = weakref.WeakSet()


def _forsake() -> None:
    """We are a fork: our parent's connection may not even be closed here (sqlite.org/howtocorrupt.html, 2.6)."""
    for database in _open:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(database.connection))
    _open.clear()


os.register_at_fork(after_in_child=_forsake)


def file_system_of(path: str, mounts: str = "/proc/self/mountinfo") -> str:
    """The type of the file system that ``path`` lies on (proc(5), mountinfo); empty if that cannot be known."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open(mounts) as file:
            for line in file:
                words = line.split()
                if words[2] == wanted:
                    return words[words.index("-") + 1]
    except (OSError, ValueError):
        return ""
    return ""
