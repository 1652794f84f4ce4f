"""Become a daemon: the steps of daemon(7), "SysV Daemons", on python-daemon's DaemonContext.

Where each step is done:

    1  close descriptors            `Context.open`, past any RLIMIT_NOFILE
    2  signal dispositions          `reset_signals`
    3  signal mask                  the new image unblocks once its handlers stand (`core.signals`)
    4  environment                  `clean_environment`
    5  fork, 6 setsid, 7 fork, 8    `Context.open`; the launcher waits instead of leaving at once
    9  /dev/null on the streams     stdin here; stdout and stderr when ready, so that errors reach the terminal
    10 umask, 11 working directory  DaemonContext.open
    12 PID file                     `core.pidfile`, locked by the launcher, written after the second fork
    13 privileges                   `core.privileges`, in the new image
    14 tell the launcher, 15 exit   `daemonkit.launch`
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Mapping
from typing import Final

from daemon import DaemonContext

# What belongs to the terminal, the login or the service that happened to start us, not to the daemon.
_NOT_PASSED_ON: Final = frozenset(
    [
        "_",
        "DAEMON_CHILD",  # we may be started by another daemon's child
        "OLDPWD",
        "PWD",
        "SHLVL",
        "TERM",
        "TERMCAP",
        "COLUMNS",
        "LINES",
        "COLORTERM",
        "LS_COLORS",
        "PS1",
        "PS2",
        "PROMPT_COMMAND",
        "MAIL",
        "MAILCHECK",
        "DISPLAY",
        "XAUTHORITY",
        "WAYLAND_DISPLAY",
        "WINDOWID",
        "DESKTOP_SESSION",
        "SESSION_MANAGER",
        "DBUS_SESSION_BUS_ADDRESS",
        "TMUX",
        "TMUX_PANE",
        "STY",
        "WINDOW",
        "SUDO_COMMAND",
        "SUDO_USER",
        "SUDO_UID",
        "SUDO_GID",
        "SUDO_PS1",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "SYSTEMD_EXEC_PID",
        "MANAGERPID",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "MAINPID",
    ]
)
_NOT_PASSED_ON_PREFIXES: Final = ("SSH_", "XDG_SESSION", "XDG_SEAT", "XDG_VTNR", "GPG_", "BASH_", "LC_TERMINAL", "VTE_")


class Context(DaemonContext):  # type: ignore[misc]  # python-daemon ships no types
    """DaemonContext, with what it lacks.

    * Descriptors are closed up to the highest that can be, not only up to the limit of today (the limit may
      have been lowered after they were opened; with an infinite one DaemonContext stops at 2,048).
    * All signal dispositions are reset, not four of them.
    * The umask is 022 unless told otherwise: 0 lets anybody write what the daemon creates.
    * Streams that were closed by the caller do not raise.
    """

    def __init__(self, *, keep: Iterable[int], umask: int = 0o022, working_directory: str = "/") -> None:
        """Prepare; ``keep`` are the descriptors above 2 that live on."""
        open_standard_streams()
        self._keep = sorted(fd for fd in set(keep) if fd > 2)
        super().__init__(
            detach_process=False,
            files_preserve=list(self._keep),  # it is extended in place
            prevent_core=False,
            signal_map={},
            stdin=open(os.devnull),  # DaemonContext's own would be closed again by the exec
            stderr=sys.stderr,
            stdout=sys.stdout,
            umask=umask,
            working_directory=working_directory,
        )

    def open(self) -> None:
        """Leave session and terminal by fork, setsid, fork, then do the rest in the grandchild; once."""
        os.setsid()
        if os.fork():
            os._exit(0)
        reset_signals()
        super().open()
        close_descriptors(self._keep)


def open_standard_streams() -> None:
    """Put /dev/null on whichever of 0, 1, 2 is closed, so that no file of ours lands there by accident."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def close_descriptors(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 but ``keep``; one close_range(2) a gap, whatever RLIMIT_NOFILE is."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = max(low, fd + 1)
    os.closerange(low, 2**31 - 1)


def reset_signals() -> None:
    """Give every signal its default disposition (signal(7)); ignored ones would outlive the exec."""
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)


def clean_environment(environ: Mapping[str, str], working_directory: str) -> dict[str, str]:
    """The environment without what is bound to a terminal, login session or another service (step 4)."""
    kept = {
        key: value
        for key, value in environ.items()
        if key not in _NOT_PASSED_ON and not key.startswith(_NOT_PASSED_ON_PREFIXES)
    }
    kept["PWD"] = working_directory
    return kept
