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
    from daemonkit import cluster as cluster
    from daemonkit import ipc as ipc
    from daemonkit.api import Daemon, default
    from daemonkit.cluster.leadership import current_leadership as current_leadership
    from daemonkit.core.pidfile import PidFile
    from daemonkit.errors import AlreadyRunning, DaemonkitError, UsageError
    from daemonkit.processes.background import Background as Background
    from daemonkit.processes.background import background as background
    from daemonkit.processes.call import progress as progress
    from daemonkit.processes.pool import Pool as Pool
    from daemonkit.processes.stopflag import StopFlag as StopFlag
    from daemonkit.queue.current import current_task as current_task

    every, after, cron, on, main = default.every, default.after, default.cron, default.on, default.main
    worker, program, task = default.worker, default.program, default.task

__version__ = "0.1.0"
# Background, Pool, StopFlag, background, cluster, current_leadership, current_task, ipc and progress are not among
# them: `import *` would load what few want.
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
    "program",
    "settings",
    "task",
    "worker",
]

_HOMES = {
    "Background": "daemonkit.processes.background",
    "background": "daemonkit.processes.background",
    "Daemon": "daemonkit.api",
    "PidFile": "daemonkit.core.pidfile",
    "Pool": "daemonkit.processes.pool",
    "StopFlag": "daemonkit.processes.stopflag",
    "progress": "daemonkit.processes.call",
    "current_task": "daemonkit.queue.current",
    "current_leadership": "daemonkit.cluster.leadership",
    "AlreadyRunning": "daemonkit.errors",
    "DaemonkitError": "daemonkit.errors",
    "UsageError": "daemonkit.errors",
}
_METHODS = frozenset({"after", "cron", "every", "main", "on", "program", "task", "worker"})


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: the command loads nothing of the rest."""
    if name in _METHODS:
        return getattr(import_module("daemonkit.api").default, name)
    if name in ("cluster", "ipc"):
        return import_module(f"daemonkit.{name}")
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
