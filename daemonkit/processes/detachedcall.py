"""The process of a call for which nobody waits."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from daemonkit.core.duration import describe
from daemonkit.core.title import take_title
from daemonkit.processes import child, interpreter, pickled
from daemonkit.processes.wire import Message, in_memory

at_end: list[Callable[[], object]] = []  # what has to be finished before a call's process ends


def name_of(function: Any) -> str:
    """For people: module and name."""
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__qualname__)}"


class TimeUp(BaseException):
    """Raised in a call whose time is up."""


def work(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float) -> None:
    """Call the function in its process; nobody waits for its result, so it need not be picklable."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeUp(f"not done after {describe(timeout)}")

    take_title(f"background: {name_of(function)}")
    signal.signal(signal.SIGALRM, end)
    # Who stops the web server may send it to all (systemd.kill(5)): what was accepted is finished.  Not SIG_IGN, or
    # programs that the function starts would ignore it, too.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.siginterrupt(signal.SIGTERM, False)
    try:
        function(*args, **kwargs)
    except SystemExit as error:
        if error.code:
            raise
    finally:
        for finish in at_end:
            finish()
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


class Fresh:
    """Children that become an interpreter of their own: for libraries that do not survive a fork."""

    def __init__(self, settings: tuple[Any, ...], answers: socket.socket) -> None:
        """Give them the ``interpreter.Settings``, and ``answers`` to tell what comes of them."""
        self._settings = settings
        self._answers = answers

    def enter(self, message: Message) -> NoReturn:
        """Be the child that ``message`` asks for."""
        try:
            head = pickled.dumps((message.id, self._settings))
            payload = in_memory(head + bytes(message.payload))
            os.lseek(payload, 0, os.SEEK_SET)
            answers = os.dup(self._answers.fileno())
            interpreter.become("daemonkit.processes.freshcall", (answers, payload))
        except BaseException:  # noqa: BLE001 - told here and by the exit status: the call is lost
            child.fail()
