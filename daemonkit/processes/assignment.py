"""What a child is to do for a pool, and how its end is told: one call, whoever waits for it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any, NamedTuple, Protocol

from daemonkit.errors import CallTimeout, UnpicklableError, WorkerLost
from daemonkit.processes import pickled
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.wire import Message


class Limits(NamedTuple):
    """What one call may use; None: as much as it wants."""

    timeout: float | None = None  # seconds from its start in the child
    max_rss: float | None = None  # bytes, a whole number
    cpu: float | None = None  # seconds
    on_progress: Callable[[Any], object] | None = None
    block: bool = True  # whether ``submit`` waits for room


class Fate(enum.Enum):
    """Why a call is being ended by us."""

    WITHDRAWN = enum.auto()  # cancelled; no child has begun it
    KILLED = enum.auto()
    TIMEOUT = enum.auto()


class Runner(Protocol):
    """Whoever has calls run can take one back, or end it."""

    def withdraw(self, call: Assignment) -> bool:
        """Give it to no child any more; False if one has begun it, or that was asked before."""
        ...

    def have_done(self, step: Callable[[None], None]) -> None:
        """Have something done where control-C does not strike."""
        ...

    def kill(self, call: Assignment) -> bool:
        """End it; False if it is over."""
        ...


class Assignment:
    """One call, as those see it who give it to a child.  Who waits for it says in a subclass how it is told."""

    def __init__(self, runner: Runner, name: str, limits: Limits) -> None:
        """It waits for ``runner`` to give it to a child; ``name`` is the function's."""
        self.name = name
        self.pid: int | None = None  # the child's, while it runs and afterwards
        self.limits = limits
        self.request = b""  # the message that asks for it
        self.is_given = False  # a child has it
        self.is_begun = False  # it was the first that its child had: it runs
        self.attempts = 0  # children that ended before they began it
        self.fate: Fate | None = None
        self._runner = runner

    def done(self) -> bool:
        """Whether it has an outcome, or was cancelled."""
        raise NotImplementedError

    def cancel(self) -> bool:
        """Take it back if no child has begun it; whether it is cancelled."""
        try:
            if self._runner.withdraw(self):
                self.tell_cancelled()
        except BaseException:
            self._runner.have_done(self._finish_cancel)
            raise
        return self.is_cancelled()

    def _finish_cancel(self, _: None) -> None:
        """It was interrupted, wherever."""
        if self._runner.withdraw(self) or self.is_withdrawn:
            self.tell_cancelled()

    def tell_cancelled(self) -> None:
        """It was withdrawn; for us.  Done again, it goes on where it was interrupted."""
        raise NotImplementedError

    def is_cancelled(self) -> bool:
        """Whether ``cancel`` has had its way."""
        raise NotImplementedError

    def begin(self) -> None:
        """A child begins it; for the runner, and never after ``withdraw``."""
        raise NotImplementedError

    def set_result(self, result: Any) -> None:
        """Have it; for the runner."""
        raise NotImplementedError

    def set_exception(self, exception: BaseException | None) -> None:
        """Have it; for the runner."""
        raise NotImplementedError

    @property
    def is_withdrawn(self) -> bool:
        """Whether it is to be given to no child any more."""
        return self.fate is Fate.WITHDRAWN

    def succeed(self, message: Message) -> None:
        """Have the result that came in ``message``."""
        self.request = b""
        if self.done():
            return
        try:
            result = pickled.loads(message.payload)
        except BaseException as error:  # noqa: BLE001 - it is this future's to tell
            self._refuse(f"result of {self.name} cannot be unpickled: {_words(error)}", error)
            return
        self.set_result(result)

    def fail(self, message: Message) -> None:
        """Have the exception that came in ``message``."""
        self.request = b""
        if self.done():
            return
        try:
            itself, words, text = pickled.loads(message.payload)
        except Exception as error:  # noqa: BLE001 - garbage
            self._refuse(f"outcome of {self.name} cannot be read: {_words(error)}", error)
            return
        cause = pickled.RemoteTraceback(text)
        try:
            if itself is None:
                raise TypeError("it was left behind")
            made = pickled.loads(itself)
            if not isinstance(made, BaseException):
                raise TypeError(f"it became a {type(made).__name__}")
        except BaseException as why:  # noqa: BLE001 - told below
            self._refuse(f"{self.name} raised {words}; that cannot be unpickled here: {_words(why)}", cause)
            return
        made.__cause__ = cause
        self.set_exception(made)

    def lose(self, receipt: Receipt | None, why: str = "") -> None:
        """Have no outcome: the child has ended."""
        self.request = b""
        if self.done():  # given up with the whole pool
            return
        if receipt is not None and receipt.pid:
            self.pid = receipt.pid
        if self.fate is Fate.KILLED:
            self.set_exception(CancelledError())
        elif self.fate is Fate.TIMEOUT:
            text = f"call {self.name}: not done after {self.limits.timeout:g} s; {receipt or why}"
            self.set_exception(CallTimeout(text, receipt, self.pid))
        else:
            told = f"{receipt}, before it gave its result" if receipt else why
            self.set_exception(WorkerLost(f"call {self.name}: {told}", receipt, self.pid))

    def miss(self, error: OSError) -> None:
        """Have no outcome: it has come, and could not be taken in."""
        self.request = b""
        if not self.done():
            self._refuse(f"outcome of {self.name} cannot be read: {_words(error)}", error)

    def report(self, message: Message) -> None:
        """Hand on the progress that came in ``message``."""
        if self.limits.on_progress is not None and not self.done():
            self.limits.on_progress(pickled.loads(message.payload))

    def _refuse(self, text: str, cause: BaseException) -> None:
        error = UnpicklableError(text)
        error.__cause__ = cause
        self.set_exception(error)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
