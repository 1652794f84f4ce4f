"""The fork server: a process with one thread, clean since its birth, that forks when it is asked to (law 3).

It speaks over one wire.  Asked to spawn, it forks, and the child calls ``enter``; when the child has ended it sends
the receipt.  It ends, and first all that live under it, when the wire is closed or its maker has ended: master gone,
all gone (law 5).  Here nobody but us waits for a child, so all who end may be looked at (waitid(2), P_ALL with
WNOWAIT).
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn

from daemonkit.core import prctl, waitid
from daemonkit.core.signalfd import drain, open_signalfd
from daemonkit.core.streams import flush_streams
from daemonkit.processes import child, modules
from daemonkit.processes.limited import Limit, Limited
from daemonkit.processes.living import MARK, Living, mark
from daemonkit.processes.receipt import never_begun
from daemonkit.processes.wire import Closed, DescriptorsLost, Message, Wire

Enter = Callable[[Message], NoReturn]

# A terminal or a supervisor may send these to every process at once; they are the master's to act on.
MASTERS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_FIRST_PAUSE: Final = 0.01  # seconds after a fork that failed; doubled up to
_LONGEST_PAUSE: Final = 1.0
_AT_ONCE: Final = 256  # messages that are taken in before somebody else has his turn
_TOGETHER: Final = 8  # forks before ends are told and signals sent
_CLOSING_TIME: Final = 0.06  # seconds that such a child has before it is killed with the rest
_STATE: Final = struct.Struct("=i")
_SPAWNS: Final = (1, 7, 8, 9)  # of Kind


class Kind:
    """What the messages mean; from the server: STARTED, ENDED, DELAYED; to it: the rest.

    No enum: to look into one costs the server a page or two for each fork.
    """

    SPAWN: Final = 1  # payload: for ``enter``
    SIGNAL: Final = 2  # payload: the signal's number
    KILL_TREE: Final = 3
    STARTED: Final = 4  # payload: the PID
    ENDED: Final = 5  # payload: the receipt
    DELAYED: Final = 6  # payload: errno of the fork that failed; it is tried again
    SPAWN_LASTING: Final = 7  # as SPAWN, a child that does not adopt its orphans: they are the server's, and may stay
    SPAWN_CLOSING: Final = 8  # as SPAWN_LASTING, a child that has something to close when the server's maker is gone
    SPAWN_LIMITED: Final = 9  # as SPAWN_LASTING, a child that is killed at its limit, whatever the server's maker does
    IMPORT: Final = 10  # payload: names of modules that children will need


class _Pause:
    """After a fork that failed."""

    def __init__(self) -> None:
        self.until = 0.0  # monotonic seconds
        self._length = 0.0  # seconds; 0: none failed

    def begin(self) -> bool:
        """Longer than the one before; tell whether there was none."""
        is_first = not self._length
        self._length = min(max(self._length * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
        self.until = time.monotonic() + self._length
        return is_first

    def end(self) -> None:
        """A fork did not fail."""
        self._length = self.until = 0.0


class ForkServer:
    """The server's own side."""

    def __init__(
        self,
        wire: Wire,
        enter: Enter,
        ignored: tuple[int, ...] = (),
        limit: Limit | None = None,
    ) -> None:
        """Serve ``wire``, whose socket does not block.

        Args:
            wire: to the one process that asks.
            enter: what a child does with the message that asked for it; never returns.
            ignored: signals that children ignore, such as SIGINT of a terminal that is the master's to act on.
            limit: called here with what asked for a limited child: when it is to be killed (seconds of CLOCK_BOOTTIME);
                asked again at that moment, for it may have been put off.
        """
        self._wire = wire
        self._enter = enter
        self._forker = child.Forker(ignored)
        self._living = Living()
        self._limited = Limited(limit)
        self._requests: deque[Message] = deque()
        self._pause = _Pause()
        self._is_full = False  # the wire takes no more, and is polled for room

    def serve(self) -> NoReturn:
        """Be the server until the wire is closed or its maker has ended; end all children, then this process.

        Raises nothing: what fails here is told on stderr, and ends it as well.
        """
        code = child.FAILED
        try:
            self._begin()
            while True:
                self._turn()
        except (Closed, BrokenPipeError, ConnectionResetError):
            code = 0
        except BaseException:  # noqa: BLE001 - told, and by the exit status; our caller's frames are not ours to unwind
            sys.excepthook(*sys.exc_info())
        child.or_end(lambda: self._living.await_closing(_CLOSING_TIME))
        child.or_end(child.end_descendants)
        child.leave(code)

    def _begin(self) -> None:
        prctl.become_subreaper()
        prctl.die_with_parent(0)
        child.null_stdin()
        os.environ[MARK] = str(os.getpid())
        signals = open_signalfd((signal.SIGCHLD, *MASTERS))
        for number in MASTERS:  # blocked is enough: to ignore them costs each child more to undo
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        self._poll = select.poll()
        self._actions = {signals: self._wake, self._wire.fileno(): self._speak}
        if self._wire.maker:
            # Beside the wire, whose other end somebody else may have inherited; and not prctl(2)'s signal, which comes
            # when the thread ends that forked us.
            try:
                pidfd = os.pidfd_open(self._wire.maker)
            except ProcessLookupError:
                raise Closed from None
            self._actions[pidfd] = _close_down
        for fd in self._actions:
            self._poll.register(fd, select.POLLIN)
        self._settle()

    def _settle(self) -> None:
        """Foreign code has run here: the next child finds things in order."""
        # What each child calls is called here as well: so it is linked (ld.so(8)) once, not in every child.
        flush_streams()
        waitid.has_children()
        self._forker.look()
        modules.note()
        child.freeze()

    def _turn(self) -> None:
        if self._wire.is_waiting != self._is_full:
            self._is_full = not self._is_full
            self._poll.register(self._wire.fileno(), select.POLLIN | (select.POLLOUT if self._is_full else 0))
        for fd, events in self._poll.poll(self._rest()):
            self._actions[fd](fd, events)
        now = time.monotonic()
        if now >= self._living.sweep_at:
            self._living.end_orphans()
        if self._limited:  # whatever has woken us: limits are brought forward, too
            self._kill_late()
        if self._requests and now >= self._pause.until:
            self._fork_some()

    def _rest(self) -> float | None:
        """Milliseconds that may be slept; None: until something comes."""
        due = min(self._living.sweep_at, self._limited.look_at)
        if self._requests:
            due = min(due, self._pause.until)
        return None if due == math.inf else max(due - time.monotonic(), 0.0) * 1000

    def _kill_late(self) -> None:
        for number in self._limited.late():
            print(f"fork server: child {number}: killed: it has not ended before its limit", file=sys.stderr)
            self._living.kill_tree(number)

    def _wake(self, fd: int, events: int) -> None:
        drain(fd)
        self._reap()

    def _speak(self, fd: int, events: int) -> None:
        if events & select.POLLOUT:
            self._wire.flush()
        if events & ~select.POLLOUT:
            self._hear()

    def _hear(self) -> None:
        """Take in what has been asked, before the next fork, so that a signal for a request finds it."""
        for _ in range(_AT_ONCE):
            try:
                message = self._wire.receive()
            except DescriptorsLost as error:
                print(f"fork server: {error}", file=sys.stderr)
                self._wire.send(Kind.ENDED, error.id, never_begun(child.FAILED << 8))
                continue
            if message is None:
                return
            if message.kind in _SPAWNS:
                self._requests.append(message)
            elif message.kind == Kind.SIGNAL:
                if not self._living.signal(message.id, number_in(message.payload)):
                    self._forget(message.id)
            elif message.kind == Kind.KILL_TREE:
                if not self._living.kill_tree(message.id):
                    self._forget(message.id)
            elif message.kind == Kind.IMPORT:
                modules.load(modules.unpack(bytes(message.payload)))
                self._settle()

    def _fork_some(self) -> None:
        """Fork one after the other, and do the rest for all: after a fork each page that we write is copied for us."""
        forked: list[tuple[int, float]] = []
        for message in itertools.islice(self._requests, _TOGETHER):
            began = time.monotonic()
            try:
                pid = self._forker.fork()
            except OSError as error:  # EAGAIN, ENOMEM: there may be room later (row 23)
                if self._pause.begin():
                    self._wire.send(Kind.DELAYED, message.id, _STATE.pack(error.errno or 0))
                break
            if pid == 0:
                self._be_child(message)
            forked.append((pid, began))
        else:
            self._pause.end()
        for pid, began in forked:
            self._have(self._requests.popleft(), pid, began)

    def _have(self, message: Message, pid: int, began: float) -> None:
        _close(message)
        self._living.add(message.id, pid, began, adopts=message.kind == Kind.SPAWN)
        if message.kind == Kind.SPAWN_CLOSING:
            self._living.closing.add(pid)
        if message.kind == Kind.SPAWN_LIMITED:
            self._limited.add(message.id, bytes(message.payload))
        self._wire.send(Kind.STARTED, message.id, _STATE.pack(pid))

    def _be_child(self, message: Message) -> NoReturn:
        """Keep nothing of the server's, nor what came with requests for others; never return to its loop."""
        try:
            for fd in self._actions:  # the wire's among them
                os.close(fd)
            self._wire.forget_waiting()
            if len(self._requests) > 1:
                for other in self._requests:
                    if other is not message:
                        _close(other)
                self._requests.clear()
            if message.kind != Kind.SPAWN:
                os.environ[MARK] = mark(os.getppid(), message.id)
            self._enter(message)
        except BaseException:  # noqa: BLE001 - told, and by the exit status
            child.fail()
        finally:
            os._exit(child.FAILED)

    def _reap(self) -> None:
        for number, receipt in self._living.reap():
            self._limited.remove(number)
            self._wire.send(Kind.ENDED, number, receipt)
        self._pause.until = 0.0  # there may be room now

    def _forget(self, number: int) -> None:
        """A request that has not been forked yet is taken back, and told as killed."""
        for message in self._requests:
            if message.id == number:
                self._requests.remove(message)
                _close(message)
                self._wire.send(Kind.ENDED, number, never_begun(signal.SIGKILL))
                return


def _close_down(fd: int, events: int) -> None:
    raise Closed


def _close(message: Message) -> None:
    for fd in message.fds:
        os.close(fd)


def number_in(payload: bytes | mmap.mmap) -> int:
    """The number in the payload of a ``STARTED``, ``DELAYED`` or ``SIGNAL`` message."""
    number: int = _STATE.unpack(payload)[0]
    return number


def numbered(number: int) -> bytes:
    """The payload of a ``SIGNAL`` message."""
    return _STATE.pack(number)
