"""A task's own process: what the consumer's fork server forks, and what it does."""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, Final, NoReturn

from daemonkit.core.duration import describe
from daemonkit.core.logs import Sink
from daemonkit.errors import PayloadError, TaskTimeout, told, traced
from daemonkit.processes import child, modules
from daemonkit.processes.wire import Message, Wire
from daemonkit.queue import current, payload
from daemonkit.queue.broker import Reservation
from daemonkit.queue.declare import Policy
from daemonkit.queue.stderr import print_there
from daemonkit.queue.task import Task

DONE: Final = 1
FAILED: Final = 2  # payload: the error in a line, then its traceback
PROGRESS: Final = 3  # payload: how far it has come
LEARNED: Final = 4  # payload: names of modules that it had to import


def request(name: str, call: payload.Call, reservation: Reservation, policy: Policy) -> bytes:
    """The message that asks for the process of a task; not in JSON, whose reading makes each child copy 40 pages.

    Raises:
        PayloadError: the arguments are nested so deeply that they cannot be sent.
    """
    running = (reservation.first_id, reservation.token, reservation.failures + 1)
    try:
        return marshal.dumps(
            (name, call.args, call.kwargs, reservation.queue, reservation.id, running, policy.soft_timeout)
        )
    except ValueError as error:  # at 2000 levels; how many JSON's reader takes, depends on Python
        raise PayloadError(f"{name}: {error}; its arguments cannot be given to a process") from None


def title_of(daemon: str, queue: str, id: str) -> str:
    """What the process of a task is called."""
    return f"{daemon}: task {queue} {id}"


class Errands:
    """What the children do."""

    def __init__(
        self,
        tasks: Mapping[str, Task[..., Any]],
        daemon: str,
        results: Wire,
        hooks: tuple[Callable[[], Any], ...],
        sink: Sink,
    ) -> None:
        """Tell what came of a task on ``results``."""
        self._tasks = tasks
        self._daemon = daemon
        self._results = results
        self._hooks = hooks
        self._sink = sink

    def rehearse(self) -> None:
        """Do here, in the fork server, what each child would: what a child changes is copied for it."""
        self._sink.leave_stderr()
        print_there()

    def enter(self, message: Message) -> NoReturn:
        """Be the child that ``message`` asks for."""
        name, args, kwargs, queue, id, running, soft_timeout = marshal.loads(message.payload)
        call = payload.Call((name,), args, kwargs)
        os.setpgid(0, 0)  # a terminal's ^C is the master's to act on
        title = title_of(self._daemon, queue, id)
        self._sink.become(title)
        (stderr,) = message.fds
        os.dup2(stderr, 2)
        os.close(stderr)
        current.begin(
            current.Running(queue, *running),
            lambda text: self._results.send(PROGRESS, message.id, text.encode()),
        )
        child.run(lambda: self._do(message.id, self._tasks[name], call, soft_timeout), title)

    def _do(self, number: int, task: Task[..., Any], call: payload.Call, soft_timeout: float | None) -> None:
        kind, words = perform(task, call, soft_timeout, self._hooks)
        if names := modules.harmless(modules.fresh()):
            self._results.send(LEARNED, number, modules.pack(names))
        self._results.send(kind, number, words)
        if kind == FAILED:
            sys.exit(child.FAILED)


def perform(
    task: Task[..., Any], call: payload.Call, timeout: float | None, hooks: Iterable[Callable[[], Any]] = ()
) -> tuple[int, bytes]:
    """Run ``hooks`` and the function; return ``DONE`` and its result, or ``FAILED`` and why: not to be raised here."""
    pid = os.getpid()
    try:
        for hook in hooks:
            hook()
        if timeout is None:
            result = task.function(*call.args, **call.kwargs)
        else:
            with _limit(timeout):
                result = task.function(*call.args, **call.kwargs)
        words = payload.encode_result(result) if task.policy.keep_result else b""
    except BaseException as error:  # noqa: BLE001 - the consumer's to log, and to try again
        _leave_if_forked(pid)
        if not isinstance(error, SystemExit) or error.code:
            return FAILED, f"{told(error)}\n{traced(error, __file__)}".encode(errors="replace")
        words = b"null"
    _leave_if_forked(pid)
    return DONE, words


def _leave_if_forked(pid: int) -> None:
    """A process that the task has forked, and that has come back from it, says nothing in its name."""
    if os.getpid() != pid:
        child.leave(0)


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise TaskTimeout in the task when its soft time-out is up."""

    def end(number: int, frame: FrameType | None) -> None:
        current.interrupt(TaskTimeout(f"not done after its time-out, {describe(seconds)}"))

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
