"""Which daemon this process belongs to, for what is called without being told: ``from daemonkit import cluster``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Here:
    """Filled in by the daemon's image, and inherited by its children."""

    def __init__(self) -> None:
        """No daemon."""
        self.daemon = ""  # its name
        self.coordinator: str | None = None  # the URL in force
        self.declare_watch: Callable[[str, Callable[..., Any]], None] | None = None  # while a script is imported
        self._master = 0

    def become_master(self, daemon: str, coordinator: str) -> None:
        """This process is the master of ``daemon``."""
        self.daemon, self.coordinator, self._master = daemon, coordinator, os.getpid()

    @property
    def is_master(self) -> bool:
        """Whether this process is the daemon's own, which waits for nobody and has no threads."""
        return os.getpid() == self._master


here = Here()
