"""Timer jobs that run in a process of their own."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from typing import Any, Final

from daemonkit.core.job import Forking, Job
from daemonkit.core.timer import Timer
from daemonkit.errors import ForkServerLost
from daemonkit.master.entrance import Request
from daemonkit.master.server import Server
from daemonkit.master.status import describe_child
from daemonkit.processes.children import Child
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.worker import Note

log = logging.getLogger("daemonkit")

LAST_WORDS: Final = 5.0  # seconds between TERM and KILL for a job whose time is up

OnDone = Callable[[str | None], None]


class _Run:
    """One run of a job, under way."""

    def __init__(self, job: Job, server: Server, waiting: list[OnDone]) -> None:
        self.job = job
        self.server = server
        self.child: Child | None = None
        self.since = time.time()
        self.error = ""  # what it raised, in its own words
        self.why = ""  # it is being ended for this reason
        self.alarm: Job | None = None
        self.waiting = waiting  # are told its error, or None, when it has ended

    def note(self, note: Note, text: bytes) -> None:
        self.error = text.decode(errors="replace").partition("\n")[0]


class ForkedJobs:
    """Launches them, and keeps their records."""

    def __init__(self, timer: Timer, get_server: Callable[[], Server]) -> None:
        """Launch from the fork server that ``get_server`` returns at the time."""
        self._timer = timer
        self._get_server = get_server
        self._running: dict[str, list[_Run]] = {}
        self._queued: dict[str, list[OnDone]] = {}  # one more run each, and who waits for it
        self._is_stopping = False
        self._last_call: Job | None = None
        self.get_token: Callable[[], int] = lambda: 0  # of the leadership

    def begin(self, jobs: dict[str, Job]) -> None:
        """Take over those of ``jobs`` that are to be forked."""
        self._is_stopping = False
        if self._last_call:
            self._timer.pause(self._last_call)
        for job in jobs.values():
            if job.policy.forking:
                job.launch = self.launch
                self._running.setdefault(job.name, [])

    def launch(self, job: Job, wall: int) -> bool:
        """Start a run at ``wall`` (nanoseconds since the epoch), or do with the tick what ``overlap`` says."""
        if not self._is_full(job):
            self._start(job, wall, [])
        elif job.policy.overlap == "skip" or job.name in self._queued:
            job.record.missed += 1
        else:
            self._queue(job, [])
        return True

    def trigger(self, job: Job, done: OnDone) -> None:
        """Start a run now, or after the one in hand; ``done`` is told its error, or None, when it has ended."""
        if self._is_stopping:
            done("the daemon is stopping")
        elif not self._is_full(job):
            self._start(job, time.time_ns(), [done])
        elif job.policy.overlap == "skip":
            count = len(self._running[job.name])
            done(f'it is running, {count} of max_instances={count}, and overlap="skip" lets nothing wait for that')
        else:
            self._queue(job, [done])

    def stop(self, until: float) -> None:
        """Start nothing any more; what runs may finish, but for a TERM shortly before ``until`` (monotonic seconds)."""
        self._is_stopping = True
        for waiting in self._queued.values():
            for done in waiting:
                done("the daemon is stopping")
        self._queued.clear()
        left = max(until - time.monotonic(), 0)
        self._last_call = self._timer.once("end of all jobs", max(left - LAST_WORDS, left / 2), self._end_all)

    def describe(self) -> list[dict[str, Any]]:
        """One object a run, for ``status``."""
        return [
            describe_child(
                f"job {run.job.name}",
                run.child.pid if run.child else None,
                "ending" if run.why else "running",
                run.since,
            )
            for running in self._running.values()
            for run in running
        ]

    def _is_full(self, job: Job) -> bool:
        return len(self._running[job.name]) >= (job.policy.forking or Forking()).max_instances

    def _queue(self, job: Job, waiting: list[OnDone]) -> None:
        """Let there be one more run as soon as one of those under way has ended."""
        self._queued.setdefault(job.name, []).extend(waiting)
        if job.policy.overlap == "kill":
            self._end(self._running[job.name][0], "ended for the next run")

    def _start(self, job: Job, wall: int, waiting: list[OnDone]) -> None:
        if self._is_stopping:
            return
        record, forking = job.record, job.policy.forking or Forking()
        record.runs += 1
        record.last_started = wall
        token = self.get_token() if job.policy.leader else 0
        request: Request = {"kind": "job", "name": job.name, "index": 0, "token": token}
        try:
            run = _Run(job, self._get_server(), waiting)
            run.child = run.server.spawn(request, lambda _, receipt: self._ended(run, receipt), None, run.note)
        except ForkServerLost as error:
            self._failed(job, str(error), waiting)
            return
        self._running[job.name].append(run)
        if (limit := forking.timeout) is not None:
            run.alarm = self._timer.once(
                f"timeout of {job.name}", limit, lambda: self._end(run, f"took longer than its timeout, {limit:g} s")
            )

    def _end(self, run: _Run, why: str) -> None:
        """TERM, then KILL for its whole tree."""
        if run.why or run.child is None:
            return
        run.why = why
        self._signal(run, signal.SIGTERM)
        if run.alarm:
            self._timer.pause(run.alarm)
        run.alarm = self._timer.once(f"end of {run.job.name}", LAST_WORDS, lambda: self._signal(run, signal.SIGKILL))

    def _end_all(self) -> None:
        for running in self._running.values():
            for run in running:
                self._end(run, "ended: the daemon stops")

    def _signal(self, run: _Run, number: int) -> None:
        if run.child is not None:
            run.server.signal(run.child, number)

    def _ended(self, run: _Run, receipt: Receipt) -> None:
        job = run.job
        self._running[job.name].remove(run)
        if run.alarm:
            self._timer.pause(run.alarm)
        job.record.last_duration = round(receipt.wall * 1e9)
        job.record.receipt = str(receipt)
        if run.why or not receipt.is_clean:
            why = run.why or run.error
            self._failed(job, f"{why} ({receipt})" if why else str(receipt), run.waiting)
        else:
            for done in run.waiting:
                done(None)
        if job.name in self._queued:
            self._start(job, time.time_ns(), self._queued.pop(job.name))

    def _failed(self, job: Job, error: str, waiting: list[OnDone]) -> None:
        job.record.failures += 1
        job.record.last_error = error
        log.error("job %s: %s", job.name, error)
        for done in waiting:
            done(error)
