"""One heap, one SIGALRM, any number of jobs.

The alarm (setitimer(2), ITIMER_REAL) is set for the earliest due job and set again after each batch.  It only
wakes: what is due is read off the monotonic clock, because pending SIGALRMs merge into one.  Due times lie on
each job's own grid, so lateness never adds up.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable

from daemonkit.core import timerfd
from daemonkit.core.board import Board
from daemonkit.core.chance import chance
from daemonkit.core.job import Job, Policy
from daemonkit.core.schedule import After, Cron, jittered
from daemonkit.core.signals import Signals
from daemonkit.core.stop import StopNow
from daemonkit.errors import told

log = logging.getLogger("daemonkit.timer")

BATCH = 64  # jobs run before signals, sockets and children have their turn,
BATCH_TIME = 20_000_000  # or nanoseconds after which no further job is begun
LEAD = 50_000  # nanoseconds that the alarm rings early at first: the way from its interrupt to the job takes time
MOST_LEAD = 150_000  # nanoseconds: never earlier, whatever that way took
AIM = 90_000  # nanoseconds late that a job may be on average: waiting for the exact moment costs processor time
_STEP = 500_000_000  # nanoseconds: less is the slewing of NTP
_FOREIGN = 0.02  # seconds by which our own alarm may look different when read back


class Timer:
    """Runs jobs when they are due, one after the other, in the thread of the loop."""

    def __init__(self, signals: Signals, board: Board) -> None:
        """Nothing is armed before the first ``run_due``."""
        self._signals = signals
        self._board = board
        self._heap: list[tuple[int, int, Job]] = []
        self._tickets = itertools.count(1)
        self._armed = 0
        self._stale = 0  # about so many entries of the heap count no more
        self._lead = LEAD
        self._offset = time.time_ns() - time.monotonic_ns()
        self.fd: int | None = None  # a timerfd, once somebody else has taken the alarm
        self.on_fallback: Callable[[int], None] | None = None

    def begin(self, jobs: Iterable[Job]) -> None:
        """Put ``jobs`` on their grids, from now on."""
        now, wall = time.monotonic_ns(), time.time_ns()
        self._offset = wall - now
        for job in jobs:
            if job.planned is None and not job.paused:  # paused and never due: done, before a re-exec
                job.planned = job.schedule.first(now, wall)
            if not job.paused and job.planned is not None:
                self._heap.append(self._entry(job, job.planned))
        heapq.heapify(self._heap)

    def once(self, name: str, delay: float, func: Callable[[], object]) -> Job:
        """Call ``func`` in ``delay`` seconds; ``pause`` the returned job to call it off.

        It is the daemon's own: a stop whose time is up does not interrupt it.
        """
        job = Job(name, func, After(round(delay * 1e9)), Policy())
        job.launch = _call
        job.planned = time.monotonic_ns() + round(delay * 1e9)
        heapq.heappush(self._heap, self._entry(job, job.planned))
        return job

    def pause(self, job: Job) -> None:
        """Let ``job`` rest: no run, no wake-up."""
        job.paused, job.ticket = True, 0
        self._stale += 1
        if self._stale > BATCH and self._stale > len(self._heap) // 2:  # time-outs of an hour, called off each second
            self._heap[:] = [entry for entry in self._heap if entry[1] == entry[2].ticket]
            heapq.heapify(self._heap)
            self._stale = 0

    def resume(self, job: Job) -> None:
        """Put ``job`` back on its grid; what it missed while paused is not made up."""
        if job.paused and job.planned is not None:
            now, wall = time.monotonic_ns(), time.time_ns()
            if isinstance(job.schedule, Cron):
                job.planned = job.schedule.first(now, wall)  # the wall clock may have been set meanwhile
            elif job.planned <= now:
                job.planned, _ = job.schedule.following(job.planned, now, wall)
            if job.planned is not None:
                heapq.heappush(self._heap, self._entry(job, job.planned))
        job.paused = False

    def run_due(self) -> bool:
        """Run what is due; stop early for signals and after a batch.  Tells whether more is due already."""
        heap, pending = self._heap, self._signals.pending
        began = time.monotonic_ns()
        for _ in range(BATCH):
            if not heap:
                self._arm(0)
                return False
            due, ticket, job = heap[0]
            now = time.monotonic_ns()
            if due > now + self._lead:
                self._arm(due)
                return False
            if due == self._armed:
                self._learn(now + self._lead - due)
            if ticket != job.ticket:
                heapq.heappop(heap)
                continue
            while now < due:
                now = time.monotonic_ns()
            self._fire(job, due, now)
            pending = self._signals.pending
            if pending and (len(pending) > 1 or signal.SIGALRM not in pending):
                return True
            if now - began > BATCH_TIME:
                return True
        return True

    def run(self, job: Job, now: int) -> bool:
        """Call ``job``'s function and keep its record; tell whether it went well."""
        if job.launch is not None:
            return job.launch(job, now + self._offset)
        record = job.record
        record.runs += 1
        record.last_started = now + self._offset
        try:
            self._board.enter(job.name, now)
            with self._signals.interruptible():
                job.func()
        except StopNow:
            log.error("job %s: interrupted, the time to finish was up", job.name)
            return self._failed(job, "interrupted by a stop")
        except SystemExit as error:
            log.error("job %s: called sys.exit(%s); the daemon goes on", job.name, error.code)
            return self._failed(job, told(error))
        except BaseException as error:  # whatever a job raises is its own failure, never the daemon's
            log.exception("job %s failed", job.name)
            return self._failed(job, told(error))
        else:
            return True
        finally:
            record.last_duration = time.monotonic_ns() - now
            self._board.leave()

    def check_clock(self) -> None:
        """Notice a step of the wall clock by looking, where nobody waits for the kernel's word."""
        if abs(time.time_ns() - time.monotonic_ns() - self._offset) > _STEP:
            self.clock_stepped()

    def clock_stepped(self) -> None:
        """The wall clock was set: move the cron jobs, as cron(8) documents; the others do not know it."""
        now, wall = time.monotonic_ns(), time.time_ns()
        expected, self._offset = now + self._offset, wall - now
        for _, ticket, job in list(self._heap):
            if isinstance(job.schedule, Cron) and ticket == job.ticket:
                job.planned, job.ticket = job.schedule.stepped(job.planned, now, expected, wall), 0
                if job.planned is not None:
                    heapq.heappush(self._heap, self._entry(job, job.planned))
        log.warning("the wall clock was set by %+.3f s; cron jobs moved", (wall - expected) / 1e9)

    @property
    def rings_at(self) -> int:
        """When the alarm was set to ring (monotonic nanoseconds); 0: never."""
        return self._armed

    def wake_at(self, due: int) -> None:
        """Let the alarm ring at ``due`` (monotonic nanoseconds), whatever is due before."""
        self._arm(due)

    def retire(self, jobs: Iterable[Job]) -> None:
        """Run none of ``jobs`` any more; what was asked for by ``once`` stays."""
        for job in jobs:
            job.ticket = 0

    def disarm(self) -> None:
        """Cancel the alarm; a pending one would kill the next program that this process executes."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._armed = 0

    def _fire(self, job: Job, due: int, now: int) -> None:
        """Run ``job`` for its tick ``due``, after its next tick is on the heap."""
        record, policy, schedule = job.record, job.policy, job.schedule
        planned = job.planned if job.planned is not None else due
        wall = now + self._offset
        if policy.coalesce:
            job.planned, missed = schedule.following(planned, now, wall)
            record.missed += missed
        else:
            job.planned = schedule.successor(planned, now, wall)
        self._replace_first(job)
        if job.gate is not None and not job.gate():
            return
        lateness = now - due
        if policy.misfire_grace_time is not None and lateness > policy.misfire_grace_time:
            record.missed += 1
            return
        record.lateness = lateness
        if lateness > record.max_lateness:
            record.max_lateness = lateness
        self.run(job, now)
        if job.launch is None and job.planned is not None and job.planned <= now + record.last_duration:
            self._overran(job)
        if taken := self._signals.taken_over():
            self._put_back(taken, job)

    def _learn(self, way: int) -> None:
        """Let the alarm ring so much early as the ``way`` from it to the job has taken of late."""
        self._armed = 0
        if 0 < way < MOST_LEAD * 2:  # a way that something else has made long says nothing about the next
            self._lead += (min(max(way - AIM, 0), MOST_LEAD) - self._lead) // 8

    def _overran(self, job: Job) -> None:
        """The job was still running at its own next tick: with overlap="skip" that tick is not made up."""
        now = time.monotonic_ns()
        if job.policy.overlap == "skip" and job.policy.coalesce and job.planned is not None and not job.paused:
            job.planned, missed = job.schedule.following(job.planned, now, now + self._offset)
            job.record.missed += 1 + missed
            job.ticket = 0
            if job.planned is not None:
                heapq.heappush(self._heap, self._entry(job, job.planned))

    def _replace_first(self, job: Job) -> None:
        if job.planned is None:
            heapq.heappop(self._heap)
        else:
            heapq.heapreplace(self._heap, self._entry(job, job.planned))

    def _entry(self, job: Job, due: int) -> tuple[int, int, Job]:
        job.ticket = ticket = next(self._tickets)
        if job.policy.jitter:
            due = jittered(due, job.policy.jitter, chance)
        return due, ticket, job

    def _failed(self, job: Job, error: str) -> bool:
        job.record.failures += 1
        job.record.last_error = error
        return False

    def _arm(self, due: int) -> None:
        """Let the alarm ring at ``due``; 0 means never.  While a stop is under way its deadline may ring before."""
        if self._signals.stop.deadline is not None:
            self._signals.stop.ring_by(due / 1e9 if due else math.inf)
            self._armed = 0  # the alarm was the stop's own since its deadline was set, and is so until that is gone
            return
        if due == self._armed:
            return
        if self.fd is not None:
            timerfd.arm(self.fd, due)
            self._armed = due
            return
        now = time.monotonic_ns()
        left, interval = signal.setitimer(signal.ITIMER_REAL, max(due - self._lead - now, 1000) / 1e9 if due else 0)
        ours = max(self._armed - now, 0) / 1e9
        self._armed = due
        if interval or (left and abs(left - ours) > _FOREIGN):
            signal.setitimer(signal.ITIMER_REAL, left, interval)
            self._fall_back("something in this process has set the alarm (ITIMER_REAL) for itself")

    def _fall_back(self, why: str) -> None:
        if self.fd is not None:
            return
        if self.on_fallback is None:  # nobody waits for descriptors: a script's own main loop
            log.warning("%s; the timer has taken it back", why)
            self._signals.restore(signal.SIGALRM)
            signal.setitimer(
                signal.ITIMER_REAL, max(self._armed - time.monotonic_ns(), 1000) / 1e9 if self._armed else 0
            )
            return
        log.warning("%s; the timer goes on with a timerfd", why)
        self.fd = timerfd.monotonic()
        timerfd.arm(self.fd, self._armed)
        self.on_fallback(self.fd)

    def _put_back(self, taken: list[tuple[int, object]], job: Job) -> None:
        """A job has installed signal handlers of its own: name it, keep ours; only the alarm can be shared."""
        for number, handler in taken:
            name = signal.Signals(number).name
            what = f"{getattr(handler, '__module__', '')}.{getattr(handler, '__qualname__', handler)}"
            if number == signal.SIGALRM:
                if self.fd is None:
                    self._fall_back(f"job {job.name} has set {what} as handler of SIGALRM")
            else:
                self._signals.restore(number)
                log.warning("job %s has set %s as handler of %s; ours is back: use @on(%r)", job.name, what, name, name)


def _call(job: Job, wall: int) -> bool:
    try:
        job.func()
    except Exception:  # a mistake of ours must not end the daemon
        log.exception("daemonkit itself failed: %s; the daemon goes on", job.name)
        return False
    return True
