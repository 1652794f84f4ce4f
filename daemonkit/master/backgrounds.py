"""What other processes have handed to the daemon for after their responses: a program for each that asks."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from daemonkit.errors import ForkServerLost
from daemonkit.master.entrance import Request
from daemonkit.master.server import Server
from daemonkit.master.status import describe_child
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt

log = logging.getLogger("daemonkit")

OnBegun = Callable[[str | None], None]


class _Background:
    """One program; it ends when it is told to, or when nobody asks any more, and all that it has taken in is done."""

    def __init__(self, name: str, server: Server, on_begun: OnBegun) -> None:
        self.name = name
        self.server = server
        self.child: Child | None = None
        self.since: float | None = None  # seconds since the epoch; None: not forked yet
        self.on_begun = on_begun


class Backgrounds:
    """All of them."""

    def __init__(self, get_server: Callable[[], Server]) -> None:
        """Spawn from the fork server that ``get_server`` returns at the time."""
        self._get_server = get_server
        self._running: list[_Background] = []
        self._is_stopping = False

    def begin(self, pid: int, fd: int, on_begun: OnBegun) -> None:
        """Have a program that talks with process ``pid`` over the socket ``fd``; tell why that cannot be, or None."""
        if self._is_stopping:
            on_begun("the daemon is stopping")
            return
        name = f"of pid {pid}"
        request: Request = {"kind": "background", "name": name, "index": 0, "token": 0}
        try:
            made = _Background(name, self._get_server(), on_begun)
            made.child = made.server.spawn(
                request,
                lambda _, receipt: self._ended(made, receipt),
                lambda _: self._started(made),
                lambda note, text: None,
                [fd],
            )
        except (ForkServerLost, OSError) as error:
            on_begun(f"hand calls to the daemon: {error}")
            return
        self._running.append(made)

    def stop(self) -> None:
        """Let each finish what it has taken in, and take in no more."""
        self._is_stopping = True
        for each in self._running:
            if each.child is not None:
                each.server.signal(each.child, signal.SIGTERM)

    def resume(self) -> None:
        """Take in again."""
        self._is_stopping = False

    def describe(self) -> list[dict[str, Any]]:
        """One object a program, for ``status``."""
        return [
            describe_child(
                f"background {each.name}",
                each.child.pid if each.child else None,
                "ending" if self._is_stopping else "running",
                each.since,
            )
            for each in self._running
        ]

    def _started(self, made: _Background) -> None:
        made.since = time.time()
        made.on_begun(None)

    def _ended(self, made: _Background, receipt: Receipt) -> None:
        self._running.remove(made)
        if made.since is None:
            made.on_begun(f"hand calls to the daemon: {receipt}")
        elif not receipt.is_clean:
            log.error("background %s: %s; what it had begun is lost", made.name, receipt)
