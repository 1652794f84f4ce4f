"""A pool's own fork server, as the pool sees it: its process, its children, and what these have to do."""

from __future__ import annotations

import contextlib
import logging
import select
from collections.abc import Callable
from typing import Final

from daemonkit.processes import child, poolserver
from daemonkit.processes.assignment import Assignment
from daemonkit.processes.children import Child, Children
from daemonkit.processes.crew import Crew, FreshCrew, KeptCrew

log = logging.getLogger("daemonkit.pool")

_LEAVE_TIME: Final = 10.0  # seconds that the fork server has to end all under it


class Server:
    """A fork server in an interpreter of its own, and what its children have to do."""

    def __init__(self, reuse: int | None, first: bytes, begun: Callable[[Assignment], None], born: list[int]) -> None:
        """Start it; its PID is added to ``born``, even if control-C strikes before anybody has us."""
        self.pid, wire, self.results = poolserver.start(born)
        self.children = Children(wire, _say_delay)
        self.crew: Crew
        if reuse == 1:
            self.crew = FreshCrew(self.children, begun)
        else:
            self.crew = KeptCrew(self.children, begun, reuse, first)
        self.poll = select.poll()
        self.poll.register(self.results.fileno(), select.POLLIN)

    def watch(self) -> None:
        """Have ``poll`` wait for what there is to wait for now."""
        wire = self.children.wire
        self.poll.register(wire.fileno(), select.POLLIN | (select.POLLOUT if wire.is_waiting else 0))

    def close(self) -> None:
        """End it, and all under it; reap it."""
        self.crew.close()
        self.children.wire.close()
        self.results.close()
        with contextlib.suppress(ChildProcessError):
            child.wait_for(self.pid, _LEAVE_TIME)

    def forsake(self) -> None:
        """We are a fork of the process that it serves."""
        self.crew.close()
        self.children.wire.close()
        self.results.close()


def _say_delay(row: Child, error: OSError) -> None:
    log.warning("fork a pool's child: %s; trying again until there is room", error)
