"""core.timer with the real alarm: the grid, lateness, batches, and who else wants SIGALRM."""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from daemonkit.core import timerfd
from daemonkit.core.board import Board, read
from daemonkit.core.job import Job, Policy
from daemonkit.core.loop import Loop
from daemonkit.core.schedule import After, Cron, Every
from daemonkit.core.signals import Signals
from daemonkit.core.stop import Stop
from daemonkit.core.timer import BATCH, Timer

MS = 1_000_000


class Rig:
    """A timer, its signals and its loop in this process."""

    def __init__(self) -> None:
        self.signals = Signals(Stop(graceful_timeout=10, last_resort=lambda: None))
        self.loop = Loop(self.signals.install([signal.SIGUSR1]))
        self.board = Board()
        self.timer = Timer(self.signals, self.board)
        self.timer.on_fallback = lambda fd: self.loop.watch(fd, lambda _: timerfd.acknowledge(fd))

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            more = self.timer.run_due()
            self.loop.turn(wait=not more and not done())
            self.signals.take()


@pytest.fixture
def rig() -> Iterator[Rig]:
    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGUSR1)}
    made = Rig()
    yield made
    made.timer.disarm()
    made.board.close()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def job(name: str, func: Callable[[], object], interval_ms: int, **policy: object) -> Job:
    return Job(name, func, Every(interval_ms * MS), Policy(**policy))  # type: ignore[arg-type]


def test_due_times_lie_on_one_grid_however_late_the_runs_are(rig: Rig) -> None:
    planned = []
    beat = job("beat", lambda: planned.append(beat.planned), 20)
    rig.timer.begin([beat])
    origin = beat.planned
    assert origin is not None
    rig.run_until(lambda: len(planned) >= 20)
    assert all((due - origin) % (20 * MS) == 0 for due in planned if due is not None)
    assert beat.record.runs + beat.record.missed >= 20


def test_a_job_longer_than_its_interval_is_not_stacked_and_others_go_on(rig: Rig) -> None:
    quick = job("quick", lambda: None, 10)
    slow = job("slow", lambda: select.select([], [], [], 0.035), 10)
    rig.timer.begin([slow, quick])
    rig.run_until(lambda: slow.record.runs >= 5)
    assert slow.record.missed >= 5 * 2
    assert quick.record.runs >= 4


def test_overlap_queue_makes_one_run_up_for_all_ticks_of_a_long_run(rig: Rig) -> None:
    missed: list[int] = []

    def slow() -> None:
        missed.append(queued.record.missed)
        if len(missed) == 1:
            select.select([], [], [], 0.095)
        elif len(missed) == 2:
            after.append(queued.record.last_started - rig.timer._offset)  # by the clock that the grid is on

    after: list[int] = []
    queued = job("queued", slow, 40, overlap="queue")
    rig.timer.begin([queued])
    first = queued.planned
    assert first is not None
    rig.run_until(lambda: len(missed) >= 2)
    # Between its two runs all ticks but one were missed, and none is left to be made up.
    assert 1 <= missed[1] - missed[0] <= (after[0] - first) // (40 * MS) - 1
    assert queued.planned is not None
    assert queued.planned > after[0]


def test_without_coalescing_every_missed_tick_is_made_up(rig: Rig) -> None:
    runs = 0

    def slow() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            select.select([], [], [], 0.055)

    each = job("each", slow, 10, coalesce=False)
    rig.timer.begin([each])
    rig.run_until(lambda: runs >= 8)
    assert each.record.missed == 0


def test_a_run_later_than_its_misfire_grace_time_is_counted_not_done(rig: Rig) -> None:
    strict = job("strict", lambda: None, 10, misfire_grace_time=5 * MS)
    blocker = Job("blocker", lambda: select.select([], [], [], 0.1), After(9 * MS), Policy())
    rig.timer.begin([strict, blocker])
    rig.run_until(lambda: strict.record.runs >= 2)
    assert strict.record.missed >= 8


def test_a_job_that_raises_or_exits_is_counted_and_goes_on(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise ValueError("no luck")

    def exits() -> None:
        raise SystemExit(3)

    bad, worse = job("bad", fails, 5), job("worse", exits, 5)
    rig.timer.begin([bad, worse])
    rig.run_until(lambda: bad.record.runs >= 2 and worse.record.runs >= 2)
    assert bad.record.failures == bad.record.runs
    assert bad.record.last_error == "ValueError: no luck"
    assert worse.record.last_error == "SystemExit: 3"
    assert "job bad failed" in caplog.text
    assert "called sys.exit(3)" in caplog.text


def test_signals_come_before_the_next_job_of_a_batch(rig: Rig) -> None:
    first = job("first", lambda: os.kill(os.getpid(), signal.SIGUSR1), 5)
    rig.timer.begin([first, *(job(f"other {n}", lambda: None, 5) for n in range(BATCH - 1))])
    select.select([], [], [], 0.01)
    assert rig.timer.run_due()
    assert signal.SIGUSR1 in rig.signals.pending


def test_more_due_jobs_than_a_batch_are_done_in_several(rig: Rig) -> None:
    jobs = [job(f"{n}", lambda: None, 10_000) for n in range(BATCH * 3)]
    for each in jobs:
        each.planned = time.monotonic_ns()
    rig.timer.begin(jobs)
    assert rig.timer.run_due()
    assert 0 < sum(each.record.runs for each in jobs) <= BATCH
    rig.run_until(lambda: all(each.record.runs >= 1 for each in jobs))


def test_a_paused_job_rests_and_comes_back_to_its_grid(rig: Rig) -> None:
    beat, resting = job("beat", lambda: None, 5), job("resting", lambda: None, 5)
    rig.timer.begin([beat, resting])
    origin = resting.planned
    assert origin is not None
    rig.timer.pause(resting)
    rig.run_until(lambda: beat.record.runs >= 5)
    assert resting.record.runs == 0
    now = time.monotonic_ns()
    rig.timer.resume(resting)
    assert resting.planned is not None
    assert (resting.planned - origin) % (5 * MS) == 0
    assert resting.planned >= now  # what would have been due meanwhile is not counted as missed
    rig.run_until(lambda: resting.record.runs >= 1)


def test_what_is_due_before_the_deadline_of_a_stop_comes_in_time_after_an_alarm_that_was_called_off(rig: Rig) -> None:
    called_off = rig.timer.once("called off", 0.02, lambda: None)
    assert not rig.timer.run_due()  # the alarm is set for it
    rig.timer.pause(called_off)
    rig.signals.stop.ask(signal.SIGTERM)
    done: list[int] = []
    rig.timer.once("kill", 0.04, lambda: done.append(1))
    rig.run_until(lambda: bool(done))
    assert rig.signals.stop.deadline is not None
    assert time.monotonic() < rig.signals.stop.deadline - 1


def test_nothing_is_armed_when_nothing_is_due(rig: Rig) -> None:
    once = Job("once", lambda: None, After(MS), Policy())
    rig.timer.begin([once])
    rig.run_until(lambda: once.record.runs >= 1)
    assert not rig.timer.run_due()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_job_that_takes_the_alarms_handler_is_named_and_the_others_go_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rude = job("rude", lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN), 10)
    beat = job("beat", lambda: None, 10)
    rig.timer.begin([rude, beat])
    rig.run_until(lambda: beat.record.runs >= 5)
    assert "job rude" in caplog.text
    assert "SIGALRM" in caplog.text
    assert "timerfd" in caplog.text


def test_a_job_that_sets_the_alarm_for_itself_gets_it_and_the_timer_goes_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rude = Job("rude", lambda: signal.alarm(3600), After(MS), Policy())
    beat = job("beat", lambda: None, 10)
    rig.timer.begin([rude, beat])
    rig.run_until(lambda: beat.record.runs >= 5)
    assert "set the alarm" in caplog.text
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000


def test_a_handler_that_a_job_replaces_is_put_back_and_said(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rude = job("rude", lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL), 5)
    rig.timer.begin([rude])
    rig.run_until(lambda: rude.record.runs >= 1)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.SIGUSR1 in rig.signals.pending
    assert "job rude has set" in caplog.text


def test_a_step_of_the_wall_clock_moves_cron_jobs_and_no_others(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    hourly, beat = Job("hourly", lambda: None, Cron("0 * * * *", "UTC"), Policy()), job("beat", lambda: None, 1000)
    rig.timer.begin([hourly, beat])
    before = (hourly.planned, beat.planned)
    rig.timer._offset -= 1800 * 1000 * MS  # as if the clock had stood half an hour behind until now
    rig.timer.clock_stepped()
    assert hourly.planned is not None
    due = hourly.planned + time.time_ns() - time.monotonic_ns()
    assert abs(due / 1e9 % 3600) < 0.1 or abs(due / 1e9 % 3600 - 3600) < 0.1
    assert beat.planned == before[1]
    assert "the wall clock was set by +1800" in caplog.text


def test_the_board_names_the_job_while_it_runs(rig: Rig) -> None:
    seen = []
    beat = job("beat", lambda: seen.append(read(os.getpid())), 5)
    rig.timer.begin([beat])
    rig.run_until(lambda: beat.record.runs >= 1)
    assert seen[0] is not None
    assert seen[0].name == "beat"
    now = read(os.getpid())
    assert now is not None
    assert now.name == ""
