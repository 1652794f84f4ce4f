"""From the command to a ready daemon, or to the reason why there is none.

The launcher takes the lock, forks, and waits at a status pipe until the daemon says "ready" or "failed".  It is a
child subreaper (prctl(2)) meanwhile: the daemon's own death, with its signal, and whatever it leaves behind, come
to the launcher and to nobody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any, NoReturn

from daemonkit.core import board, privileges, tree
from daemonkit.core.holder import find, settled
from daemonkit.core.pidfile import PidFile, inspect
from daemonkit.ending import seek_lost, sweep
from daemonkit.errors import AlreadyRunning, StartError, UsageError
from daemonkit.handover import Handover

if TYPE_CHECKING:
    from daemonkit.config.options import Options

STOPPING_TIME = 30.0  # seconds that a start waits for the end of a daemon that is stopping
_LAST_WORDS = 5.0  # seconds that a daemon which did not become ready has to clean up after TERM


def start(handover: Handover, options: Options) -> int:
    """Start the classic daemon; return its PID once it is ready.

    Raises:
        AlreadyRunning: with the PID of the one that runs.
        StartError: it ended, or stayed silent for ``ready_timeout``; the message is its own reason or traceback.
            Nothing is left of it.
        UsageError: the same, because a declaration in the script cannot be meant.
    """
    _check(options)
    lock_fd = _lock(handover).detach()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored it would take our children's status from us
    before = tree.children()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    gate, opener = os.pipe2(os.O_CLOEXEC)
    handover = handover._replace(lock_fd=lock_fd, status_fd=writer)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child == 0:
        os.close(opener)
        _become(handover, options, gate)
    for fd in (writer, lock_fd, gate):
        os.close(fd)
    from daemonkit.core import prctl  # while the child loads what it needs: ctypes takes its time, too

    prctl.become_subreaper()
    os.write(opener, b"go")
    os.close(opener)
    os.waitid(os.P_PID, child, os.WEXITED)
    try:
        _restore_signals(mask)
        return _Wait(reader, handover, options.ready_timeout).until_ready()
    except BaseException:
        _end_all(tree.children() - before)
        sweep(handover.pid_path, handover.socket_path)
        raise


def run_in_front(handover: Handover, options: Options) -> NoReturn:
    """Become the daemon in this very process: for terminals, supervisors and containers.

    Raises:
        AlreadyRunning: with the PID of the one that runs.
    """
    _check(options)
    pidfile = _lock(handover)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    from daemonkit.core.daemonize import open_standard_streams, reset_signals

    reset_signals()
    if os.getpid() == 1:
        pidfile = _serve_as_init(pidfile)
    os.umask(options.umask)
    if options.chdir:
        os.chdir(options.chdir)
    lock_fd = pidfile.detach()
    open_standard_streams()
    environ = dict(os.environ)
    handover._replace(lock_fd=lock_fd).execute(environ)


def _check(options: Options) -> None:
    """A refusal now costs nothing."""
    privileges.resolve(options.user, options.group)
    if options.chdir and not os.path.isdir(options.chdir):
        raise UsageError(f"chdir {options.chdir}: there is no such directory; make it, or name another with --chdir")


def _lock(handover: Handover) -> PidFile:
    """Take the PID file, empty; a daemon that lost its own to somebody's rm is sought first."""
    seek_lost(handover.pid_path, handover.socket_path)
    pidfile = PidFile(handover.pid_path)
    before = inspect(handover.pid_path)
    for last in (False, True):
        try:
            pidfile.acquire(0, write_pid=False)
            break
        except AlreadyRunning as error:
            if last or not _outlasts_stopping(error.path):
                raise AlreadyRunning(error.path, settled(error.path).pid) from None
    if before.pid is not None and not before.locked:  # it crashed
        from daemonkit import leftovers

        leftovers.end(handover.name, handover.pid_path)
    return pidfile


def _outlasts_stopping(pid_path: str) -> bool:
    """If the one that runs is on its way out, wait for its end, within bounds; tell whether it has ended."""
    with find(pid_path) or contextlib.nullcontext() as holder:
        if holder is None:
            return not inspect(pid_path).locked  # held for a moment, by a `kill` that removed what was left
        seen = board.read(holder.pid)
        return seen is not None and seen.state == "stopping" and holder.wait(STOPPING_TIME)


def _serve_as_init(pidfile: PidFile) -> PidFile:
    """Return in a child, which holds the PID file; the parent, PID 1, reaps orphans until that child ends."""
    path, lock_fd = pidfile.path, pidfile.detach()
    child = os.fork()
    if child == 0:
        return PidFile.adopt(path, lock_fd)
    os.close(lock_fd)
    from daemonkit.core.init import serve

    os._exit(serve(child))


def _become(handover: Handover, options: Options, gate: int) -> NoReturn:
    """In the first child: the steps of daemon(7), then the daemon's image; not before the launcher opens ``gate``."""
    try:
        from daemonkit.core.daemonize import Context, clean_environment

        directory = options.chdir or "/"
        memfd = handover.store()
        if not os.read(gate, 2):
            raise StartError("the launcher was killed")
        Context(keep=[memfd, *handover.descriptors()], umask=options.umask, working_directory=directory).open()
        text = b"%d\n" % os.getpid()
        os.pwrite(handover.lock_fd, text, 0)
        os.write(handover.status_fd, json.dumps({"pid": os.getpid()}).encode() + b"\n")
        handover.execute(clean_environment(os.environ, directory), memfd)
    except BaseException as error:  # noqa: BLE001 - nobody is above us: the launcher is told, and we end
        with contextlib.suppress(OSError):
            os.write(handover.status_fd, json.dumps({"failed": f"become a daemon: {error}"}).encode() + b"\n")
    finally:
        os._exit(1)


class _Wait:
    """The launcher's end of the status pipe, and the daemon's pidfd: the script may close or pass on the other end."""

    def __init__(self, reader: int, handover: Handover, ready_timeout: float) -> None:
        self._reader = reader
        self._name = handover.name
        self._timeout = ready_timeout
        self._pid: int | None = None
        self._pidfd = -1
        self._poll = select.poll()
        self._poll.register(reader, select.POLLIN)
        os.set_blocking(reader, False)

    def until_ready(self) -> int:
        """Return the daemon's PID, or raise the reason why it is not ready."""
        end = time.monotonic() + self._timeout
        rest = b""
        while True:
            left = end - time.monotonic()
            happened = [fd for fd, _ in self._poll.poll(min(max(1, int(left * 1000)), 2**31 - 1))] if left > 0 else []
            if not happened:
                doing = f" (it is {busy.name})" if (busy := self._activity()) and busy.name else ""
                raise StartError(f"{self._name} was not ready within ready_timeout, {self._timeout:g} s{doing}; ended")
            if data := self._read():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if self._hear(json.loads(line)) and self._pid:
                        return self._pid
            elif self._pid is None or self._pidfd in happened:
                raise StartError(f"{self._name} {self._death()} before it was ready")
            elif data is not None:
                self._poll.unregister(self._reader)  # its end is closed: what is left to wait for is its death

    def _read(self) -> bytes | None:
        """What is in the pipe: b"" for its end, None for nothing yet."""
        try:
            return os.read(self._reader, 65536)
        except BlockingIOError:
            return None

    def _hear(self, message: dict[str, Any]) -> bool:
        if "pid" in message:
            self._pid = message["pid"]
            self._pidfd = os.pidfd_open(message["pid"])
            self._poll.register(self._pidfd, select.POLLIN)
        if "failed" in message:
            wrong_use = message.get("code") == UsageError.exit_code
            raise UsageError(message["failed"]) if wrong_use else StartError(message["failed"])
        return "ready" in message

    def _death(self) -> str:
        if self._pid is None:
            return "ended"
        try:
            end = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return "ended"
        if end is None or end.si_code == os.CLD_EXITED:
            return f"exited with status {end.si_status if end else 0}"
        return f"was killed by {signal.Signals(end.si_status).name}"

    def _activity(self) -> Any:
        return board.read(self._pid) if self._pid else None


def _restore_signals(mask: set[int | signal.Signals]) -> None:
    """Let ^C and TERM end the launcher, and the daemon-to-be with it."""

    def give_up(number: int, frame: object) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)  # a second one must not interrupt the ending of what was begun
        raise StartError(f"interrupted by {signal.Signals(number).name}; nothing was left running")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup(1) is meant for the start, too
            signal.signal(number, give_up)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask - {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


def _end_all(pids: set[int]) -> None:
    """End the daemon-to-be and whatever it started: TERM to clean up, then KILL; each dead hands us its orphans."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known = tree.children() - pids
    for pid in pids:
        _end(pid)
    while orphans := tree.children() - known:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _end(pid: int) -> None:
    """TERM our child, KILL it if it stays; reaping it is what makes the number ours until then."""
    pidfd = os.pidfd_open(pid)
    try:
        for number, patience in ((signal.SIGTERM, _LAST_WORDS), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], patience)[0]:
                break
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    finally:
        os.close(pidfd)
