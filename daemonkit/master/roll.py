"""A rolling reload: all workers replaced by new code, or none."""

from __future__ import annotations

from collections.abc import Callable

from daemonkit.master.server import Server
from daemonkit.master.workers import Workers

OnOver = Callable[[str | None], None]


class Roll:
    """Replaces place by place, each gated on the readiness of the process that takes over."""

    def __init__(self, workers: Workers, fresh: Server, on_over: OnOver) -> None:
        """Wait until ``fresh`` has read the new code, then begin; ``on_over`` is told why it failed, or None."""
        self.fresh = fresh
        self._workers = workers
        self._on_over: OnOver | None = on_over
        bound = workers.ready_timeout
        why = f"the new code was not loaded within ready_timeout, {bound:g} s"
        self._bound = workers.timer.once("reload bound", bound, lambda: self.end(why))
        fresh.on_loaded(self._loaded)

    def end(self, why: str | None) -> None:
        """It is over; unless ``why`` is None, with nothing changed in the end."""
        self._workers.timer.pause(self._bound)
        over, self._on_over = self._on_over, None
        if over:
            over(why)

    def _loaded(self, error: str | None) -> None:
        self._workers.timer.pause(self._bound)
        if error is not None:
            self.end(f"the new code cannot be loaded\n{error}")
        elif missing := {place.worker.name for place in self._workers} - self.fresh.workers.keys():
            names = ", ".join(map(repr, sorted(missing)))
            self.end(f"the new code has no worker named {names}; reexec the daemon")
        else:
            self._next()

    def _next(self) -> None:
        if self._on_over is None:
            return
        # Looked for anew each time: there may be more or fewer by now.
        place = next((place for place in self._workers if place.source is not self.fresh), None)
        if place is None:
            self.end(None)
        else:
            place.replace(self.fresh, self._replaced)

    def _replaced(self, error: str | None) -> None:
        if error is None:
            self._next()
        else:
            self.end(error)
