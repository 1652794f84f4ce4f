"""What a child of a pool does: take a call, run it, send its outcome, whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from daemonkit.core import prctl
from daemonkit.processes import child, mainmodule, modules, pickled
from daemonkit.processes.wire import Closed, Message, Wire, pair

_HEAD: Final = struct.Struct("=BQd")  # whether the initializer's pickle is first, max_rss, cpu
_SIZE: Final = struct.Struct("=I")
_REHEARSALS: Final = 64

# What a child tells of a call; plain numbers, for every call looks at some.
RESULT: Final = 1
ERROR: Final = 2  # payload: pickled exception or None, its class and words, its traceback
PROGRESS: Final = 3
BROKEN: Final = 4  # the initializer failed; payload as ERROR
LEARNED: Final = 5  # payload: names of modules that the call needed, and that left the process clean
CALL: Final = 1  # what a kept child is sent


def request(call: bytes, max_rss: int = 0, cpu: float = 0, first: bytes = b"") -> bytes:
    """The message that asks for a call; 0: no limit.  ``first`` is the initializer's pickle."""
    head = _HEAD.pack(bool(first), max_rss, cpu)
    return b"".join((head, _SIZE.pack(len(first)), first, call)) if first else head + call


def run_chunk(function: Callable[..., Any], chunk: tuple[tuple[Any, ...], ...]) -> list[Any]:
    """The results of several calls as one."""
    return [function(*items) for items in chunk]


class Caller:
    """Runs calls in a child, and sends what comes of them into the one socket that all children share."""

    def __init__(self, results: Wire) -> None:
        """Answer on ``results``; sending may block."""
        self._results = results
        self._own: tuple[int, ...] = (results.fileno(),)  # sockets that are ours
        self._pid = 0  # of the child

    def enter(self, message: Message) -> NoReturn:
        """Be the child that ``message`` asks for: with a descriptor it is kept, and its calls come through that."""
        global _caller
        code = child.FAILED
        self._pid = os.getpid()
        try:
            _caller = self
            prctl.become_subreaper()
            if message.fds:
                self._keep(message)
            else:
                self.answer(message.id, message.payload)
            code = 0
        except BaseException:  # noqa: BLE001 - told here and by the exit status: the call is lost
            sys.excepthook(*sys.exc_info())
        child.end_descendants()
        child.leave(code)

    def rehearse(self) -> None:
        """Answer calls here as children will, in a process that has none yet.

        Code that has run a while is specialised (PEP 659) and what it looks up is cached: memory that would be changed,
        and so copied, in every child.
        """
        ours, theirs = pair()
        with ours, theirs:
            copy = Caller(Wire(theirs))
            copy._pid = os.getpid()
            call = request(pickled.dumps((int, (), {})))
            for number in range(_REHEARSALS):
                copy.answer(number, call)
                ours.recv(64)

    def _keep(self, message: Message) -> None:
        self._number = message.id
        if message.payload and not self._initialize(message.payload):
            return
        with socket.socket(fileno=message.fds[0]) as sock, contextlib.suppress(Closed):
            self._own += (sock.fileno(),)
            calls = Wire(sock)
            while (asked := calls.receive()) is not None:
                self.answer(asked.id, asked.payload)

    def answer(self, number: int, payload: Any) -> None:
        """Run the call in ``payload`` and send its outcome."""
        self._number = number
        has_first, max_rss, cpu = _HEAD.unpack_from(payload)
        view = memoryview(payload)[_HEAD.size :]
        if has_first:
            size = _SIZE.unpack_from(view)[0] + _SIZE.size
            if not self._initialize(view[_SIZE.size : size]):
                return
            view = view[size:]
        try:
            function, args, kwargs = self._unpickle(view)
            if max_rss or cpu:
                with _limits(max_rss, cpu):
                    result = function(*args, **kwargs)
            else:
                result = function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, is the future's to tell
            self._leave_if_forked()
            self._fail(ERROR, error)
            return
        self._leave_if_forked()
        try:
            packed = pickled.pack(result)
        except BaseException as error:  # noqa: BLE001 - as above
            error.add_note(f"the result, {_kind(result)}, cannot be pickled")
            self._fail(ERROR, error)
            return
        packed.send(self._results, RESULT, number)

    def _leave_if_forked(self) -> None:
        """A process that the call has forked, and that has come back from it, has no outcome and no calls to take."""
        if os.getpid() != self._pid:
            child.leave(0)

    def _unpickle(self, view: memoryview) -> Any:
        before = len(sys.modules)
        try:
            call = pickled.loads(view)
        except (AttributeError, ModuleNotFoundError):
            if not mainmodule.load():  # the name may be one of the main script's
                raise
            call = pickled.loads(view)
        if len(sys.modules) != before and (fresh := modules.fresh()) and is_clean(self._own):
            self._results.send(LEARNED, self._number, modules.pack(fresh))
        return call

    def _initialize(self, payload: Any) -> bool:
        try:
            function, args = self._unpickle(memoryview(payload))
            function(*args)
        except BaseException as error:  # noqa: BLE001 - it is the pool's to tell
            self._fail(BROKEN, error)
            return False
        return True

    def _fail(self, kind: int, error: BaseException) -> None:
        import traceback

        trace = error.__traceback__
        text = "".join(traceback.format_exception(type(error), error, trace and (trace.tb_next or trace)))
        words = "".join(traceback.format_exception_only(type(error), error)).strip()
        try:
            itself = pickled.dumps(error)
        except Exception as why:  # noqa: BLE001 - told in its place
            itself = None
            words += f" (it cannot be pickled: {why})"
        pickled.pack((itself, words, text)).send(self._results, kind, self._number)

    def progress(self, value: object) -> None:
        """Send ``value`` to whoever waits for the call."""
        pickled.pack(value).send(self._results, PROGRESS, self._number)


_caller: Caller | None = None  # outside a pool's child nobody listens


def progress(value: object) -> None:
    """Tell the pool's ``on_progress`` how far this call has come; outside a call nothing happens.

    Args:
        value: anything that can be pickled.
    """
    if _caller is not None:
        _caller.progress(value)


@contextlib.contextmanager
def _limits(max_rss: int, cpu: float) -> Iterator[None]:
    """Soft limits, so that a kept child can lift them again (setrlimit(2))."""
    import resource

    wanted = []
    if max_rss:
        wanted.append((resource.RLIMIT_DATA, max_rss))
    if cpu:
        used = resource.getrusage(resource.RUSAGE_SELF)
        wanted.append((resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + cpu)))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    before = [(number, resource.getrlimit(number)) for number, _ in wanted]
    try:
        for (number, soft), (_, (_, hard)) in zip(wanted, before, strict=True):
            resource.setrlimit(number, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
        yield
    finally:
        for number, limits in before:
            resource.setrlimit(number, limits)


def is_clean(known: tuple[int, ...]) -> bool:
    """Whether this process has one thread, and no socket but ``known``: only then may it fork for others (law 3)."""
    if len(os.listdir("/proc/self/task")) > 1:
        return False
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:") and int(name) not in (0, 1, 2, *known):
                return False
    return True


def _kind(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
