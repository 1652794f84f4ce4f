"""The fork server: a process with one thread, clean since its birth, that forks when it is asked to (law 3).

It speaks over one wire.  Asked to spawn, it forks, and the child calls ``enter``; when the child has ended it sends
the receipt.  It ends, and first all that live under it, when the wire is closed: master gone, all gone (law 5).
Here nobody but us waits for a child, so all who end may be looked at (waitid(2), P_ALL with WNOWAIT).
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn

from daemonkit.core import prctl, tree
from daemonkit.processes import child
from daemonkit.processes.receipt import MemoryKills, Receipt, reap
from daemonkit.processes.wire import Closed, Message, Wire

Enter = Callable[[Message], NoReturn]

MARK: Final = "DAEMONKIT_CHILD"  # in the environment of a child and of all that it starts: whose they are
_FIRST_PAUSE: Final = 0.01  # seconds after a fork that failed; doubled up to
_LONGEST_PAUSE: Final = 1.0
_RECEIPT: Final = struct.Struct("=iii?dqd")
_STATE: Final = struct.Struct("=i")


class Kind(enum.IntEnum):
    """What the messages mean; to the server: SPAWN, SIGNAL, KILL_TREE; from it: the rest."""

    SPAWN = 1  # payload: for ``enter``
    SIGNAL = 2  # payload: the signal's number
    KILL_TREE = 3
    STARTED = 4  # payload: the PID
    ENDED = 5  # payload: the receipt
    DELAYED = 6  # payload: errno of the fork that failed; it is tried again


class _Living:
    __slots__ = ("began", "id", "pid")

    def __init__(self, id: int, pid: int, began: float) -> None:
        self.id, self.pid, self.began = id, pid, began


class ForkServer:
    """The server's own side."""

    def __init__(self, wire: Wire, enter: Enter, ignored: tuple[int, ...] = ()) -> None:
        """Serve ``wire``, whose socket does not block.

        Args:
            wire: to the one process that asks.
            enter: what a child does with the message that asked for it; never returns.
            ignored: signals that children ignore, such as SIGINT of a terminal that is the master's to act on.
        """
        self._wire = wire
        self._enter = enter
        self._ignored = ignored
        self._by_pid: dict[int, _Living] = {}
        self._by_id: dict[int, _Living] = {}
        self._requests: deque[Message] = deque()
        self._pause = 0.0  # seconds until the fork that failed is tried again; 0: none did
        self._ending = False
        self._private: tuple[int, ...] = ()  # descriptors that no child keeps

    def serve(self) -> NoReturn:
        """Be the server until the wire is closed or SIGTERM comes; end all children, then this process."""
        prctl.become_subreaper()
        wakeup, writer = _catch_signals(self._end)
        self._private = (wakeup, writer)
        child.freeze()
        self._kills = MemoryKills()
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        while not self._ending:
            out = select.POLLOUT if self._wire.is_waiting else 0
            poll.register(self._wire.fileno(), select.POLLIN | out)
            ready = poll.poll(self._pause * 1000 if self._pause else None)
            try:
                for fd, events in ready:
                    if fd == wakeup:
                        os.read(wakeup, 4096)
                        self._reap()
                    elif events & select.POLLOUT:
                        self._wire.flush()
                    if fd != wakeup and events & ~select.POLLOUT:
                        self._hear()
                self._fork_requested()
            except (Closed, BrokenPipeError, ConnectionResetError):
                break
        child.end_descendants()
        child.leave(0)

    def _end(self) -> None:
        self._ending = True

    def _hear(self) -> None:
        """Take what has been asked; forks wait until all is read, so that a signal for a request finds it."""
        while (message := self._wire.receive()) is not None:
            if message.kind == Kind.SPAWN:
                self._requests.append(message)
            elif message.kind == Kind.SIGNAL:
                self._signal(message.id, _STATE.unpack(message.payload)[0])
            elif message.kind == Kind.KILL_TREE:
                self._kill_tree(message.id)

    def _fork_requested(self) -> None:
        while self._requests and not self._ending:
            message = self._requests[0]
            try:
                pid = child.fork(self._ignored)
            except OSError as error:  # EAGAIN, ENOMEM: there may be room later (row 23)
                if not self._pause:
                    self._wire.send(Kind.DELAYED, message.id, _STATE.pack(error.errno or 0))
                self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
                return
            if pid == 0:
                os.environ[MARK] = f"{os.getppid()}.{message.id}"
                self._wire.close()
                for fd in self._private:
                    os.close(fd)
                self._enter(message)
            self._pause = 0.0
            self._requests.popleft()
            for fd in message.fds:
                os.close(fd)
            living = _Living(message.id, pid, time.monotonic())
            self._by_pid[pid] = self._by_id[message.id] = living
            self._wire.send(Kind.STARTED, message.id, _STATE.pack(pid))

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            living = self._by_pid.pop(ended.si_pid, None)
            receipt = reap(ended.si_pid, living.began if living else 0.0, time.monotonic(), self._kills)
            if living is None or receipt is None:  # an orphan of a child's
                continue
            del self._by_id[living.id]
            if not receipt.is_clean:
                self._end_orphans()
            self._wire.send(Kind.ENDED, living.id, _pack(receipt))

    def _end_orphans(self) -> None:
        """Kill what a child has left that could not clean up itself (row 25); what a living one has left stays."""
        orphans = tree.children() - self._by_pid.keys()
        if not orphans:
            return
        titles = {_read(pid, "cmdline") for pid in self._by_pid}
        marks = {f"{MARK}={os.getpid()}.{number}".encode() for number in self._by_id}
        for pid in orphans:
            if _read(pid, "cmdline") in titles or marks & set(_read(pid, "environ").split(b"\0")):
                continue
            self._kill(pid)

    def _kill_tree(self, number: int) -> None:
        living = self._by_id.get(number)
        if living is None:
            self._forget(number)
        else:
            self._kill(living.pid)

    def _kill(self, pid: int) -> None:
        """Kill our child, living or ended, with all below it: not reaped, its number is its own."""
        pidfd = os.pidfd_open(pid)
        try:
            tree.kill(pid, pidfd)
        finally:
            os.close(pidfd)

    def _signal(self, number: int, sent: int) -> None:
        living = self._by_id.get(number)
        if living is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(living.pid, sent)
        else:
            self._forget(number)

    def _forget(self, number: int) -> None:
        """A request that has not been forked yet is taken back, and told as killed."""
        for message in self._requests:
            if message.id == number:
                self._requests.remove(message)
                for fd in message.fds:
                    os.close(fd)
                self._wire.send(Kind.ENDED, number, _pack(Receipt(0, None, signal.SIGKILL, False, 0.0, 0, 0.0)))
                return


def _catch_signals(end: Callable[[], None]) -> tuple[int, int]:
    """SIGCHLD and SIGTERM end the sleep; the rest is as a child has it.  Returns both ends of the wakeup pipe."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: end())
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends some to the whole group: they are the master's
    return reader, writer


def _pack(receipt: Receipt) -> bytes:
    code = -1 if receipt.exit_code is None else receipt.exit_code
    return _RECEIPT.pack(
        receipt.pid, code, receipt.signal or 0, receipt.out_of_memory, receipt.cpu, receipt.max_rss, receipt.wall
    )


def unpack(payload: bytes) -> Receipt:
    """The receipt in the payload of an ``ENDED`` message."""
    pid, code, number, out_of_memory, cpu, max_rss, wall = _RECEIPT.unpack(payload)
    return Receipt(pid, None if number else code, number or None, out_of_memory, cpu, max_rss, wall)


def number_in(payload: bytes) -> int:
    """The number in the payload of a ``STARTED`` or ``DELAYED`` message."""
    number: int = _STATE.unpack(payload)[0]
    return number


def numbered(number: int) -> bytes:
    """The payload of a ``SIGNAL`` message."""
    return _STATE.pack(number)


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""
