"""The daemon's children: the fork server they come from, workers, forked jobs, and how all of them end."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from daemonkit import leftovers
from daemonkit.config.options import Options
from daemonkit.core.logs import flush_streams
from daemonkit.errors import ForkServerLost, StartError
from daemonkit.master import server as forks
from daemonkit.master.backgrounds import Backgrounds
from daemonkit.master.backoff import Backoff
from daemonkit.master.entrance import guard_for
from daemonkit.master.forked import ForkedJobs
from daemonkit.master.parts import Parts
from daemonkit.master.place import Place
from daemonkit.master.roll import Roll
from daemonkit.master.server import Server
from daemonkit.master.status import describe_child
from daemonkit.master.workers import Workers
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.worker import Restarts, Worker
from daemonkit.script import Script

log = logging.getLogger("daemonkit")

LAST_TIME: Final = 2.0  # seconds that those have who are stopped when all others have ended
KILL_TIME: Final = 5.0  # seconds that the kernel may take to end what was sent KILL
_FOR_EVER: Final = Restarts(most=2**31)  # a fork server that is lost again and again is replaced all the same

Done = Callable[[str | None], None]


class Crew:
    """All processes that the daemon has under it."""

    def __init__(self, parts: Parts, script: Script, on_fatal: Callable[[Place], None]) -> None:
        """Nothing is forked yet."""
        self._parts = parts
        self._script = script
        self._servers: list[Server] = []  # with those that only wait for their last child
        self._losses = Backoff()
        self._roll: Roll | None = None
        self._reloads: list[Done] = []  # asked for while one was under way
        self._is_stopping = False
        self._declared: Mapping[str, Worker] = script.workers  # by the code that the workers run
        self.workers = Workers(parts.timer, on_fatal)
        self.jobs = ForkedJobs(parts.timer, self._current)
        self.backgrounds = Backgrounds(self._current)

    def fork(self, close: Callable[[], None]) -> None:
        """Fork the fork server; nothing of the user's has run but the import.

        ``close`` gives back, in the server, what is the master's alone.

        Raises:
            ForkRefused: the script's import has left threads or connections, and ``fork_guard`` is "refuse".
            StartError: there is no room for another process.
        """
        parts = self._parts
        guard = guard_for(parts.configuration.options.fork_guard, parts.handover.listen_fds)
        flush_streams()
        try:
            made = forks.fork(parts.loop, self._script, parts.sink, guard, close, self._lost)
        except OSError as error:
            raise StartError(f"fork the fork server: {error.strerror}") from None
        self._take_on(made)

    def begin(self, options: Options) -> None:
        """Start the workers; from now on the forked jobs can be launched."""
        self.configure(options)
        self._execute()
        self.jobs.begin(self._script.jobs)
        self.workers.begin(self._declared)

    def resume(self) -> None:
        """Start again what ``stop`` has ended: there is to be no end after all."""
        self._is_stopping = False
        self._execute()
        self.jobs.begin(self._script.jobs)
        self.workers.resume()
        self.backgrounds.resume()

    def configure(self, options: Options) -> None:
        """Take on the bounds of a configuration."""
        self.workers.ready_timeout = options.ready_timeout
        self.workers.stop_schedule = options.stop_schedule

    def reload(self, done: Done) -> None:
        """Replace the workers, one by one, by new code; ``done`` is told why they were not, or None.

        If that is being done already, it is done once more afterwards: the code may have changed meanwhile.
        """
        if self._is_stopping:
            done("the daemon is stopping")
        elif self._roll is not None:
            self._reloads.append(done)
        elif self.workers.server is None:
            done("the fork server is being replaced, and reads the code anew")
        else:
            self._begin_roll([done])

    def stop(self, until: float, is_urgent: Callable[[], bool], turn: Callable[[], None]) -> None:
        """End all children and return when they are gone.

        Args:
            until: the moment (monotonic seconds) at which those that are left are killed.
            is_urgent: whether they are to be killed now.
            turn: waits for an event and serves it.
        """
        self._is_stopping = True
        for done in self._reloads:
            done("the daemon is stopping")
        self._reloads.clear()
        if self._roll is not None:
            self._roll.end("the daemon is stopping")
        self.workers.stop(last=False)
        self.jobs.stop(until)
        self.backgrounds.stop()
        while self._busy(last=False) and time.monotonic() < until and not is_urgent():
            turn()
        self._kill_the_rest(turn, last=False)
        # Only now: what they held for the others, such as a leadership, nobody may have before.
        self.workers.stop(last=True)
        self._wait(LAST_TIME, turn, last=True)
        self._kill_the_rest(turn, last=True)
        self.workers.use(None)
        while self._servers:
            server = self._servers.pop()
            server.close()  # it ends what its children have left before it ends itself
            _tell_ends(server)

    def describe(self) -> list[dict[str, Any]]:
        """One object a process, for ``status``."""
        return [
            *map(self._describe_server, self._servers),
            *self.workers.describe(),
            *self.jobs.describe(),
            *self.backgrounds.describe(),
        ]

    def scale(self, name: str, count: int) -> str | None:
        """Have ``count`` processes of the worker ``name``; return why that cannot be."""
        worker = self._declared.get(name)
        if worker is None:
            there = f"there are: {', '.join(self._declared)}" if self._declared else "the script declares none"
            return f"no worker named {name!r}; {there}"
        if self._is_stopping:
            return "the daemon is stopping"
        log.info("worker %s: %d processes", name, count)
        self.workers.scale(worker, count)
        return None

    def scale_by(self, step: int) -> None:
        """One process more or less of the worker that was declared first (SIGTTIN, SIGTTOU)."""
        name = next(iter(self._declared), None)
        if name is None:
            log.info("there are no workers to add or remove")
        elif self._is_stopping:
            log.info("no worker is added or removed: the daemon is stopping")
        elif error := self.scale(name, max(self.workers.count(name) + step, 0)):
            log.warning("%s", error)

    def _begin_roll(self, waiting: list[Done]) -> None:
        try:
            fresh = forks.execute(self._parts.loop, self._parts.handover, self._lost)
        except OSError as error:
            self._tell_reloaded(f"execute a fork server with the new code: {error.strerror}", waiting)
            return
        self._servers.append(fresh)
        self._roll = Roll(self.workers, fresh, lambda error: self._rolled(fresh, error, waiting))

    def _rolled(self, fresh: Server, error: str | None, waiting: list[Done]) -> None:
        """A reload has come to its end: children come from the winner now."""
        old, self._roll = self.workers.server, None
        stuck: list[str] = []
        kept = None if error is None or old is None or old.is_lost else old
        if kept is None:
            self.workers.use(fresh)
            self._follow(fresh)
            if old is not None:
                self._retire(old)
        else:
            if not self._is_stopping:
                self.workers.go_back(fresh, stuck.append)
            self.workers.use(kept)
            self._retire(fresh)
        if self._is_stopping:
            self._tell_reloaded(error, waiting)
        else:
            self.workers.when_quiet(
                lambda: self._tell_reloaded(_going_on(error, stuck) if error and kept else error, waiting)
            )

    def _follow(self, fresh: Server) -> None:
        """Have what its code declares: now, or once it has read it, if it could."""

        def loaded(error: str | None) -> None:
            if error is not None:
                log.error("the script could not be loaded again for the fork server:\n%s", error)
            elif fresh is self.workers.server and not self._is_stopping:
                self._take_counts(fresh.workers)

        fresh.on_loaded(loaded)
        self._take_counts(fresh.workers)

    def _take_counts(self, fresh: Mapping[str, Worker]) -> None:
        """Have as many as the new code declares; what was scaled by hand stays where the declaration has."""
        for name, worker in fresh.items():
            if name not in self._declared or self._declared[name].processes != worker.processes:
                self.workers.scale(worker, worker.processes)
        self._declared = {**self._declared, **fresh}

    def _retire(self, loser: Server) -> None:
        if loser.is_loaded:
            loser.retire(lambda: self._servers.remove(loser))
        elif loser in self._servers:
            self._servers.remove(loser)
            loser.close()
            _tell_ends(loser)  # of what it was asked for before it could listen

    def _tell_reloaded(self, error: str | None, waiting: list[Done]) -> None:
        if error:
            log.error("reload: %s", error)
        elif self._declared:
            log.info("the workers were replaced")
        for done in waiting:
            done(error)
        if self._reloads and self._roll is None and not self._is_stopping:
            again, self._reloads = self._reloads, []
            self._begin_roll(again)

    def _kill_the_rest(self, turn: Callable[[], None], *, last: bool) -> None:
        for server, left in self._busy(last=last):
            who = f"pid {left.pid}" if left.pid else "a child that was only just asked for"
            log.warning("killed: %s had not ended in time", who)
            server.signal(left, signal.SIGKILL)
        self._wait(KILL_TIME, turn, last=last)

    def _wait(self, bound: float, turn: Callable[[], None], *, last: bool) -> None:
        """Return when those are gone, or after ``bound`` seconds."""
        until = time.monotonic() + bound
        if self._busy(last=last):
            self._parts.timer.once("end of a wait", bound, lambda: None)
        while self._busy(last=last) and time.monotonic() < until:
            turn()

    def _describe_server(self, server: Server) -> dict[str, Any]:
        state = "retiring" if server is not self.workers.server else "running"
        state = state if server.is_loaded else "loading"
        return describe_child("fork server", server.pid, state, None)

    def _current(self) -> Server:
        if self.workers.server is None:
            raise ForkServerLost("fork a child: the fork server is being replaced")
        return self.workers.server

    def _busy(self, *, last: bool) -> list[tuple[Server, Child]]:
        """The children that are left: those that are the ``last`` to go, or those that are not."""
        those = {id(each) for each in self.workers.last_children()}
        return [(server, each) for server in self._servers for each in server.children if (id(each) in those) is last]

    def _take_on(self, made: Server) -> None:
        self._servers.append(made)
        self.workers.use(made)

    def _lost(self, server: Server) -> None:
        """A fork server has ended, and all its children: tell whoever waits for one, and get another."""
        if server in self._servers:
            self._servers.remove(server)
        handover = self._parts.handover
        leftovers.end(handover.name, handover.pid_path, master=os.getpid())
        if not self._is_stopping:
            self._make_up_for(server)
        _tell_ends(server)

    def _make_up_for(self, server: Server) -> None:
        roll, count = self._roll, len(server.children)
        if roll is not None and server is roll.fresh:
            roll.end("the fork server with the new code has ended")
        elif server is not self.workers.server:
            if count:
                log.error("a retiring fork server, pid %d, has ended, and its %d children with it", server.pid, count)
        elif roll is not None:
            roll.end("the fork server with the old code has ended, the new takes over without a trial")
        else:
            log.error("the fork server, pid %d, has ended, and its %d children with it; replaced", server.pid, count)
            self._replace(time.monotonic() - server.born)

    def _replace(self, lived: float) -> None:
        self.workers.use(None)
        if delay := self._losses.wait(_FOR_EVER, time.monotonic(), lived):
            self._parts.timer.once("fork server", delay, self._execute)
        else:
            self._execute()

    def _execute(self) -> None:
        if self._is_stopping or self.workers.server is not None:
            return
        try:
            made = forks.execute(self._parts.loop, self._parts.handover, self._lost)
        except OSError as error:
            log.error("execute a fork server: %s; tried again", error.strerror)
            self._replace(0.0)
            return
        self._follow(made)
        self._take_on(made)


def _going_on(error: str, stuck: list[str]) -> str:
    """What has failed, and what runs now; then the traceback."""
    why, end, trace = error.partition("\n")
    left = "; ".join(each.partition("\n")[0] for each in stuck)
    but = f", but for what it does not come up for and so stays new: {left}" if stuck else ""
    return f"{why}; the old code goes on{but}{end}{trace}"


def _tell_ends(server: Server) -> None:
    """Tell the ends of children whose fork server has ended (PR_SET_PDEATHSIG)."""
    for row in server.children.abandon():
        row.on_end(row, Receipt(row.pid or 0, None, signal.SIGKILL, False, 0.0, 0, 0.0))
