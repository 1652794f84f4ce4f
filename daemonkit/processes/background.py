"""Work for after the response: accepted at once, done by processes that outlive the one that asks.

The web worker has threads, and connections with people at the other end.  Nothing is forked from it: a small program
of daemonkit's own (``detached``), in a session of its own and nobody's child, takes the calls in and runs them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from daemonkit.core.duration import positive_seconds
from daemonkit.core.plain import why_not_run
from daemonkit.errors import BackgroundFull, ForkServerLost, UsageError
from daemonkit.processes import call as child_call
from daemonkit.processes import detachedcall, interpreter, pickled
from daemonkit.processes.backlog import Kind, Settings
from daemonkit.processes.wire import Closed, DescriptorsLost, Wire, pair

if TYPE_CHECKING:
    from daemonkit.processes.host import Host

log = logging.getLogger("daemonkit.background")

_START_TIME: Final = 30.0  # seconds that the program has to come up
_SEND_TIME: Final = 10.0  # seconds that it has to take in what is sent
STARTS: Final = ("server", "spawn", "daemon")


class Background:
    """Runs calls after the caller has gone on: detached, bounded in number and time, failures on stderr.

    ``later = Background(timeout="5m")``, then ``later(upload, path)``.  An object may be shared by threads; after a
    fork each process has its own server.
    """

    def __init__(
        self,
        max_workers: int = 4,
        *,
        max_pending: int = 1000,
        timeout: float | str = 3600.0,
        start: str = "server",
        daemon: str | None = None,
        run_dir: str | None = None,
    ) -> None:
        """Start nothing yet: the first call does.

        Args:
            max_workers: calls that run at once, for each process that asks.
            max_pending: calls that may wait for their turn; one more raises BackgroundFull.
            timeout: for each call, in seconds or as text ("5m"); then ``TimeUp`` is raised in it, and 5 s later it is
                killed with all that it has started.
            start: "server": calls are forked from a small clean process.  "spawn": each has a fresh interpreter, for
                libraries that do not survive a fork.  "daemon": as "server", but below the daemon ``daemon``, which
                shows and logs them: they end with it, and its stop lets those that it has taken in finish first.
            daemon: the name of a daemon of the same user; it must be running when the first call comes.
            run_dir: its run directory; default: as the command would find it.

        Raises:
            UsageError: a value that cannot be meant.
        """
        self._most = _count(max_workers, "max_workers") + _count(max_pending, "max_pending")
        if start not in STARTS:
            raise UsageError(f"start={start!r} is not one of {', '.join(STARTS)}")
        self._timeout = positive_seconds(timeout, what="timeout")
        self._host = _host(start, daemon, run_dir)
        self._max_workers = max_workers
        self._is_fresh = start == "spawn"
        self._lock = threading.RLock()
        self._server: _Server | None = None
        self._kept: list[_Asked] = []  # what a lost server had not begun, until another takes it

    def __call__(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Have ``func(*args, **kwargs)`` called in a process of its own, and return at once.

        When this returns, the call is accepted: it will be done even if this process ends, or is killed.  Nobody gets
        its result; what it raises is written to stderr.

        Raises:
            BackgroundFull: ``max_pending`` calls wait already.
            UsageError: ``func`` cannot be called, or a call of it runs nothing: it is async, or a generator.
            ForkServerLost: the server cannot be started; stderr tells more.
            OSError: there is no room for another process.
            Exception: what pickle says of what cannot be pickled.
        """
        self._ask(False, func, args, kwargs)

    def hold(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Callable[[], None]:
        """Accept a call as ``__call__`` does, to begin it later; return the function that has it begin.

        So it can be promised in a response, and begin only when that is out: ``response.call_on_close(begin)``.  If
        that is never called, it begins when this process has ended.

        Raises:
            Exception: what ``__call__`` raises.
        """
        return functools.partial(self._release, self._ask(True, func, args, kwargs))

    def _ask(self, is_held: bool, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Asked:
        if not callable(func):
            raise UsageError(f"background({func!r}): give it a function, and its arguments after it")
        if reason := why_not_run(func):
            raise UsageError(f"background({detachedcall.name_of(func)}): it {reason}")
        call: tuple[Any, ...] = (detachedcall.work, (func, args, kwargs, self._timeout), {})
        asked = _Asked(detachedcall.name_of(func), child_call.request(pickled.dumps_call(call)), is_held)
        with self._lock:
            self._do(lambda server: server.ask(asked, self._most))
        return asked

    def _release(self, asked: _Asked) -> None:
        with self._lock:
            was_held, asked.is_held = asked.is_held, False
            server = self._server  # None: it was drained, or this is a fork of who has asked
            if was_held and server is not None and server.has(asked):
                self._do(lambda server: server.release(asked))
            elif was_held and asked in self._kept:
                self._living()

    def _do(self, act: Callable[[_Server], None]) -> None:
        """Act on the server; on another one, if it ends this very moment."""
        server = self._living()
        try:
            act(server)
        except (BrokenPipeError, ConnectionResetError):
            if self._living() is server:
                raise ForkServerLost("background: its server takes no more calls, for the daemon stops") from None
            # Else there is another, which has been given what was not begun.

    def start(self) -> None:
        """Start the server now instead of at the first call, which then need not wait for it (some 50 ms)."""
        with self._lock:
            self._living()

    def drain(self, timeout: float | str) -> bool:
        """Wait until all that this process has asked for is done; False if it is not by then.

        Args:
            timeout: seconds, or text.
        """
        end = time.monotonic() + positive_seconds(timeout, what="drain, timeout")
        with self._lock:
            try:
                server = self._living() if self._server is not None or self._kept else None
            except (ForkServerLost, OSError):
                return False  # what is left stays kept for another
            self._server = None
        return server is None or server.drain(end)

    def _living(self) -> _Server:
        """The server, or another in its place; what the lost one had not begun is given to that."""
        if self._server is not None:
            try:
                self._server.hear()
                return self._server
            except ForkServerLost:
                self._kept += self._server.close()
                self._server = None
        _instances().add(self)
        settings = interpreter.settings()
        name = self._host.name if self._host else None
        asked_for = Settings(settings, os.getpid(), self._max_workers, self._timeout, self._is_fresh, name)
        server = _Server(asked_for, self._host.take if self._host else _detach)
        self._server = server
        kept, self._kept = self._kept, []
        for asked in kept:
            server.ask(asked, self._most)
        return server

    def _forsake(self) -> None:
        """We are a fork: the wire is our parent's."""
        self._lock = threading.RLock()
        self._kept = []
        server, self._server = self._server, None
        if server is not None:
            server.wire.close()


class _Asked:
    """A call that is not done."""

    __slots__ = ("is_held", "name", "number", "request")

    def __init__(self, name: str, request: bytes, is_held: bool) -> None:
        self.name = name
        self.request = request  # empty when it has begun
        self.is_held = is_held
        self.number = 0


class _Server:
    """The program, as the process that asks sees it."""

    def __init__(self, settings: Settings, begin: Callable[[int], None]) -> None:
        self._ids = itertools.count(1)
        self._open: dict[int, _Asked] = {}
        self._sock, theirs = pair()
        self.wire = Wire(self._sock)
        weakref.finalize(self, self._sock.close)
        try:
            self.wire.send(Kind.SETTINGS, 0, pickled.dumps(tuple(settings)))
            begin(theirs.fileno())
            self._sock.setblocking(False)
        except BaseException:
            self.wire.close()
            raise
        finally:
            theirs.close()

    def ask(self, asked: _Asked, most: int) -> None:
        if len(self._open) >= most:
            raise BackgroundFull(f"background({asked.name}): {len(self._open)} calls are waiting or running already")
        asked.number = next(self._ids)
        kind = Kind.HELD if asked.is_held else Kind.CALL
        self._open[asked.number] = asked
        try:
            self._send(asked, kind, b"".join((asked.name.encode(), b"\0", asked.request)))
        except (BrokenPipeError, ConnectionResetError):
            if not self.has_ended():
                del self._open[asked.number]  # it is there, and refuses
            raise

    def has(self, asked: _Asked) -> bool:
        """Whether it is still to be done: a daemon that is stopped begins, and so finishes, what was held."""
        self.has_ended()
        return self._open.get(asked.number) is asked

    def has_ended(self) -> bool:
        """Whether it is gone; what it had said is taken in first."""
        try:
            self.hear()
        except ForkServerLost:
            return True
        return False

    def release(self, asked: _Asked) -> None:
        if self._open.get(asked.number) is asked:
            self._send(asked, Kind.RELEASE)

    def _send(self, asked: _Asked, kind: Kind, payload: bytes = b"") -> None:
        self.wire.send(kind, asked.number, payload)
        if not self.wire.is_waiting:
            return
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        poll.poll(_SEND_TIME * 1000)
        self.wire.flush()
        if self.wire.is_waiting:
            # What it has taken in, it finishes when it goes on; but for this one, which is dropped here.
            self.wire.close()
            self._open.clear()
            raise BackgroundFull(f"background({asked.name}): its server has not read for {_SEND_TIME:g} s")

    def hear(self) -> None:
        """Take in how far the calls are.

        Raises:
            ForkServerLost: the server is gone.
        """
        try:
            while self._hear_one(socket.MSG_DONTWAIT):
                pass
        except (Closed, OSError) as error:
            raise ForkServerLost("background: its server has ended") from error

    def _hear_one(self, flags: int = 0) -> bool:
        try:
            message = self.wire.receive(flags)
        except DescriptorsLost:
            return True
        if message is None:
            return False
        if message.kind == Kind.ENDED:
            self._open.pop(message.id, None)
        elif message.kind == Kind.BEGUN and message.id in self._open:
            self._open[message.id].request = b""
        return True

    def close(self) -> list[_Asked]:
        """It is gone: say what is lost, and return what was not begun."""
        self.wire.close()
        lost = ", ".join(asked.name for asked in self._open.values() if not asked.request)
        log.log(
            logging.ERROR if lost else logging.INFO, "background: its server has ended; lost: %s", lost or "no call"
        )
        return [asked for asked in self._open.values() if asked.request]

    def drain(self, end: float) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while poll.poll(max(end - time.monotonic(), 0.0) * 1000):
                self._hear_one()
        except (Closed, ConnectionResetError, BrokenPipeError):
            return not self._open
        finally:
            self.wire.close()
        return False


def _host(start: str, daemon: str | None, run_dir: str | None) -> Host | None:
    if start != "daemon":
        if daemon is not None or run_dir is not None:
            raise UsageError(f'start={start!r}: daemon= and run_dir= are for start="daemon"')
        return None
    from daemonkit.processes.host import Host  # what it loads, others do not need

    return Host(daemon, run_dir)


def _detach(fd: int) -> None:
    """Start the program as nobody's child, with ``fd``, the other end of our wire.

    Raises:
        ForkServerLost: it has not come up.
    """
    born: list[int] = []
    try:
        pid = interpreter.start("daemonkit.processes.detached", (fd,), has_session=True, born=born)
        code = _exit_code(pid, _START_TIME)
    except BaseException:  # control-C: it is nobody's to reap but ours
        for pid in born:
            _exit_code(pid, 0.0)
        raise
    if code:
        raise ForkServerLost(f"background: its server could not be started, status {code}; see stderr")


def background(func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Have ``func(*args, **kwargs)`` called in a detached process, and return at once: see ``Background``.

    Raises:
        BackgroundFull: 1000 calls wait already.
        Exception: what ``Background.__call__`` raises.
    """
    _default()(func, *args, **kwargs)


@functools.cache
def _default() -> Background:
    return Background()


@functools.cache
def _instances() -> weakref.WeakSet[Background]:
    """Those that have a server: a fork must let go of it."""
    instances: weakref.WeakSet[Background] = weakref.WeakSet()

    def forsake() -> None:
        for each in list(instances):
            each._forsake()

    def finish() -> None:
        # A call that has asked for others: when its process ends, so does all below it, and their server is there.
        for each in list(instances):
            each.drain(each._timeout)

    os.register_at_fork(after_in_child=forsake)
    detachedcall.at_end.append(finish)
    return instances


def _exit_code(pid: int, timeout: float) -> int:
    """Reap our child ``pid``; its exit code, 0 if somebody else has reaped it; killed after ``timeout`` seconds."""
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout * 1000):
            os.kill(pid, 9)
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED)
    except ChildProcessError:
        return 0
    return ended.si_status if ended else 0


def _count(value: object, what: str) -> int:
    if type(value) is not int or value < 1:
        raise UsageError(f"{what}={value!r} must be a whole number, 1 or more")
    return value
