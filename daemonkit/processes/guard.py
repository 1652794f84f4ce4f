"""The fork guard: what a child would share with this process, told or taken from it.

Two processes with one TLS session, or one database connection, both speak into one stream: the server sees a "bad
record mac", or a goodbye in the name of both.  A lock that another thread holds stays held in the child for ever.  The
fork server's children have nothing of the kind (law 3); whoever forks from a process of the user's asks the guard.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final, NamedTuple, Protocol

from daemonkit.core.streams import flush_streams
from daemonkit.errors import ForkRefused, UsageError
from daemonkit.processes import child

log = logging.getLogger("daemonkit.fork")

Hook = Callable[[], object]

UNNAMED: Final = "an unnamed unix socket"  # as the other end of a socketpair(2) is
_EXIT_TIMEOUT: Final = 0.25  # seconds that a running thread which Python does not know has, to turn out to be ending
_PIDFD_THREAD: Final = os.O_EXCL  # pidfd_open(2), since Linux 6.9
_STREAMS: Final = (0, 1, 2)  # every child has them; a supervisor may have made them sockets
# What is held back from collection and finalization at a fork belongs to the process, so it forks once at a time.
_one_at_a_time: Final = threading.RLock()


class Policy(enum.StrEnum):
    """What becomes of a fork whose child would share threads or connections (``fork_guard``)."""

    REFUSE = "refuse"  # ForkRefused
    WARN = "warn"  # the log names them, and the child shares them
    CLOSE = "close"  # the child finds the connections hung up; threads are named in the log


class HasFileno(Protocol):
    """What has a descriptor: a socket, a file, a wire."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class Connection(NamedTuple):
    """A connected stream socket of this process."""

    fd: int
    peer: str

    def __str__(self) -> str:
        return f"fd {self.fd} to {self.peer}"


class Shared(NamedTuple):
    """What a child would share with this process."""

    threads: tuple[str, ...]
    connections: tuple[Connection, ...]

    def __bool__(self) -> bool:
        return bool(self.threads or self.connections)

    def __str__(self) -> str:
        kinds = ("the locks of {} thread", self.threads), ("{} connection", self.connections)
        return " and ".join(
            f"{kind.format(len(found))}{'s' if len(found) > 1 else ''} ({', '.join(map(str, found))})"
            for kind, found in kinds
            if found
        )


class ForkHooks:
    """What to do around a guarded fork: close before it, open again after it.

    They are ordered as those of os.register_at_fork, which see every fork; these see the guarded ones, ``before`` in
    time for the guard to find closed what they close, and what they raise counts.
    """

    def __init__(self) -> None:
        """No hook yet."""
        self._rows: list[tuple[Hook | None, Hook | None, Hook | None]] = []

    def add(
        self, *, before: Hook | None = None, after_in_parent: Hook | None = None, after_in_child: Hook | None = None
    ) -> None:
        """Call these at each fork from now on; ``before`` in the reverse order, the others in the order of addition."""
        self._rows.append((before, after_in_parent, after_in_child))

    def before(self) -> None:
        """Call the hooks that come before; if one raises, undo what was done, and raise it: there is no fork."""
        done: list[Hook] = []
        for before, after_in_parent, _ in reversed(self._rows):
            try:
                if before:
                    before()
            except BaseException:
                _call_all(reversed(done))
                raise
            if after_in_parent:
                done.append(after_in_parent)

    def after_in_parent(self) -> None:
        """Call the parent's hooks; one that raises is logged, for the child is there."""
        _call_all(hook for _, hook, _ in self._rows if hook)

    def after_in_child(self) -> None:
        """Call the child's hooks; what one raises is raised."""
        for _, _, hook in self._rows:
            if hook:
                hook()


class Guard:
    """Forks under a policy."""

    def __init__(
        self, policy: str = Policy.REFUSE, keep: Iterable[int | HasFileno] = (), hooks: ForkHooks | None = None
    ) -> None:
        """Guard the forks of this process.

        Args:
            policy: ``"refuse"``, ``"warn"`` or ``"close"``.
            keep: connected sockets that are meant for the child; descriptors 0, 1 and 2 always are.
            hooks: called around each fork.

        Raises:
            UsageError: no such policy.
        """
        try:
            self.policy = Policy(policy)
        except ValueError:
            raise UsageError(f"fork_guard={policy!r}: it is one of {', '.join(Policy)}") from None
        self.hooks = hooks or ForkHooks()
        self._keep = frozenset(thing if isinstance(thing, int) else thing.fileno() for thing in keep)
        self._told: Shared | None = None

    def fork(self, ignored: Iterable[int] = ()) -> int:
        """Fork as ``child.fork`` does, with the hooks around it; return the child's PID, and 0 in the child.

        Under "close" the child's connections are hung up: to read them finds their end, to write fails with EPIPE, and
        to close or collect their objects says nothing to the server.  Nothing of the user's runs before that, but what
        stands in os.register_at_fork.  Threads cannot be closed: the child has the forking thread alone, and a lock
        that another one held stays held in it.  (From Python 3.12 on os.fork has a DeprecationWarning for that.)

        A child whose hook raises prints the traceback and exits with 1.

        Raises:
            ForkRefused: the policy is "refuse" and a child would share something; it names all of it.
            OSError: EAGAIN or ENOMEM, if the system has no room for another process.
        """
        with _one_at_a_time:
            self.hooks.before()
            try:
                found = self.check()
                flush_streams()  # or both would write what is in the buffers
                with _nothing_finalized(bool(found.threads) and self.policy is Policy.CLOSE):
                    pid = child.fork(ignored)
                    if pid == 0:
                        _or_end(self.in_child)
            except BaseException:
                self.hooks.after_in_parent()
                raise
            if pid:
                self.hooks.after_in_parent()
            else:
                _or_end(self.hooks.after_in_child)
        return pid

    def check(self) -> Shared:
        """Look at what a child would share, and refuse it or warn of it, as the policy is; a set is told once.

        Raises:
            ForkRefused: it names all of it.
        """
        found = shared(self._keep)
        if found and self.policy is Policy.REFUSE:
            raise ForkRefused(
                f"fork: refused, the child would share {found}: fork before they are there, end them in a hook before "
                f'the fork, or set fork_guard to "close" or "warn"',
                found.threads,
                tuple(map(str, found.connections)),
            )
        remaining = found if self.policy is Policy.WARN else Shared(found.threads, ())
        if remaining and remaining != self._told:
            log.warning("fork: the child shares %s", remaining)
        self._told = remaining
        return found

    def in_child(self) -> None:
        """Hang up the connections of a process that was just forked, if that is the policy."""
        if self.policy is Policy.CLOSE:
            _hang_up(connections(self._keep))  # another thread may have opened one since the check


def shared(keep: Collection[int] = ()) -> Shared:
    """What a child would share that is forked now: threads but our own, and connections but those in ``keep``."""
    return Shared(threads(), connections(keep))


def threads() -> tuple[str, ...]:
    """Other threads of this process, by name: Python's, and those that it does not know (proc(5))."""
    names = {thread.native_id: repr(thread.name) for thread in threading.enumerate()}
    ours = threading.get_native_id()
    others = sorted(tid for tid in map(int, os.listdir("/proc/self/task")) if tid != ours)
    return tuple(name for tid in others if (name := names.get(tid) or _foreign(tid)))


def connections(keep: Collection[int] = ()) -> tuple[Connection, ...]:
    """Connected stream sockets of this process, but for its standard streams and the descriptors in ``keep``."""
    fds = sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if fd not in _STREAMS and fd not in keep)
    return tuple(Connection(fd, peer) for fd in fds if (peer := _peer(fd)))


def _foreign(tid: int) -> str | None:
    """The name of a thread that Python does not know; None if it is about to end.

    Python forgets a thread, and ``join`` returns, before the kernel does: one that has been joined must not be named.
    """
    try:
        if _state(tid) == "R":
            _await_exit(tid)
        if _state(tid) in "ZX":
            return None
        with open(f"/proc/self/task/{tid}/comm") as file:
            return f"{file.read().strip()!r}, thread {tid}, not Python's"
    except OSError:
        return None


def _state(tid: int) -> str:
    with open(f"/proc/self/task/{tid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def _await_exit(tid: int) -> None:
    try:
        pidfd = os.pidfd_open(tid, _PIDFD_THREAD)
    except OSError:  # EINVAL: before 6.9 Linux has no event for the end of a thread
        time.sleep(_EXIT_TIMEOUT)
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(_EXIT_TIMEOUT * 1000)
    finally:
        os.close(pidfd)


def _peer(fd: int) -> str | None:
    """Whom a connected stream socket is connected to; None if ``fd`` is none, or not any more."""
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            return None
        # If it had to find the type, Python would apply the default time-out, and so O_NONBLOCK, to the user's socket.
        sock = socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK, fileno=fd)
    except OSError:
        return None
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            return None
        peer = _told(sock.getpeername())
    except OSError:
        return None
    finally:
        sock.detach()
    return None if _has_hung_up(fd) else peer


def _has_hung_up(fd: int) -> bool:
    """Whether both directions are shut: nothing can be said any more (poll(2), POLLHUP)."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & (select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))


def _told(address: Any) -> str:
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(address, bytes):  # abstract (unix(7))
        return f"unix:@{address[1:].decode(errors='replace')}"
    return f"unix:{address}" if address else UNNAMED


def _hang_up(found: Collection[Connection]) -> None:
    """Put a socket in the place of each that has nobody at its other end; the server hears nothing.

    Not /dev/null: what is written there would seem to be sent.
    """
    if not found:
        return
    dead, peer = socket.socketpair()
    peer.close()
    with dead:
        for connection in found:
            os.dup2(dead.fileno(), connection.fd, inheritable=False)


@contextlib.contextmanager
def _nothing_finalized(has_threads: bool) -> Iterator[None]:
    """Until the end of the block no object of before is finalized in the child: it could still say goodbye.

    A collection would do that.  So does os.fork itself, which clears the states of the threads that a child has not.
    """
    held = _held_by_threads() if has_threads else []
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        held.clear()
        if was_enabled:
            gc.enable()


def _held_by_threads() -> list[object]:
    """What may be referred to by the state of a thread alone: thread-local and context variables, exceptions."""
    import contextvars

    roots = [each for each in gc.get_objects() if issubclass(type(each), (threading.local, contextvars.Context))]
    tables = gc.get_referents(*roots)  # of thread-local variables: by thread
    return [*roots, *tables, *gc.get_referents(*tables), sys._current_exceptions()]


def _or_end(function: Hook) -> None:
    """Call it in a child that must not go on without it."""
    try:
        function()
    except BaseException:  # noqa: BLE001 - told, and by the exit status; the caller of the parent must not go on here
        sys.excepthook(*sys.exc_info())
        child.leave(child.FAILED)


def _call_all(hooks: Iterable[Hook]) -> None:
    for hook in hooks:
        try:
            hook()
        except Exception:
            log.exception("fork: a hook after it has failed in the parent")
