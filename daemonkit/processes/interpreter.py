"""A fresh Python interpreter for a program of daemonkit's own: as this one is, whatever this one holds."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

from daemonkit.processes import mainmodule

FIRST: Final = 3  # the program finds its descriptors from here on
_LOW: Final = 10  # copies are made from here on, out of the way of those
_PROGRAM: Final = "import sys; sys.path.append({!r}); from {} import main; main()"


class Settings(NamedTuple):
    """What a program takes over from the process that starts it."""

    path: list[str]  # sys.path
    argv: list[str]
    main: mainmodule.Main | None

    def take_over(self) -> None:
        """Let imports, and names of the main script, mean here what they mean there."""
        sys.path[:], sys.argv[:] = self.path, self.argv
        mainmodule.expect(self.main)


def settings() -> Settings:
    """This interpreter's."""
    return Settings(sys.path, sys.argv, mainmodule.find())


def command(module: str) -> list[str]:
    """The command line that calls ``main`` of ``module``."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [sys.executable, *_flags(), "-P", "-c", _PROGRAM.format(root, module)]


def start(module: str, fds: Sequence[int], *, has_session: bool = False, born: list[int] | None = None) -> int:
    """Start a program of daemonkit's, ``main`` of ``module``; return its PID.

    It is our child, to be reaped by its number.  Its signals are as a login has them.

    Args:
        module: the dotted name.
        fds: what it finds as descriptors 3, 4, ...
        has_session: it leads a session of its own (setsid(2)); else a process group of its own.
        born: its PID is added; it is there even if control-C strikes before we return.

    Raises:
        OSError: there is no room for another process, or no interpreter at ``sys.executable``.
        UsageError: the main script is being imported again in a child.
    """
    import fcntl

    mainmodule.check()
    copies: list[int] = []
    defaults = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    try:
        for fd in fds:
            copies.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOW))
        actions = [(os.POSIX_SPAWN_DUP2, copy, fd) for fd, copy in enumerate(copies, FIRST)]
        # vfork underneath: neither our threads nor our memory matter.  Not in our process group: a terminal's ^C is
        # ours to act on.
        spawn = functools.partial(
            os.posix_spawn,
            file_actions=actions,
            setsigmask=(),
            setsigdef=defaults,
            **({"setsid": True} if has_session else {"setpgroup": 0}),
        )
        pids = [] if born is None else born
        # From the kernel into the list in C: control-C cannot come between.
        pids.extend(map(spawn, (sys.executable,), (command(module),), (os.environ,)))
        return pids[-1]
    finally:
        for copy in copies:
            os.close(copy)


def become(module: str, fds: Sequence[int]) -> NoReturn:
    """Execute ``main`` of ``module`` in the place of this process, with ``fds`` as descriptors 3, 4, ...

    Raises:
        OSError: that cannot be.
    """
    import fcntl

    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOW) for fd in fds]
    for fd, copy in enumerate(copies, FIRST):
        os.dup2(copy, fd)
    os.execv(sys.executable, command(module))


def own_sockets(count: int, more: int = 0) -> list[socket.socket]:
    """In the program: its first descriptors as sockets; ``more`` are left, whatever else was left open is closed."""
    os.closerange(FIRST + count + more, os.sysconf("SC_OPEN_MAX"))  # libraries forget about close-on-exec
    for fd in range(FIRST, FIRST + count + more):
        os.set_inheritable(fd, False)
    return [socket.socket(fileno=fd) for fd in range(FIRST, FIRST + count)]


def _flags() -> list[str]:
    """The options that this interpreter was started with, as far as they change how code runs."""
    flags = sys.flags
    letters = {
        "O": flags.optimize,
        "B": flags.dont_write_bytecode,
        "E": flags.ignore_environment,
        "s": flags.no_user_site,
    }
    letters |= {"S": flags.no_site, "I": flags.isolated, "b": flags.bytes_warning, "u": _is_unbuffered()}
    found = [f"-{letter * int(count)}" for letter, count in letters.items() if count]
    found += [f"-W{option}" for option in sys.warnoptions]
    for name, value in sys._xoptions.items():
        found.append(f"-X{name}" if value is True else f"-X{name}={value}")
    return found


def _is_unbuffered() -> bool:
    return bool(getattr(sys.stdout, "write_through", False)) and not sys.flags.interactive
