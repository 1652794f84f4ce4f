"""One fork, one reset, one way out.

A child keeps nothing of its parent but its memory and the descriptors that it is meant to have.  Whoever calls
``fork`` has one thread and is clean (law 3): in the daemon that is the fork server and nobody else.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NoReturn

from daemonkit.core import prctl, tree, waitid
from daemonkit.core.streams import flush_streams
from daemonkit.core.title import take_title

FAILED: Final = 1  # the exit status of a child whose function raised, as the interpreter's own
# _signal is signal without the enums, which would cost each fork a tenth of a millisecond.
SIGNALS: Final = frozenset(map(int, signal.valid_signals()))
_KILL: Final = int(signal.SIGKILL)
_IGNORED: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # by every Python: the write itself fails


def fork(ignored: Iterable[int] = (), *, dies_with_parent: bool = True) -> int:
    """Fork; return the child's PID, and 0 in the child, which has been reset.

    In the child: every signal has its default disposition (those of ``ignored`` and handlers in C aside) and none is
    blocked, no wakeup descriptor, stdin is /dev/null, random generators have new seeds; it is killed when the parent's
    *thread* ends (prctl(2)), if it ``dies_with_parent``.  Interval timers and record locks are not inherited (fork(2)).

    Raises:
        OSError: EAGAIN or ENOMEM, if the system has no room for another process.
    """
    flush_streams()  # or both would write what is in the buffers
    pid = Forker(ignored, dies_with_parent).fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        or_end(null_stdin)
    return pid


class Forker:
    """Forks again and again as ``fork`` does, in a process without buffered output, stdin or wakeup descriptor.

    A child costs what it touches, for each page is copied for it.  What it has to undo is looked up here, once.
    """

    def __init__(self, ignored: Iterable[int] = (), dies_with_parent: bool = True) -> None:
        """See the function ``fork``."""
        self._dies_with_parent = dies_with_parent
        self._ignored = frozenset((*_IGNORED, *ignored))
        self.look()

    def look(self) -> None:
        """Look at what a child has to undo; again if foreign code has run here."""
        known = (None, _signal.SIG_DFL)  # None: a handler in C, such as faulthandler's, is right in a child, too
        now = {number: _signal.getsignal(number) for number in SIGNALS}
        self._to_ignore = frozenset(number for number in self._ignored if now[number] != _signal.SIG_IGN)
        self._to_default = frozenset(number for number in SIGNALS - self._ignored if now[number] not in known)
        # random seeds itself anew (os.register_at_fork); numpy does not.
        self._numpy = sys.modules.get("numpy.random")

    def fork(self) -> int:
        """See the function ``fork``."""
        parent = os.getpid()
        # Neither may a handler of ours run in the child, nor what we ignore be lost: it waits for the reset.
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, self._to_default)
        try:
            pid = os.fork()
        except BaseException:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
            raise
        try:
            if pid == 0:
                self._reset(parent)
            else:
                _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        except BaseException:
            if pid == 0:
                fail()
            os.kill(pid, signal.SIGKILL)  # a handler has raised, as for ^C: nobody would know the child's number
            os.waitid(os.P_PID, pid, os.WEXITED)
            raise
        return pid

    def _reset(self, parent: int) -> None:
        if self._dies_with_parent:
            prctl.die_with_parent(_KILL)
            if os.getppid() != parent:  # it ended before it could be told; under PID 1 the new number need not be 1
                os._exit(FAILED)
        for number in self._to_default:
            _signal.signal(number, _signal.SIG_DFL)
        for number in self._to_ignore:
            _signal.signal(number, _signal.SIG_IGN)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        if self._numpy is not None:
            self._numpy.seed()


def null_stdin() -> None:
    """Let descriptor 0 be /dev/null."""
    null = os.open(os.devnull, os.O_RDONLY)
    if null == 0:  # it was closed
        os.set_inheritable(0, True)
    else:
        os.dup2(null, 0)
        os.close(null)


def or_end(function: Callable[[], Any]) -> None:
    """Call it in a child that must not go on without it: not as a second parent."""
    try:
        function()
    except BaseException:  # noqa: BLE001 - told here, once, and by the exit status
        fail()


def fail() -> NoReturn:
    """Tell the exception that is being handled, on stderr, and end the process."""
    sys.excepthook(*sys.exc_info())
    leave(FAILED)


def run(function: Callable[[], Any], title: str, *, adopts: bool = True) -> NoReturn:
    """Be the process for ``function``, under ``title``, and end with its outcome as exit status; never returns.

    What the function raises goes to stderr.  Processes that it has started and left behind are ended with it, also
    those that tried to leave if it ``adopts`` its orphans; one that lives long does not, for it would not reap them.
    """
    take_title(title)
    if adopts:
        prctl.become_subreaper()
    code = outcome(function)
    end_descendants()
    leave(code)


def outcome(function: Callable[[], Any]) -> int:
    """Call ``function``; return the exit status that it means."""
    try:
        function()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return FAILED
    except BaseException:  # noqa: BLE001 - told here, once, and by the exit status
        sys.excepthook(*sys.exc_info())
        return FAILED
    return 0


def execute(argv: Sequence[str]) -> NoReturn:
    """Become the program ``argv``; if that cannot be, say why on stderr and end as a shell would (127, 126)."""
    code = 126
    try:
        os.execvp(argv[0], list(argv))
    except FileNotFoundError:
        print(f"execute {argv[0]}: no such program", file=sys.stderr)
        code = 127
    except OSError as error:
        print(f"execute {argv[0]}: {error.strerror}", file=sys.stderr)
    leave(code)


def wait_for(pid: int, timeout: float) -> None:
    """Reap our child ``pid``; after ``timeout`` seconds, or if there is no room to wait so, it is killed first."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return  # reaped by somebody else
    except OSError:  # EMFILE, ENFILE, ENOMEM: a wait without it has no bound
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED)
        return
    with open(pidfd, "rb", buffering=0, closefd=True) as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        if not poll.poll(timeout * 1000):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED)


def leave(code: int) -> NoReturn:
    """End the process now, streams flushed: the parent's exit functions and buffers are not ours to run."""
    flush_streams()
    os._exit(code)


def end_descendants() -> int:
    """Kill and reap whatever this process has started or adopted; tell how many were still alive.

    For a process in which nobody waits for a child any more: the wait is for all.  What has become another user's
    (a set-user-ID program) cannot be killed: it is named on stderr, and left.
    """
    killed = 0
    left: set[int] = set()
    while waitid.has_children() and (pids := tree.children() - left):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # SIGCHLD is ignored here: the kernel has reaped it
                continue
            except PermissionError:
                left.add(pid)
                print(f"kill pid {pid}, left by pid {os.getpid()}: it belongs to another user", file=sys.stderr)
        for pid in pids - left:  # each hands us its own children when it ends: the next round is theirs
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, pid, os.WEXITED)
                killed += ended is not None and ended.si_status == signal.SIGKILL
    return killed


def freeze() -> None:
    """Prepare to fork often: no collection in a child touches, and so copies, what it shares with us (gc.freeze)."""
    gc.collect()
    gc.freeze()
