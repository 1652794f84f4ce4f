"""Where the daemon's words go: one sink under logging, stdout and stderr.

A write that fails (disk full, closed or full pipe) never stops the daemon: the line is counted, and the count is
written as soon as there is room again.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import re
import stat
import time
from typing import Any, Final

from daemonkit.core.streams import flush_streams as flush_streams

FILE_MODE: Final = 0o640
_CONTROL: Final = re.compile(r"[^\t\n -~\xa0-\U0010ffff]")
# sd-daemon(3): the priority that journald reads at the start of a line
_PRIORITY: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


class Sink:
    """An open log: a file that can be reopened, or the stream that a supervisor reads."""

    def __init__(self, name: str, path: str | None, journal: bool) -> None:
        """Open ``path`` for appending, or, without one, stderr.

        Args:
            name: the process's name, written on every line of a file.
            path: the file; None for stderr.
            journal: stderr is systemd's journal: priorities instead of times (sd-daemon(3)).

        Raises:
            OSError: the file cannot be opened.
        """
        self.name = name
        self.path = path
        self.journal = journal
        self.lost = 0
        self._pid = os.getpid()
        self._is_new = path is not None and not os.path.lexists(path)
        self._fd = _open_file(path) if path else _open_stream(2)
        self._streams: tuple[int, ...] = ()  # descriptors that are this log, too
        self.echo = False  # True until ready: the starting terminal is to see it too
        self._followed: tuple[int, int] | None = None  # the file that we write, if another process has it rotated

    def write(self, level: int, text: str) -> None:
        """Write each line of ``text``, stamped; a line that cannot be written is counted in ``lost``.

        While ``echo`` is set, warnings and errors go to the starting terminal as well.
        """
        if level >= logging.WARNING:
            self._repeat(2, text)
        self._write(level, text)

    def write_print(self, level: int, text: str, terminal: int) -> None:
        """Write what was printed; while ``echo`` is set, it is printed on ``terminal`` as well."""
        self._repeat(terminal, text)
        self._write(level, text)

    def relay(self, name: str, pid: int, level: int, text: str) -> None:
        """Write what process ``pid``, which is ``name``, has printed."""
        ours = self.name, self._pid
        self.name, self._pid = name, pid
        try:
            self._write(level, text)
        finally:
            self.name, self._pid = ours

    def _repeat(self, terminal: int, text: str) -> None:
        if self.echo:
            with contextlib.suppress(OSError):
                os.write(terminal, f"{text}\n".encode(errors="backslashreplace"))

    def _write(self, level: int, text: str) -> None:
        stamp = self._stamp(level)
        data = "".join(f"{stamp}{line}\n" for line in _readable(text.rstrip("\n")).split("\n"))
        if self.lost:
            self._tell_loss()
        self._put(data.encode(errors="backslashreplace"))

    def reopen(self) -> None:
        """Open the file anew after a rotation; the old one is kept if that fails.

        Raises:
            OSError: it cannot be opened.
        """
        if self.path:
            fd = _open_file(self.path)
            os.dup2(fd, self._fd, inheritable=False)
            for stream in self._streams:
                os.dup2(fd, stream)
            os.close(fd)

    def become(self, name: str) -> None:
        """Write under ``name`` from now on, in a process that was forked; follow the file when it is rotated."""
        if self.echo:
            self.take_over_streams()
        self.name, self._pid = name, os.getpid()
        if self.path:
            status = os.fstat(self._fd)
            self._followed = (status.st_dev, status.st_ino)

    def take_over_streams(self) -> None:
        """Let descriptors 1 and 2 be this log: what C code and children print goes there too (daemon(7), step 9)."""
        flush_streams()
        self._streams = (1, 2)
        for fd in self._streams:
            os.dup2(self._fd, fd)
        self.echo = False

    def leave_stderr(self) -> None:
        """Descriptor 2 is somebody else's in this process and its children: a rotation does not concern it."""
        self._streams = tuple(fd for fd in self._streams if fd != 2)

    def chown(self, uid: int, gid: int) -> None:
        """Give the file to the user that the daemon becomes, so that it can reopen it: one of our own, no other."""
        status = os.fstat(self._fd)
        if self.path and self._is_new and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            os.fchown(self._fd, uid, gid)

    def _stamp(self, level: int) -> str:
        if self.journal:
            return next(f"<{priority}>" for at_least, priority in _PRIORITY if level >= at_least)
        now = time.time()
        whole = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        return f"{whole}.{int(now % 1 * 1000):03d} {self.name}[{self._pid}] {logging.getLevelName(level)} "

    def _tell_loss(self) -> None:
        lines, self.lost = self.lost, 0
        words = f"{lines} line{'s were' if lines > 1 else ' was'} lost: the log could not be written"
        self._put(f"{self._stamp(logging.ERROR)}{words}\n".encode(), lines)

    def _follow(self) -> None:
        """Open the file anew if the path names another one by now; nobody signals a child for that."""
        assert self.path
        with contextlib.suppress(OSError):
            there = os.stat(self.path)
            if (there.st_dev, there.st_ino) != self._followed:
                self.reopen()
                self.become(self.name)

    def _put(self, data: bytes, lines: int = 0) -> None:
        if self._followed:
            self._follow()
        try:
            done = os.write(self._fd, data)
        except OSError:
            self.lost += lines or data.count(b"\n")
            return
        if done < len(data):  # the disk became full in the middle
            self.lost += lines or data[done:].count(b"\n")


class Handler(logging.Handler):
    """Hands every record to the sink."""

    def __init__(self, sink: Sink) -> None:
        """Write into ``sink``."""
        super().__init__()
        self._sink = sink
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; one that cannot be formatted is itself reported, not raised."""
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001 - a wrong format argument is the caller's bug, not a reason to end
            text = f"{record.name}: {record.msg!r} with {record.args!r} cannot be formatted: {error}"
        self._sink.write(record.levelno, text)


class Stream(io.TextIOWrapper):
    """sys.stdout or sys.stderr of a daemon: whole lines, stamped; a text stream in all else, with a ``buffer``."""

    def __init__(self, sink: Sink, level: int, fd: int) -> None:
        """Write into ``sink`` at ``level``; ``fileno`` is ``fd``."""
        super().__init__(_Lines(sink, level, fd), encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[arg-type]


class _Lines(io.RawIOBase):
    """Bytes into lines into the sink."""

    def __init__(self, sink: Sink, level: int, fd: int) -> None:
        self._sink = sink
        self._level = level
        self._fd = fd
        self._rest = b""

    def write(self, data: Any) -> int:
        """Keep ``data`` until its line is whole."""
        whole = bytes(data)
        *lines, self._rest = (self._rest + whole).split(b"\n")
        if lines:
            self._sink.write_print(self._level, b"\n".join(lines).decode(errors="backslashreplace"), self._fd)
        return len(whole)

    def flush(self) -> None:
        """Write a line that has no end yet."""
        if self._rest:
            rest, self._rest = self._rest, b""
            self._sink.write_print(self._level, rest.decode(errors="backslashreplace"), self._fd)

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The descriptor that children inherit."""
        return self._fd


def _readable(text: str) -> str:
    """``text`` without what a terminal would obey, or that would hide the rest of the line: that is often others'."""
    return text if text.isprintable() else _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def is_journal(fd: int) -> bool:
    """Whether ``fd`` is the stream that systemd connected to its journal (systemd.exec(5), $JOURNAL_STREAM)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        there = os.fstat(fd)
    except OSError:
        return False
    return device == str(there.st_dev) and inode == str(there.st_ino)


def _open_file(path: str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.open(path, flags, FILE_MODE)


def _open_stream(fd: int) -> int:
    """A description of our own of what ``fd`` shows, so that O_NONBLOCK on it concerns nobody else."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        copy = os.dup(fd)  # a socket cannot be opened by name; it is the journal's, and read
    elif stat.S_ISREG(mode):
        copy = os.dup(fd)  # a description of our own would have an offset of its own: children would write over us
        fcntl.fcntl(copy, fcntl.F_SETFL, fcntl.fcntl(copy, fcntl.F_GETFL) | os.O_APPEND)
    else:
        try:
            copy = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return os.dup(fd)
    os.set_inheritable(copy, False)
    return copy
