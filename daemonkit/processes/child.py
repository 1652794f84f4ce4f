"""One fork, one reset, one way out.

A child keeps nothing of its parent but its memory and the descriptors that it is meant to have.  Whoever calls
``fork`` has one thread and is clean (law 3): in the daemon that is the fork server and nobody else.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

from setproctitle import setproctitle

from daemonkit.core import prctl, tree
from daemonkit.core.logs import flush_streams

FAILED: Final = 1  # the exit status of a child whose function raised, as the interpreter's own
_IGNORED: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # by every Python: the write itself fails
# _signal is signal without the enums, which would cost each fork a tenth of a millisecond.
_ALL: Final = frozenset(map(int, signal.valid_signals()))


def fork(ignored: Iterable[int] = ()) -> int:
    """Fork; return the child's PID, and 0 in the child, which has been reset.

    In the child: every signal has its default disposition (those of ``ignored`` aside) and none is blocked, no
    wakeup descriptor, stdin is /dev/null, random generators have new seeds; it is killed when the parent's thread
    ends (prctl(2)).  Interval timers and record locks are not inherited anyway (fork(2)).

    Raises:
        OSError: EAGAIN or ENOMEM, if the system has no room for another process.
    """
    parent = os.getpid()
    # A handler of ours must not run in the child: what comes before its reset waits for it.
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _ALL)
    try:
        pid = os.fork()
    except BaseException:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        raise
    if pid:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        return pid
    try:
        reset(parent, ignored)
    except BaseException:  # noqa: BLE001 - told, and by the exit status; the caller of the parent must not go on here
        sys.excepthook(*sys.exc_info())
        os._exit(FAILED)
    return 0


def reset(parent: int, ignored: Iterable[int] = ()) -> None:
    """Make a process that was just forked by ``parent``, all signals blocked, a child of its own."""
    prctl.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be told; under PID 1 the new number need not be 1
        os._exit(FAILED)
    signal.set_wakeup_fd(-1)
    for number in _ALL:
        if _signal.getsignal(number) not in (None, _signal.SIG_DFL):
            _signal.signal(number, _signal.SIG_DFL)
    for number in (*_IGNORED, *ignored):
        _signal.signal(number, _signal.SIG_IGN)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if null > 0:
        os.close(null)
    # random has seeded itself anew (os.register_at_fork); numpy has not.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def run(function: Callable[[], Any], title: str) -> NoReturn:
    """Be the process for ``function``, under ``title``, and end with its outcome as exit status; never returns.

    What the function raises goes to stderr.  Processes that it has started and left behind are ended with it.
    """
    setproctitle(title)
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


def leave(code: int) -> NoReturn:
    """End the process now, streams flushed: the parent's exit functions and buffers are not ours to run."""
    flush_streams()
    os._exit(code)


def end_descendants() -> int:
    """Kill and reap whatever this process has started or adopted; tell how many were still alive.

    For a process in which nobody waits for a child any more: the wait is for all.
    """
    killed = 0
    while has_children():
        pids = tree.children()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:  # each hands us its own children when it ends: the next round is theirs
            with contextlib.suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, pid, os.WEXITED)
                killed += ended is not None and ended.si_status == signal.SIGKILL
    return killed


def has_children() -> bool:
    """Whether any child is there, living or ended; nobody is reaped (waitid(2), WNOWAIT)."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def freeze() -> None:
    """Prepare to fork often: no collection in a child touches, and so copies, what it shares with us (gc.freeze)."""
    gc.collect()
    gc.freeze()
