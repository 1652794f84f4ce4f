"""Every error that daemonkit raises on purpose.

    DaemonkitError
    ├── UsageError            (ValueError)        a decorator, option or argument that cannot be meant
    │   └── ConfigError                           the same, in a configuration file or the environment
    ├── ScriptError           (ImportError)       the script cannot be loaded, or is not one
    ├── StartError            (RuntimeError)      the daemon did not become ready
    ├── AlreadyRunning        (lockfile.AlreadyLocked)    the PID file is locked by another process
    ├── LockTimedOut          (lockfile.LockTimeout)      ... and stayed so for the whole time-out
    ├── LockNotHeld           (lockfile.NotLocked)        release of a PID file that nobody holds
    ├── LockNotMine           (lockfile.NotMyLock)        ... or that another process holds
    ├── NotRunning            (ProcessLookupError)
    ├── NotAllowed            (PermissionError)   not ours to signal, read or replace
    ├── UntrustedFile         (PermissionError)   a file or directory that somebody else may change
    ├── RunDirectoryError     (lockfile.LockFailed)       the run directory or a file in it cannot be used
    ├── PrivilegeError        (PermissionError)   user or group could not be taken on
    ├── ControlError          (ConnectionError)   the daemon did not answer, or answered with an error
    ├── ForkServerLost        (ChildProcessError) the process that forks for this one has ended
    ├── WorkerLost            (ChildProcessError) a pool's child ended before it gave the call's result
    │   └── CallTimeout       (TimeoutError)      ... killed because the call's time was up
    ├── UnpicklableError      (TypeError)         a result or exception came, and cannot be made again here
    ├── PoolFull              (BlockingIOError)   as many calls wait as may, and the caller would not wait
    ├── BackgroundFull        (BlockingIOError)   as many calls as may wait for the background already
    ├── ForkRefused           (RuntimeError)      a child would share threads or connections of this process
    ├── StopTimeout           (TimeoutError)      still there when the time was up
    ├── MissingLibrary        (ImportError)       an optional library is wanted, and is not installed
    ├── BrokerError           (ConnectionError)   the broker of a queue cannot be reached, or refuses
    │   ├── BrokerFull        (OSError)           ... for want of room on its disk or in its memory
    │   ├── TaskTooLarge      (ValueError)        ... takes no body of that size
    │   └── PutUncertain                          ... was lost before it had said that a task is put
    ├── NoSuchTask            (LookupError)       the broker has no such task, or not in such a state
    ├── PayloadError          (ValueError)        a task's body is none that a declared task can be called with
    ├── TaskFailed            (RuntimeError)      a task whose result is wanted has failed for good
    ├── TaskTimeout           (TimeoutError)      raised in a task whose soft_timeout is up
    ├── CoordinatorError      (ConnectionError)   the coordinator cannot be reached, or refuses
    │   ├── CoordinatorLost                       the connection was lost: what was asked may have been done
    │   └── VersionMismatch   (ValueError)        somebody else has changed the value meanwhile
    ├── CoordinatorTimeout    (TimeoutError)      a lock, semaphore, barrier or queue did not come in that time
    ├── NotLeader             (RuntimeError)      what only the leader has is asked of who does not lead
    ├── ChannelClosed         (EOFError)          the other end of a channel is closed
    └── IpcError              (OSError)           a System V object cannot be made, found or used
        ├── NoSuchObject      (FileNotFoundError) nothing has that key, or it was removed meanwhile
        ├── MessageTooLong    (ValueError)        more than the queue, or the kernel, takes as one message
        └── IpcTimeout        (TimeoutError)      nothing came, or there was no room, in that time

A message says what was tried, on what, why it failed, and what to do.  Only the command turns an error
into an exit code: ``exit_code`` is the code it uses.
"""

from __future__ import annotations

from typing import Any

from lockfile import AlreadyLocked, LockFailed, LockTimeout, NotLocked, NotMyLock


class DaemonkitError(Exception):
    """The root: ``except DaemonkitError`` catches all that daemonkit raises on purpose."""

    exit_code = 1


class UsageError(DaemonkitError, ValueError):
    """A decorator, option or argument has a value that cannot be meant."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or environment variable holds an unknown key or a wrong value."""


class ScriptError(DaemonkitError, ImportError):
    """The script does not exist, is not Python, or raised while it was imported."""


class StartError(DaemonkitError, RuntimeError):
    """The daemon ended, or stayed silent, before it was ready."""


class AlreadyRunning(DaemonkitError, AlreadyLocked):
    """The PID file is locked by a living process.

    ``pid`` is that process (``None`` if it has not yet written its number), ``path`` the PID file.
    """

    def __init__(self, path: str, pid: int | None) -> None:
        holder = f"pid {pid}" if pid else "a process that has not written its pid"
        super().__init__(f"lock {path}: held by {holder}")
        self.path = path
        self.pid = pid


class LockTimedOut(DaemonkitError, LockTimeout):
    """Another process held the PID file for the whole time-out."""


class LockNotHeld(DaemonkitError, NotLocked):
    """Nobody holds the PID file that was to be released."""


class LockNotMine(DaemonkitError, NotMyLock):
    """Another process holds the PID file that was to be released."""


class NotRunning(DaemonkitError, ProcessLookupError):
    """No process holds the PID file's lock."""

    exit_code = 7  # LSB, init script actions: "program is not running"


class NotAllowed(DaemonkitError, PermissionError):
    """The daemon belongs to another user."""

    exit_code = 4


class UntrustedFile(DaemonkitError, PermissionError):
    """Somebody else may write a file or directory that would be obeyed."""


class RunDirectoryError(DaemonkitError, LockFailed):
    """The run directory, or a file in it, cannot be used."""


class PrivilegeError(DaemonkitError, PermissionError):
    """The configured user or group could not be taken on completely."""


class ControlError(DaemonkitError, ConnectionError):
    """The daemon did not answer on its control socket, or refused the request."""


class ForkServerLost(DaemonkitError, ChildProcessError):
    """The fork server has ended, and with it all that it had forked."""


class ForkRefused(DaemonkitError, RuntimeError):
    """A child would share threads or connected sockets of this process; ``threads`` and ``connections`` name them."""

    def __init__(self, message: str, threads: tuple[str, ...] = (), connections: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.threads = threads
        self.connections = connections


class WorkerLost(DaemonkitError, ChildProcessError):
    """The child that ran a call ended before it gave its result; no other call is concerned.

    ``pid`` is the child (None: the call had not begun), ``signal`` what ended it (None: it exited), ``receipt`` how it
    ended and what it used (None: nobody can know, the fork server is gone).
    """

    def __init__(self, message: str, receipt: Any = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.receipt = receipt
        self.pid: int | None = receipt.pid if receipt else pid
        self.signal: int | None = receipt.signal if receipt else None


class CallTimeout(WorkerLost, TimeoutError):
    """A call took longer than its ``timeout``: its child was killed, with all that it had started."""


class UnpicklableError(DaemonkitError, TypeError):
    """The result or exception of a call cannot be read or unpickled here."""


class PoolFull(DaemonkitError, BlockingIOError):
    """``max_pending`` calls wait already, and the caller would not wait for room."""


class BackgroundFull(DaemonkitError, BlockingIOError):
    """``max_pending`` calls wait already; this one is not accepted."""


class StopTimeout(DaemonkitError, TimeoutError):
    """The daemon was still there when the time was up."""


class MissingLibrary(DaemonkitError, ImportError):
    """An optional library is wanted, and is not installed."""


class BrokerError(DaemonkitError, ConnectionError):
    """The broker of a queue cannot be reached or used, or refuses what was asked."""


class BrokerFull(BrokerError):
    """The broker has no room, on its disk or in its memory; nothing was put."""


class TaskTooLarge(BrokerError, ValueError):
    """The body of a task is larger than the broker takes; nothing was put."""


class PutUncertain(BrokerError):
    """The broker was lost before it had answered: tasks may have been put or not, and only the caller can know
    whether putting them again, and so perhaps doing them twice, is the lesser evil."""


class NoSuchTask(DaemonkitError, LookupError):
    """The broker has no task of that id, or it is not in a state in which that can be done."""


class PayloadError(DaemonkitError, ValueError):
    """A task's body is no JSON, names no declared task, or has arguments that this does not take."""


class TaskFailed(DaemonkitError, RuntimeError):
    """The task whose result is wanted is buried; the message is the reason."""


class TaskTimeout(DaemonkitError, TimeoutError):
    """The task's ``soft_timeout`` is up: it may tidy up until its ``timeout``."""


class CoordinatorError(DaemonkitError, ConnectionError):
    """The coordinator cannot be reached or used, or refuses what was asked."""


class CoordinatorLost(CoordinatorError):
    """The connection was lost before the reply came: what was asked may have been done."""


class VersionMismatch(CoordinatorError, ValueError):
    """The value has another version than was expected: somebody else has changed it meanwhile."""


class CoordinatorTimeout(DaemonkitError, TimeoutError):
    """What was waited for, others had for the whole time."""


class NotLeader(DaemonkitError, RuntimeError):
    """This process does not act for a leader."""


class ChannelClosed(DaemonkitError, EOFError):
    """The other end of the channel is closed, or all processes that held it have ended; nothing is left to read."""


class IpcError(DaemonkitError, OSError):
    """A semaphore, message queue or shared memory cannot be made, found or used."""


class NoSuchObject(IpcError, FileNotFoundError):
    """Nothing has that key, or somebody has removed it meanwhile."""


class MessageTooLong(IpcError, ValueError):
    """The message is larger than the queue, or the kernel, takes at all; waiting would not help."""


class IpcTimeout(IpcError, TimeoutError):
    """No message came, or there was no room for one, in that time."""


def told(error: BaseException) -> str:
    """``Kind: message``, whatever the error's own ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - a mistake in the script's own exception class must not become ours
        return f"{type(error).__name__} (and it cannot be put into words)"


def traced(error: BaseException, ours: str) -> str:
    """Its traceback without the first frames, those in the file ``ours``: they say nothing to the script's author."""
    import traceback

    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == ours:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))
