"""Turn a Python script into a Unix daemon.

from daemonkit import every, on, main

@every(5)
def beat(): ...

if __name__ == "__main__":
    main()
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daemonkit.api import Daemon, default
    from daemonkit.core.pidfile import PidFile
    from daemonkit.errors import AlreadyRunning, DaemonkitError, UsageError

    every, after, cron, on, main = default.every, default.after, default.cron, default.on, default.main

__version__ = "0.1.0"
__all__ = [
    "AlreadyRunning",
    "Daemon",
    "DaemonkitError",
    "PidFile",
    "UsageError",
    "after",
    "cron",
    "every",
    "listen_fds",
    "main",
    "on",
    "settings",
]

_HOMES = {
    "Daemon": "daemonkit.api",
    "PidFile": "daemonkit.core.pidfile",
    "AlreadyRunning": "daemonkit.errors",
    "DaemonkitError": "daemonkit.errors",
    "UsageError": "daemonkit.errors",
}
_METHODS = frozenset({"after", "cron", "every", "main", "on"})


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: the command loads nothing of the rest."""
    if name in _METHODS:
        return getattr(import_module("daemonkit.api").default, name)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'daemonkit' has no attribute {name!r}")


def settings() -> Mapping[str, Any]:
    """The configuration's ``[settings]`` table, as of the last reload; empty outside a daemon."""
    from daemonkit.api import default

    return default.settings


def listen_fds() -> list[int]:
    """Sockets that systemd or an earlier image of the daemon handed over, in order (sd_listen_fds(3))."""
    from daemonkit.api import default

    return list(default.listen_fds)
