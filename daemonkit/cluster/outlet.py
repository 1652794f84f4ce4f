"""The connection of this process to the coordinator: made when it is needed, and after a fork one of the child's own.

In the daemon's master there is none: it neither waits nor has threads.  There ``watch`` declares what the daemon is to
watch, and the rest is for jobs with ``fork=True``, workers and tasks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from daemonkit.cluster.connect import connect
from daemonkit.cluster.coordinator import Coordinator
from daemonkit.core.here import here
from daemonkit.errors import UsageError


class Outlet:
    """Connects when it is asked for the connection."""

    def __init__(self) -> None:
        """Nothing is connected yet."""
        self._coordinator: Coordinator | None = None
        os.register_at_fork(after_in_child=self._forsake)

    def coordinator(self) -> Coordinator:
        """The connection of this process.

        Raises:
            UsageError: this process is the daemon's master, or the coordinator's URL cannot be meant.
            CoordinatorError: it cannot be used.
        """
        if here.is_master:
            raise UsageError(
                "cluster: this runs in the daemon's own process, which must not wait for others; "
                "add fork=True to the job, or use a worker"
            )
        if self._coordinator is None:
            self._coordinator = connect(here.coordinator or _configured_url(), here.daemon)
        return self._coordinator

    def close(self) -> None:
        """Close the connection, if there is one; the next use makes another."""
        made, self._coordinator = self._coordinator, None
        if made is not None:
            made.close()

    def _forsake(self) -> None:
        made, self._coordinator = self._coordinator, None
        if made is not None:
            made.tree.forsake()


def _configured_url() -> str:
    """The coordinator that the daemon of the running script would have."""
    from daemonkit.config import load
    from daemonkit.config.options import name_of

    main = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        name = name_of(main) if main else None
    except UsageError:  # a program whose name is none for a daemon
        name = None
    found = load(name, command_line={}, environ=os.environ, cwd=os.getcwd())
    options = found.options
    if options.coordinator.startswith(f"local:{options.run_dir}/"):
        from daemonkit.config.trust import prepare_run_dir

        prepare_run_dir(options.run_dir, owner=options.user)
    return options.coordinator


def close() -> None:
    """Close the connection of a process that is about to end."""
    default.close()


def method(name: str) -> Callable[..., Any]:
    """``Coordinator.NAME`` of this process' connection."""

    def call(*args: Any, **values: Any) -> Any:
        return getattr(default.coordinator(), name)(*args, **values)

    call.__name__ = name
    call.__doc__ = getattr(Coordinator, name).__doc__
    return call


default = Outlet()
