"""What a script asks of the cluster becomes a process that holds a session with its coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daemonkit.config import Configuration
from daemonkit.core.here import here
from daemonkit.script import Script

if TYPE_CHECKING:
    from daemonkit.cluster.leadership import Page

NAME = "cluster"


def wants_cluster(script: Script, configuration: Configuration) -> bool:
    """Whether the daemon is to have a session of its own."""
    return script.may_lead or bool(script.watches) or configuration.cluster_config is not None


def limit(payload: bytes) -> float:
    """In the fork server: when the child that ``payload`` has asked for is to be gone (seconds of CLOCK_BOOTTIME)."""
    import json

    from daemonkit.cluster import leadership

    return leadership.limit_of(json.loads(payload)["token"])


def preload(coordinator: str) -> None:
    """In the fork server: import once what each child with a session of its own would import."""
    if coordinator.startswith("zookeeper:"):
        from daemonkit.cluster import zookeeper

        assert zookeeper


def add_agent(script: Script, name: str, configuration: Configuration, page_fd: int = -1) -> Page | None:
    """Add the worker that holds the session, if ``script`` wants one, to the daemon ``name``; return what they share.

    ``page_fd``: what the daemon's processes share already.

    Raises:
        UsageError: the coordinator's URL cannot be meant, or the script has a worker of that name.
        MissingLibrary: it needs kazoo, which is not installed.
    """
    here.become_master(name, configuration.options.coordinator)
    if not wants_cluster(script, configuration):
        return None
    from daemonkit.cluster import agent, leadership
    from daemonkit.cluster.connect import check
    from daemonkit.cluster.tree import check_path
    from daemonkit.errors import UsageError

    if NAME in script.workers:
        raise UsageError(
            f"@worker: the name {NAME!r} is that of the daemon's own process; give this worker another name="
        )
    check(configuration.options.coordinator)
    page = leadership.Page(page_fd)
    leadership.use(page)
    paths = [path for path, _ in script.watches]
    if configuration.cluster_config is not None:
        paths.append(check_path(configuration.cluster_config, "[cluster] config"))
    settings = agent.Settings(name, configuration.options.coordinator, script.may_lead, tuple(paths), page)
    script.workers[NAME] = agent.worker(settings)
    return page
