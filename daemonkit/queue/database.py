"""One SQLite file, many processes: each with a connection of its own, writing one after the other.

Writers wait for each other at a lock file, with flock(2): in the kernel's order and woken at once, where SQLite itself
looks again after up to 100 ms.  Under the lock checkpoints are made, too, so none ever meets a writer: SQLite before
3.51.3 can damage a file then (sqlite.org/wal.html, "The WAL-Reset Bug").

Two things would make SQLite forget locks that it holds, and so lose what was written (sqlite.org/howtocorrupt.html, 2.2
and 2.6): to open and close the file beside it, and to fork.  So nobody here does the one, and before the other every
connection of the process is closed, and opened again when it is wanted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sqlite3
import stat
import struct
import time
import weakref
from collections.abc import Iterator
from typing import Final

from daemonkit.core.filesystem import file_system_of, is_network
from daemonkit.errors import BrokerError, BrokerFull, IpcError
from daemonkit.ipc.bound import interrupted_after
from daemonkit.queue import statements
from daemonkit.queue.forking import before_fork, exclusively

PATIENCE: Final = 10.0  # seconds that a writer waits for the others
_libc = ctypes.CDLL(None, use_errno=True)


_Identity = tuple[int, int] | None  # device and inode; None: nothing is there
_BESIDE: Final = ("", "-wal", "-shm", "-lock")  # the file, its log, the log's index, and the writers' lock
_SHARED: Final = 0x40000002, 510  # bytes that SQLite locks: whoever folds the log needs them alone (its os.h)
_TICK: Final = 50_000_000  # nanoseconds: a directory's time is that of a clock tick, in which there may be two changes
_SECOND: Final = 1_000_000_000  # that of some file systems is in whole ones
_FLOCK: Final = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid


class Database:
    """A connection, opened when it is wanted."""

    def __init__(self, path: str, synchronous: str, *, make: bool) -> None:
        """Open ``path``; if it is not there and ``make`` says so, make it, for its owner alone.

        Raises:
            BrokerError: it cannot be opened, is no queue of ours, may be written by others, or lies on a network file
                system.
        """
        self.path = path
        self.opened = 0  # so many times: what was known of the file before, need not be true any more
        self._pid = os.getpid()
        self._synchronous = synchronous
        self._lock = -1
        self._connection: sqlite3.Connection | None = None
        self._files: tuple[_Identity, ...] = ()  # what is open, as _BESIDE
        self._directory = os.path.dirname(path)
        self._unchanged: tuple[int, ...] | None = None  # what tells that nothing was removed from there since
        if is_network(kind := file_system_of(self._directory)):
            raise BrokerError(
                f"open {path}: it lies on {kind}; SQLite's write-ahead log needs the memory of one host "
                "(sqlite.org/wal.html): name a file on a local disk"
            )
        with exclusively, self._told():
            if not make and not _is_there(path):
                raise BrokerError(f"open {path}: no queue is there; nothing was put yet, or another --broker is meant")
            self._open()
        _all.add(self)

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all that is done within ``with``, or nothing of it.

        Raises:
            BrokerFull: there is no room on the disk.
            BrokerError: the file cannot be written.
        """
        with exclusively, self._told():
            self._opened()
            with self._alone():
                connection = self._living()  # while it waited, the file may have been removed
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException as error:
                    if (
                        connection.in_transaction
                    ):  # some failures have rolled it back (sqlite.org/lang_transaction.html)
                        connection.execute("ROLLBACK")
                    if isinstance(error, sqlite3.Error) and _is_full(error):
                        _fold(connection)
                    raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For queries whose rows are all fetched; one left open would keep the log from being used anew.

        Raises:
            BrokerError: the file cannot be read.
        """
        with exclusively, self._told():
            yield self._living()

    def await_writer(self, patience: float) -> bool:
        """Return when whoever writes now has done so: a change of the log is seen before it counts.

        False: he has not within ``patience`` seconds.

        Raises:
            BrokerError: the file cannot be used.
        """
        with exclusively, self._told():
            self._living()
            if not self._take_lock(patience):
                return False
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        """Close the connection; the last one to do so folds the log into the file."""
        _all.discard(self)
        if self._pid == os.getpid():
            with exclusively, self._told():
                self._shut()

    def doctor(self) -> list[str]:
        """What would be lost when, in sentences."""
        from daemonkit.queue.disk import doctor

        with self.reading() as connection:
            return doctor(self.path, connection)

    def _opened(self) -> sqlite3.Connection:
        if self._pid != os.getpid():
            raise BrokerError(f"use {self.path}: this connection is that of pid {self._pid}; open one after the fork")
        if self._connection is None:
            self._open()
        assert self._connection is not None
        return self._connection

    def _living(self) -> sqlite3.Connection:
        connection = self._opened()
        if not self._are_there():
            self._let_go()  # opened when it is used next: meanwhile the others, who have noticed, may be alone with it
            raise BrokerError(f"use {self.path}: it was removed or replaced; what is there now is used from now on")
        return connection

    def _open(self) -> None:
        try:
            for name in (self.path, f"{self.path}-lock"):
                _make(name)
            self._lock = os.open(f"{self.path}-lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            with self._alone():
                self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                self._begin(self._connection)
                self._files = self._files_there()
                self._unchanged = None
            self.opened += 1
        except BaseException:
            self._shut()
            raise

    def _are_there(self) -> bool:
        """Whether all are those that we have opened; if nothing was changed in their directory, it alone is looked at.

        Before each use: four calls of stat(2) instead would be a fifth of what a put costs.
        """
        try:
            found = os.stat(self._directory)
        except OSError:
            return False
        now = found.st_dev, found.st_ino, found.st_mtime_ns
        if now == self._unchanged:
            return True
        if self._files != self._files_there():
            return False
        settled = time.time_ns() - (_TICK if found.st_mtime_ns % _SECOND else 2 * _SECOND)
        self._unchanged = now if found.st_mtime_ns < settled else None
        return True

    def _files_there(self) -> tuple[_Identity, ...]:
        # Whoever removes them one after the other may remove the log of one that we have opened in between.
        return tuple(_file_at(self.path + each) for each in _BESIDE)

    def _let_go(self) -> None:
        """Close what is no more as we have opened it."""
        if self._files[:2] == self._files_there()[:2]:
            self._leave_log()
        self._shut()

    def _leave_log(self) -> None:
        """Close all that is open, and do not fold the log: others have put into it what our index does not show."""
        fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with contextlib.suppress(BlockingIOError):  # then somebody else has it, and so it is not folded either
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, *_SHARED, 0))
            _shut_all()  # and before the file beside them is closed
        finally:
            os.close(fd)

    def _begin(self, connection: sqlite3.Connection) -> None:
        for line in statements.SETTINGS.format(synchronous=self._synchronous).split(";"):
            connection.execute(line)
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise BrokerError(
                f"open {self.path}: SQLite can keep no write-ahead log there; name a file on a local disk"
            )
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            connection.executescript(f"BEGIN IMMEDIATE;{statements.TABLES}COMMIT;")
        elif version != statements.VERSION:
            raise BrokerError(f"open {self.path}: it is no queue of this version of daemonkit; name another file")

    def _shut(self) -> None:
        """Close what is open.  If the lock is busy, somebody else has the file open: nothing will be folded."""
        connection, self._connection = self._connection, None
        lock, self._lock = self._lock, -1
        if lock >= 0:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if connection is not None:
            connection.close()
        if lock >= 0:
            os.close(lock)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:  # a signal handler may raise when the lock is ours already
            if not self._take_lock(PATIENCE):
                raise BrokerError(
                    f"write {self.path}: another process has held {self.path}-lock for {PATIENCE:g} s; "
                    "see lslocks(8) for its number: it may be stopped"
                )
            yield
        finally:
            if self._lock >= 0:  # it is closed if what was removed could not be opened anew
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _take_lock(self, patience: float) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            end = time.monotonic() + patience
        else:
            return True
        while (left := end - time.monotonic()) > 0:
            with interrupted_after(left):
                if _libc.flock(self._lock, fcntl.LOCK_EX) == 0:
                    return True
                if ctypes.get_errno() != errno.EINTR:  # that may be a signal for somebody else
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return False

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what SQLite or the system says in a word, in a sentence."""
        try:
            yield
        except sqlite3.Error as error:
            words = str(error)
            if _is_full(error):
                raise BrokerFull(f"write {self.path}: {words}; make room on the disk") from error
            if _code(error) == sqlite3.SQLITE_IOERR_SHORT_READ:
                self._let_go()  # the index is made anew when nobody has it open: who comes next finds what is there
                raise BrokerError(
                    f"use {self.path}: {words}: its log was removed or cut short while others have it open; "
                    "tried again, it comes right as soon as all of them have noticed (lsof shows them)"
                ) from error
            advice = _ADVICE.get(type(error), "look at the file and its directory")
            raise BrokerError(f"use {self.path}: {words}; {advice}") from error
        except OSError as error:
            if isinstance(error, BrokerError):
                raise
            if isinstance(error, IpcError):  # it says itself what is to be done
                raise BrokerError(f"use {self.path}: {error}") from error
            advice = "let this user write it and its directory" if error.errno == errno.EACCES else "name another file"
            raise BrokerError(f"open {error.filename or self.path}: {error.strerror}; {advice}") from error


_ADVICE: Final[dict[type[sqlite3.Error], str]] = {
    sqlite3.DatabaseError: "it is no SQLite file, or damaged: move it away, and try sqlite3's .recover on it",
    sqlite3.OperationalError: "see who has it open (lsof), and that this user may write it and its directory",
}


# A quota that is used up is an I/O error, and so is want of room for the index (SQLite's os_unix.c).
_FULL: Final = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_SHMSIZE,
}


def _code(error: sqlite3.Error) -> int | None:
    return getattr(error, "sqlite_errorcode", None)  # the module's own errors have none


def _is_full(error: sqlite3.Error) -> bool:
    return _code(error) in _FULL


def _fold(connection: sqlite3.Connection) -> None:
    """The log has no room to grow: fold it into the file, so that it begins anew and tasks can at least be deleted."""
    with contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _make(path: str) -> None:
    """Make a file for its owner alone, or see that the one that is there is nobody else's to write.

    Raises:
        BrokerError: it is.
        OSError: it cannot be made.
    """
    with contextlib.suppress(FileExistsError):  # only what is not there is opened, and so closed: see above
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    found, directory = os.lstat(path), os.stat(os.path.dirname(path))
    owners = {0, os.geteuid()} | (set() if directory.st_mode & 0o022 else {directory.st_uid})
    if not stat.S_ISREG(found.st_mode):
        raise BrokerError(f"open {path}: it is no plain file; name another")
    if found.st_uid not in owners or found.st_mode & 0o022:
        raise BrokerError(f"open {path}: another user owns it, or may write it; see ls -l, or name another file")


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _file_at(path: str) -> _Identity:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


_all: weakref.WeakSet[Database] = weakref.WeakSet()


def _shut_all() -> None:
    for database in list(_all):
        if database._pid == os.getpid():
            database._shut()


before_fork.append(_shut_all)
