"""The PID file: one line that says who, under a lock that says whether.

The holder keeps two locks on one open file description: flock(2), which is the contract with other programs,
and an open-file-description lock (fcntl(2), F_OFD_SETLK), which can be *asked for* without being taken.  So
``status`` never stands in the way of a ``start`` at the same moment.  Both locks live as long as the description:
through fork and exec, until the last copy of the descriptor is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import time
import weakref
from typing import Final, NamedTuple

from lockfile import LockBase

from daemonkit.errors import AlreadyRunning, LockNotHeld, LockNotMine, LockTimedOut, NotAllowed, RunDirectoryError

MODE: Final = 0o644
MAX_PID: Final = 1 << 22  # proc(5), /proc/sys/kernel/pid_max
CLEAN: Final = b"\n"  # left by an owner that stopped but may not unlink (privileges dropped)
PATIENCE: Final = 0.25  # seconds to outlast somebody who holds the lock for a moment, with no number written
TEST_PATIENCE: Final = 5.0  # ... and one who merely tests it with flock(2), and has lost the processor in between


class State(NamedTuple):
    """What a PID file says at one moment: is it there, is it locked, and by whom (if that is written)."""

    exists: bool
    locked: bool
    pid: int | None


class PidFile(LockBase):  # type: ignore[misc]  # lockfile ships no types
    """A PID file held under a lock; a ``lockfile.LockBase``.

    ``with PidFile("/run/app.pid"): ...`` holds it for the block; the number written is the caller's.
    """

    def __init__(self, path: str, threaded: bool = False, timeout: float | None = None) -> None:
        """Name the file; nothing is opened until ``acquire``.

        Args:
            path: the PID file.
            threaded: there for ``LockBase``; a flock belongs to the process, never to a thread.
            timeout: default for ``acquire``, in seconds.
        """
        super().__init__(path, threaded, timeout)
        self._fd: int | None = None

    @classmethod
    def adopt(cls, path: str, fd: int) -> PidFile:
        """Take over the locked descriptor ``fd`` of ``path`` from an earlier image of this process."""
        pidfile = cls(path)
        pidfile._keep(fd)
        return pidfile

    def acquire(self, timeout: float | None = None, *, write_pid: bool = True) -> None:
        """Lock the file and write our PID into it.

        Args:
            timeout: seconds to wait for another holder; None (and no default) waits for ever, 0 not at all.
            write_pid: False leaves the file empty, for a launcher whose daemon will write its own.

        Raises:
            AlreadyRunning: held by another process, and no time to wait (a ``lockfile.AlreadyLocked``).
            LockTimedOut: still held after ``timeout`` seconds (a ``lockfile.LockTimeout``).
            RunDirectoryError: it cannot be opened or is no regular file (a ``lockfile.LockFailed``).
            NotAllowed: the directory or the file belongs to another user.
        """
        if self._fd is not None:
            return
        timeout = self.timeout if timeout is None else timeout
        start = time.monotonic()
        end = None if timeout is None else start + max(timeout, 0)
        while (fd := _lock(self.path)) is None:
            self._wait_for_holder(start, end)
        self._keep(fd)
        _make_readable(fd)
        os.ftruncate(fd, 0)
        if write_pid:
            self.write_pid()

    def _wait_for_holder(self, start: float, end: float | None) -> None:
        """Sleep a little, ended early by the holder's death; flock(2) itself knows no time-out."""
        now = time.monotonic()
        state = inspect(self.path)
        held = state.locked and (state.pid is not None or now > start + PATIENCE)
        bound = PATIENCE if state.locked else TEST_PATIENCE
        if end is not None and now >= end and (held or now >= start + bound):
            if end <= start:
                raise AlreadyRunning(self.path, state.pid)
            raise LockTimedOut(f"lock {self.path}: still held by pid {state.pid} after {end - start:g} s")
        pause = 0.05 if held else 0.005
        try:
            pidfd = os.pidfd_open(state.pid) if state.pid else -1
        except OSError:
            pidfd = -1
        if pidfd < 0:
            time.sleep(pause)
            return
        try:
            select.select([pidfd], [], [], pause)
        finally:
            os.close(pidfd)

    def write_pid(self, pid: int | None = None) -> None:
        """Write ``pid`` (default: ours) into the locked file."""
        fd = self._held()
        text = b"%d\n" % (pid or os.getpid())
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))

    def detach(self) -> int:
        """Hand the locked descriptor to the caller; this object holds nothing any more."""
        fd, self._fd = self._held(), None
        return fd

    def fileno(self) -> int:
        """The locked descriptor."""
        return self._held()

    def release(self) -> None:
        """Unlink the file, then drop the lock: nobody can see an unlocked file of a process that ended well.

        Raises:
            LockNotHeld: nobody holds it (a ``lockfile.NotLocked``).
            LockNotMine: another process holds it (a ``lockfile.NotMyLock``).
        """
        if self._fd is None:
            if self.is_locked():
                raise LockNotMine(f"release {self.path}: held by pid {inspect(self.path).pid}, not by us")
            raise LockNotHeld(f"release {self.path}: nobody holds it")
        fd, self._fd = self._fd, None
        try:
            if _same_file(self.path, fd):
                os.unlink(self.path)
        except PermissionError:
            # Privileges were dropped and the directory is not ours: leave the mark of a clean end.
            os.pwrite(fd, CLEAN, 0)
            os.ftruncate(fd, len(CLEAN))
        finally:
            os.close(fd)

    def is_locked(self) -> bool:
        """Whether any process holds the file."""
        return self._fd is not None or inspect(self.path).locked

    def i_am_locking(self) -> bool:
        """Whether this object holds the file."""
        return self._fd is not None

    def break_lock(self) -> None:
        """Unlink the file under its holder, whoever that is; the next ``acquire`` makes a new one.

        The holder goes on: a kernel lock cannot be taken from a living process.  A daemon of daemonkit puts its file
        back at once.  Prefer ``daemonkit kill``.
        """
        if self._fd is not None:
            self.release()
            return
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            return

    def is_intact(self) -> bool:
        """Whether the path still names the file that we hold."""
        return self._fd is not None and _same_file(self.path, self._fd)

    def restore(self) -> bool:
        """If somebody deleted or replaced the file under us, make and lock a new one; tell whether we hold it."""
        if self.is_intact():
            return True
        end = time.monotonic() + PATIENCE
        while (fd := _lock(self.path)) is None:
            if inspect(self.path).locked or time.monotonic() > end:
                return False
            time.sleep(0.001)  # somebody merely tests the lock
        old = self.detach()
        self._keep(fd)
        _make_readable(fd)
        self.write_pid()
        os.close(old)
        return True

    def _held(self) -> int:
        if self._fd is None:
            raise LockNotHeld(f"use {self.path}: not locked by this object")
        return self._fd

    def _keep(self, fd: int) -> None:
        """Hold ``fd``, and see to it that no child forked by us does."""
        os.set_inheritable(fd, False)
        self._fd = fd
        me = weakref.ref(self)

        def drop_in_child() -> None:
            pidfile = me()
            if pidfile is not None and pidfile._fd == fd:
                pidfile._fd = None
                os.close(fd)

        os.register_at_fork(after_in_child=drop_in_child)


def inspect(path: str) -> State:
    """Read the PID file at ``path`` and ask the kernel whether it is locked; changes nothing.

    Raises:
        RunDirectoryError: something that is no regular file stands there.
        NotAllowed: it may not be read.
    """
    try:
        fd = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return State(False, False, None)
    try:
        locked = _is_locked(fd)
        text = os.pread(fd, 32, 0)
        return State(locked or text != CLEAN, locked, _parse(text))
    finally:
        os.close(fd)


def holds(pid: int, path: str) -> bool:
    """Whether process ``pid`` has the file at ``path`` open; True when that cannot be seen (proc(5))."""
    try:
        wanted = os.stat(path)
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return True
    except OSError:
        return False
    for number in descriptors:
        try:
            seen = os.stat(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue  # closed meanwhile
        if (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _lock(path: str) -> int | None:
    """Open and lock ``path``; None if another description holds it."""
    while True:
        fd = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise RunDirectoryError(f"lock {path}: {error.strerror}; use a local file system") from error
        # The file we locked may have been unlinked by its last owner between our open and our lock.
        if _same_file(path, fd):
            return fd
        os.close(fd)


def _make_readable(fd: int) -> None:
    """For every ``status``, whatever the umask was."""
    if os.fstat(fd).st_uid == os.geteuid():
        os.fchmod(fd, MODE)


def _open(path: str, flags: int) -> int:
    """Open a regular file that is not a link to elsewhere; O_NONBLOCK because a FIFO would hang us."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, MODE)
    except FileNotFoundError:
        if flags & os.O_CREAT:
            raise RunDirectoryError(f"open {path}: the run directory does not exist; create it first") from None
        raise
    except PermissionError:
        raise NotAllowed(f"open {path}: permission denied; try as root or as the user who started it") from None
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else (error.strerror or str(error)).lower()
        raise RunDirectoryError(f"open {path}: {why}; remove it or choose another --run-dir") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise RunDirectoryError(f"open {path}: not a plain file of its own; remove it or choose another --run-dir")
    return fd


def _same_file(path: str, fd: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _flock(kind: int) -> bytes:
    """A ``struct flock`` for the whole file (fcntl(2))."""
    return struct.pack("hhqqi0q", kind, os.SEEK_SET, 0, 0, 0)


def _is_locked(fd: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
    if struct.unpack("hhqqi0q", answer)[0] != fcntl.F_UNLCK:
        return True
    # No daemonkit holds it; another program may, with flock(2) alone, which can only be tried.
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return True
        raise
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _parse(text: bytes) -> int | None:
    number, newline, rest = text.partition(b"\n")
    if not newline or rest or not number.isdigit() or len(number) > 7:
        return None
    pid = int(number)
    return pid if 0 < pid <= MAX_PID else None
