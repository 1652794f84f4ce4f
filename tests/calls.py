"""What the pool's tests have called in children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from daemonkit.processes.call import progress


def same(value: Any = None) -> Any:
    return value


def square(number: int) -> int:
    return number * number


def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def fail(text: str = "this went wrong") -> NoReturn:
    raise ValueError(text)


def fail_as_told(path: str) -> NoReturn:
    """Blocks until somebody writes into the FIFO, and fails with that."""
    raise ValueError(Path(path).read_text())


def note_and_fail(path: str) -> NoReturn:
    with open(path, "a") as file:
        file.write("called\n")
    fail()


def pid_and_parent() -> tuple[int, int]:
    return os.getpid(), os.getppid()


def pid(_: object = None) -> int:
    return os.getpid()


def blob(size: int) -> bytes:
    return bytes(size)


def length(data: bytes) -> int:
    return len(data)


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def leave(code: int) -> None:
    os._exit(code)


def read(path: str) -> str:
    """Blocks until somebody writes into the FIFO."""
    return Path(path).read_text()


def tell_and_read(told: str, path: str) -> str:
    """Says its number in one FIFO, then blocks on the other."""
    Path(told).write_text(str(os.getpid()))
    return Path(path).read_text()


def tree_and_block(told: str, detached: bool) -> None:
    """Starts a program, in a session of its own if ``detached``, tells both numbers, and never ends."""
    started = subprocess.Popen(["sleep", "1000"], start_new_session=detached)
    Path(told).write_text(f"{os.getpid()} {started.pid}")
    signal.pause()


def leave_a_process(detached: bool) -> int:
    return subprocess.Popen(["sleep", "1000"], start_new_session=detached).pid


def new_session() -> int:
    os.setsid()
    return os.getsid(0)


def open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def state() -> dict[str, Any]:
    """What a child finds."""
    return {
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "handlers": [n for n in signal.valid_signals() if callable(signal.getsignal(n))],
        "wakeup": signal.set_wakeup_fd(-1),
        "stdin": os.readlink("/proc/self/fd/0"),
    }


def garbage_everywhere() -> None:
    """Writes nonsense into every descriptor, also such as begins like a message."""
    kinds = [bytes([kind, 0]) + b"\x01" * 8 + b"nonsense" for kind in range(8)]
    for fd in open_files():
        if fd > 2:
            for text in (b"", b"x", b"nonsense" * 9, b"\x01\x01" + b"\xff" * 8, b"\x01\x00" + b"\x01" * 8, *kinds):
                with contextlib.suppress(OSError):
                    os.write(fd, text)


def close_everything() -> None:
    os.closerange(0, 1024)


def allocate(size: int) -> int:
    return len(bytearray(size))


def burn() -> None:
    while True:
        pass


def count_to(last: int) -> int:
    for number in range(1, last + 1):
        progress(number)
    return last


def a_lock() -> Any:
    import threading

    return threading.Lock()


class Stubborn(Exception):
    """Pickle makes it again with one argument; it wants two."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


def raise_stubborn() -> NoReturn:
    raise Stubborn(1, 2)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


class Unloadable:
    """Can be pickled, not unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return _refuse, ("not to be made again",)


def unloadable() -> Unloadable:
    return Unloadable()


class DiesWhilePickled:
    """The child ends half way through its result."""

    def __reduce__(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def half_a_result() -> list[Any]:
    return [bytes(10_000_000), DiesWhilePickled()]


def segfault() -> None:
    ctypes.string_at(0)


word = "nothing"


def initialize(text: str) -> None:
    global word
    word = text


def said() -> str:
    return word


def loaded(name: str) -> bool:
    return name in sys.modules


def fork_and_return() -> str:
    """Two processes come back from it; it is called once."""
    pid = os.fork()
    if pid == 0:
        return "child"
    os.waitpid(pid, 0)
    return "parent"
