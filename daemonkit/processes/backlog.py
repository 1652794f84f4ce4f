"""The calls of ``background`` that were accepted and are not done: they wait for their turn, run, and are told of.

They run in children of a fork server below this process (law 3); when their time is up they are ended, and what becomes
of them is told: a failure on stderr, which is the asking process's.
"""

from __future__ import annotations

import contextlib
import enum
import math
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from daemonkit.core.duration import describe
from daemonkit.core.signalfd import drain
from daemonkit.core.title import take_title
from daemonkit.errors import ForkServerLost
from daemonkit.processes import call, child, detachedcall, modules, pickled
from daemonkit.processes.children import Child, Children, fork_server
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import Closed, DescriptorsLost, Message, Wire, pair

_AT_ONCE: Final = 256  # messages that are taken in before somebody else has his turn
_KILL_AFTER: Final = 5.0  # seconds that a call has to tidy up when its time is up
_LONGEST: Final = 3600.0  # seconds: a longer wait is made of these (poll(2) takes 24 days at most)
_LEAVE_TIME: Final = 10.0  # seconds that the fork server has to end
_PAUSE: Final = 0.1  # seconds until what there was no room for is tried again; doubled
_LONGEST_PAUSE: Final = 5.0  # up to this
_ALARM: Final = int(signal.SIGALRM)


class Kind(enum.IntEnum):
    """What the messages mean; from this program: BEGUN, ENDED; to it: the rest."""

    SETTINGS = 1  # payload: pickled Settings
    CALL = 2  # payload: the function's name, a NUL, the request
    BEGUN = 3
    ENDED = 4
    HELD = 5  # as CALL, but it begins when it is released, or nobody can release it any more
    RELEASE = 6


class Settings(NamedTuple):
    """What the process that asks has to say first."""

    interpreter: tuple[Any, ...]
    pid: int  # its own
    max_workers: int
    timeout: float  # seconds for each call
    is_fresh: bool  # each call has an interpreter of its own
    daemon: str | None = None  # whose child this is; None: it is detached

    @property
    def title(self) -> str:
        """In ps."""
        return f"{self.daemon}: background of pid {self.pid}" if self.daemon else f"background of pid {self.pid}"


class _Call:
    """One call: waiting, running, over."""

    __slots__ = ("due", "id", "is_late", "name", "news", "receipt", "request", "row")

    def __init__(self, id: int, name: str, request: bytes) -> None:
        self.id = id
        self.name = name
        self.request = request
        self.row: Child
        self.due = math.inf  # when it will be ended, or killed if it is late already
        self.is_late = False
        self.news: str | None = None  # what came of it, once its child has said so; "" when it is written
        self.receipt: Receipt | None = None


class Backlog:
    """The calls that were accepted and are not done."""

    def __init__(self, sock: socket.socket, wire: Wire, settings: Settings, stop: int | None = None) -> None:
        """Accept calls from ``wire`` over ``sock``, which does not block, until the signalfd ``stop`` says: no more."""
        self._sock = sock
        self._wire = wire
        self._stop = stop
        self._settings = settings
        self._is_open = True  # the other end is there, and heard
        self._held: dict[int, _Call] = {}
        self._waiting: deque[_Call] = deque()
        self._running: dict[int, _Call] = {}  # by the child's id
        self._fill_at = math.inf  # there was no room: when that is tried again (monotonic seconds)
        self._server: _Server

    def serve(self, told: int | None) -> None:
        """Return when nobody will ask any more, and all is done; a byte to the descriptor ``told`` says: it has begun.

        Raises:
            OSError: there is no room for a fork server.
        """

        def forget() -> None:
            self._forget()
            if told is not None:
                os.close(told)

        self._server = _Server(self._settings, forget)
        if told is not None:
            os.write(told, b"+")
            os.close(told)
        while self._is_open or self._waiting or self._running:
            if self._sleep() and self._is_open:
                self._finish()
            if self._is_open:
                self._hear()
            try:
                self._server.children.receive()
                self._server.children.wire.flush()
            except (ForkServerLost, BrokenPipeError, ConnectionResetError):
                self._replace()
            else:
                self._read()
            self._settle()
            self._expire()
            self._fill()
        self._server.close()

    def _forget(self) -> None:
        """In the fork server: what is ours alone."""
        self._wire.close()
        if self._stop is not None:
            os.close(self._stop)

    def _sleep(self) -> bool:
        """Sleep until something is to be done; tell whether the daemon wants us to end."""
        poll = select.poll()
        if self._stop is not None:
            poll.register(self._stop, select.POLLIN)
        wires = (self._wire, self._server.children.wire) if self._is_open else (self._server.children.wire,)
        for wire in wires:
            poll.register(wire.fileno(), select.POLLIN | (select.POLLOUT if wire.is_waiting else 0))
        poll.register(self._server.results.fileno(), select.POLLIN)
        due = min((each.due for each in self._running.values()), default=math.inf)
        due = min(due, self._fill_at)
        left = min(max(due - time.monotonic(), 0.0), _LONGEST)
        ready = poll.poll(None if due == math.inf else left * 1000 + 1)
        if self._stop is None or all(fd != self._stop for fd, _ in ready):
            return False
        drain(self._stop)
        return True

    def _finish(self) -> None:
        """Take in what was sent, and no more: what comes later is refused; who asks keeps what is not begun."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        while self._is_open:
            self._hear()  # up to the end, which the shutdown has made
        if names := ", ".join(entry.name for entry in (*self._running.values(), *self._waiting)):
            _log(f"{self._settings.daemon} is to stop; it finishes first: {names}", os.getpid())

    def _hear(self) -> None:
        """Take in what is asked."""
        self._tell()
        for _ in range(_AT_ONCE):
            try:
                message = self._wire.receive()
            except DescriptorsLost as error:
                _log(f"a call is lost: {error}", os.getpid())
                self._tell(Kind.ENDED, error.id)
                continue
            except Closed:
                self._is_open = False
                self._waiting.extend(self._held.values())
                return
            if message is None:
                return
            if message.kind == Kind.RELEASE:
                if held := self._held.pop(message.id, None):  # else it was lost on its way, which is told
                    self._waiting.append(held)
            elif message.kind == Kind.HELD:
                self._held[message.id] = _call_in(message)
            else:
                self._waiting.append(_call_in(message))

    def _tell(self, kind: Kind | None = None, number: int = 0) -> None:
        """Tell whoever asks, if he is still there, how far his call is; or what waits to be told."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._wire.flush()
            if kind is not None:
                self._wire.send(kind, number)

    def _read(self) -> None:
        """Take in what children have said, before their ends are dealt with."""
        while True:
            try:
                message = self._server.results.receive()
            except (Closed, DescriptorsLost, struct.error):  # or a child has written what is no outcome
                return
            if message is None:
                return
            if message.kind == call.LEARNED:
                self._server.children.learn(modules.unpack(bytes(message.payload)))
            elif entry := self._running.get(message.id):
                self._take(entry, message)

    def _take(self, entry: _Call, message: Message) -> None:
        if message.kind == call.PROGRESS:
            return
        entry.news = ""
        if message.kind == call.ERROR:
            _, words, text = _news(message) or (None, "its child has written nonsense", "")
            what = f"not done after {describe(self._settings.timeout)}" if entry.is_late else words
            entry.news = f"{entry.name} failed: {what}\n{text}"
            if entry.row.pid is not None:  # else it was faster than the word that it was forked: its receipt tells
                self._write(entry, entry.row.pid)

    def _write(self, entry: _Call, pid: int) -> None:
        if entry.news:
            _log(entry.news, pid)
        entry.news = ""

    def _settle(self) -> None:
        for number, entry in list(self._running.items()):
            if entry.receipt is None:
                continue
            del self._running[number]
            if entry.news is None:
                late = f"not done after {describe(self._settings.timeout)}; " if entry.is_late else ""
                entry.news = f"{entry.name} failed: {late}{entry.receipt}"
            self._write(entry, entry.receipt.pid)
            self._tell(Kind.ENDED, entry.id)

    def _expire(self) -> None:
        now = time.monotonic()
        for entry in self._running.values():
            if entry.due > now:
                continue
            if entry.is_late:
                entry.due = math.inf
                entry.row.kill_tree()
            else:
                entry.due = now + _KILL_AFTER
                entry.is_late = True
                entry.row.signal(_ALARM)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._settings.max_workers:
            entry = self._waiting[0]
            try:
                entry.row = self._server.children.spawn(entry.request, self._on_end, self._on_start)
            except ForkServerLost:
                return  # it will be replaced when that is read
            except OSError as error:  # EMFILE, ENOMEM
                if self._fill_at == math.inf:
                    _log(f"begin {entry.name}: {error.strerror}; tried again until there is room", os.getpid())
                self._fill_at = time.monotonic() + _LONGEST_PAUSE
                return
            self._fill_at = math.inf
            self._waiting.popleft()
            self._running[entry.row.id] = entry

    def _on_start(self, row: Child) -> None:
        entry = self._running[row.id]
        entry.request = b""
        entry.due = time.monotonic() + self._settings.timeout
        self._server.has_worked = True
        self._tell(Kind.BEGUN, entry.id)

    def _on_end(self, row: Child, receipt: Receipt) -> None:
        self._running[row.id].receipt = receipt

    def _replace(self) -> None:
        """The fork server is gone: what its children had is lost, what waits is for the next one."""
        self._read()
        server = self._server
        for number, entry in reversed(list(self._running.items())):
            if entry.request:  # not begun
                del self._running[number]
                self._waiting.appendleft(entry)
            elif entry.receipt is None and entry.news is None:
                entry.news = ""
                entry.receipt = _unknown(entry.row.pid or 0)
                _log(f"{entry.name} is lost: the fork server, pid {server.pid}, has ended", entry.row.pid)
            elif entry.receipt is None:
                entry.receipt = _unknown(entry.row.pid or 0)
        server.close()
        if not server.has_worked:
            names = ", ".join(entry.name for entry in self._waiting) or "no calls"
            _log(f"the fork server, pid {server.pid}, could not begin; given up: {names}", os.getpid())
            child.leave(child.FAILED)
        self._server = self._another()

    def _another(self) -> _Server:
        """A fork server, as soon as there is room for one: what was accepted waits for it."""
        pause = _PAUSE
        while True:
            try:
                return _Server(self._settings, self._forget)
            except OSError as error:
                if pause == _PAUSE:
                    _log(f"start a fork server: {error.strerror}; tried again until there is room", os.getpid())
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)


class _Server:
    """A fork server, and what its children have to say."""

    def __init__(self, settings: Settings, forget: Callable[[], None]) -> None:
        ours, theirs = pair()
        self.results, answers = Wire(ours), Wire(theirs)
        ours.setblocking(False)
        if settings.is_fresh:
            enter = detachedcall.Fresh(settings.interpreter, theirs).enter
        else:
            enter = call.Caller(answers).enter

        def prepare() -> None:
            forget()
            take_title(f"{settings.title}: fork server")
            self.results.close()

        self.has_worked = False  # it has forked once
        try:
            self.pid, wire = fork_server(enter, prepare, (signal.SIGTERM,))
        except BaseException:
            self.results.close()
            raise
        finally:
            answers.close()
        self.children = Children(wire, _say_delay)

    def close(self) -> None:
        """End it, and all under it; reap it."""
        self.children.wire.close()
        with contextlib.suppress(ChildProcessError):
            child.wait_for(self.pid, _LEAVE_TIME)
        self.results.close()


def _call_in(message: Message) -> _Call:
    payload = message.payload
    end = payload.find(b"\0")
    made = _Call(message.id, payload[:end].decode(), payload[end + 1 :])
    if isinstance(payload, mmap.mmap):
        payload.close()
    return made


def _news(message: Message) -> Any:
    """What a child tells; None: it has written what is no message of ours."""
    try:
        return pickled.loads(message.payload)
    except Exception:  # noqa: BLE001 - garbage
        return None


def _unknown(pid: int) -> Receipt:
    return Receipt(pid, None, signal.SIGKILL, False, 0.0, 0, 0.0)


def _say_delay(row: Child, error: OSError) -> None:
    _log(f"fork: {error}; trying again until there is room", os.getpid())


def _log(text: str, pid: int | None) -> None:
    """Write to stderr at once; whoever reads it may be gone."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S %z")
    data = memoryview(f"[{stamp}] [{pid}] [ERROR] background: {text.rstrip()}\n".encode(errors="backslashreplace"))
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]
