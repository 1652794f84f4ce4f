"""What the processes of a cluster agree upon: ``cluster.lock("x")``, ``cluster.watch("/config/x", func)`` and the like.

``from daemonkit import cluster``, then in a job with ``fork=True``, a worker, a task, or a program of its own::

    with cluster.lock("report", timeout=60) as held:
        write_report(token=held.token)

Each is the method of that name of ``cluster.coordinator.Coordinator``, on a connection that is this process' alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemonkit.cluster.coordinator import Coordinator
    from daemonkit.cluster.watching import Value

    _default = cast(Coordinator, None)
    elect, resign, leader, leaders = _default.elect, _default.resign, _default.leader, _default.leaders
    lock, semaphore, locks = _default.lock, _default.semaphore, _default.locks
    join, leave, members = _default.join, _default.leave, _default.members
    barrier, queue = _default.barrier, _default.queue
    get, set, delete, children = _default.get, _default.set, _default.delete, _default.children
    unwatch, wait, dispatch, fileno = _default.unwatch, _default.wait, _default.dispatch, _default.fileno

_METHODS = frozenset(
    (
        *("elect", "resign", "leader", "leaders", "lock", "semaphore", "locks", "join", "leave", "members", "groups"),
        *("barrier", "queue", "get", "set", "delete", "children", "unwatch", "wait", "dispatch", "fileno"),
    )
)


def watch(path: str, func: Callable[[Value], object]) -> object:
    """Have ``func`` called with the value at ``path`` and the names below it, now and after each change.

    While a daemon's script is imported, that declares what the daemon watches: ``func`` is then called by it, between
    two jobs.  Elsewhere it is called by ``cluster.wait()`` and whatever else waits here, in the caller's thread.

    Returns:
        What ``cluster.unwatch`` takes; nothing for a declaration.

    Raises:
        UsageError: the path cannot be meant.
    """
    from daemonkit.core.here import here

    if here.declare_watch is not None:
        here.declare_watch(path, func)
        return None
    from daemonkit.cluster import outlet

    return outlet.default.coordinator().watch(path, func)


def __getattr__(name: str) -> Any:
    if name in _METHODS:
        from daemonkit.cluster import outlet

        return outlet.method(name)
    raise AttributeError(f"module 'daemonkit.cluster' has no attribute {name!r}")
