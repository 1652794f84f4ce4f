"""Faults around signals and timers, rows 14-20: storms, jobs that misbehave, clocks that jump, TERM at any moment.

Row 17: the machine's own clock is never set here.  The kernel's word about a step (timerfd_create(2),
TFD_TIMER_CANCEL_ON_SET) can therefore not be had; what follows from that word is called directly, on a real
``Timer``, with the offset that a step leaves.  A daemon with a main loop of its own sees steps by looking, so there
the whole way is gone with libfaketime, which moves the wall clock of one process and leaves the monotonic one alone.
A minute of SIGSTOP is stood for by two seconds and a grid that is finer in proportion.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from harness import PATIENCE, Box, await_end

from daemonkit.core import asking, timerfd
from daemonkit.core.board import Board
from daemonkit.core.job import Job, Policy
from daemonkit.core.schedule import Cron, Every
from daemonkit.core.signals import Signals
from daemonkit.core.stop import Stop
from daemonkit.core.timer import Timer

STORM = 100_000
KINDS = (
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGALRM,
    signal.SIGCHLD,
    signal.SIGWINCH,
    signal.SIGURG,
    signal.SIGCONT,
    signal.SIGIO,
    signal.SIGPIPE,
)
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)

needs_faketime = pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")


@pytest.fixture(autouse=True)
def sweep() -> Iterator[None]:
    """libfaketime leaves files behind for processes that end without exit(3)."""
    yield
    for path in Path("/dev/shm").glob("*faketime_s*_*"):
        if not Path(f"/proc/{path.name.rpartition('_')[2]}").exists():
            path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def known_and_compiled(box: Box, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let setproctitle leave the mark of the box in /proc/PID/environ, and let commands compile their code once."""
    bytecode = tmp_path_factory.getbasetemp() / "bytecode"
    box.environ |= {"SPT_NOENV": "1", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)}


def await_pid(box: Box) -> int:
    """Sleep until a daemon has written its PID; that."""
    return int(box.await_file(box.run_dir / "beat.pid", "\n"))


def send(pid: int, kinds: tuple[signal.Signals, ...], count: int) -> int:
    """Send ``count`` signals in turn, fewer if the process ends before; how many were sent."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    sent = 0
    try:
        for number in itertools.islice(itertools.cycle(kinds), count):
            signal.pidfd_send_signal(pidfd, number)
            sent += 1
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
    return sent


@contextlib.contextmanager
def storm_on(pid: int, kinds: tuple[signal.Signals, ...] = KINDS) -> Iterator[None]:
    """Signals without a pause, in the background, until the process has ended or the block is left."""
    calm = threading.Event()

    def blow() -> None:
        while not calm.is_set() and send(pid, kinds, 1000) == 1000:
            pass

    thread = threading.Thread(target=blow)
    thread.start()
    try:
        yield
    finally:
        calm.set()
        thread.join()


def ended_gracefully(box: Box, number: str = "SIGTERM") -> str:
    """The log of a daemon that was stopped in order: said, once, and nothing of it left."""
    text = box.log.read_text()
    assert text.count(f"stopping on {number}") == 1, text[-3000:]
    assert text.count("daemonkit: stopped") == 1
    assert list(box.run_dir.iterdir()) == []
    assert box.processes() == {}
    return text


# Handlers count themselves and say so if one begins before another has ended.
STORMY = """
import collections
inside, nested, seen = [], [], collections.Counter()

def noted(kind):
    def handler():
        if inside:
            nested.append((kind, list(inside)))
        inside.append(kind)
        seen[kind] += sum(range(50)) > 0
        inside.pop()
    return handler

for each in "HUP USR1 TTIN TTOU WINCH URG CONT PIPE".split():
    on("SIG" + each)(noted(each))
every(0.01, name="tick")(noted("tick"))

@on("stop")
def stop():
    log.info("stop hook: nested %s, kinds %s", nested, sorted(seen))
"""


def test_row_14_after_100_000_mixed_signals_the_daemon_works_and_one_term_stops_it(box: Box) -> None:
    pid = box.start(STORMY + '@after(0.05)\ndef later(): log.info("has ticked")\n')
    assert send(pid, KINDS, STORM) == STORM
    assert box.status()["pid"] == pid
    box.await_log("has ticked")
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    text = ended_gracefully(box)
    assert "stop hook: nested []" in text
    kinds = "['CONT', 'HUP', 'PIPE', 'TTIN', 'TTOU', 'URG', 'USR1', 'WINCH', 'tick']"
    assert f"kinds {kinds}" in text, "a kind of signal never reached its handler"
    assert "Traceback" not in text


def test_row_14_what_daemonkit_itself_does_on_signals_survives_a_storm_and_term_in_the_middle_of_it(box: Box) -> None:
    pid = box.start("@every(0.01)\ndef beat(): pass\n")
    with storm_on(pid):
        box.await_log("status\n", 5)
        box.await_log("reloaded", 5)
        os.kill(pid, signal.SIGTERM)
        await_end(pid)
    assert "Traceback" not in ended_gracefully(box)


def test_row_14_a_storm_during_the_start_neither_stops_nor_breaks_it(box: Box) -> None:
    script = box.script("sum(range(3_000_000))\n" + STORMY)
    starting = box.popen("start", script)
    pid = await_pid(box)
    with storm_on(pid):
        said = starting.communicate(timeout=120)[0]
        assert (starting.returncode, said) == (0, f"beat is running, pid {pid}\n")
        assert box.call("kill", "--timeout", "60", "beat").stdout == f"beat was stopped, pid {pid}\n"
    assert "stop hook: nested []" in ended_gracefully(box)


def test_row_14_a_main_loop_of_its_own_survives_a_storm_and_its_handlers_are_never_nested(box: Box) -> None:
    pid = box.start(STORMY + "def loop():\n    while True:\n        sum(range(1000))\nmain(loop)\n")
    with storm_on(pid):
        box.await_log("ready, pid")
        assert box.call("trigger", "--help").returncode == 0
    assert send(pid, KINDS, STORM // 4) == STORM // 4
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    assert "stop hook: nested []" in ended_gracefully(box)


def test_row_15_alarms_from_outside_run_no_job_before_its_time(box: Box) -> None:
    pid = box.start(
        """
        began = time.monotonic()

        @every(0.25)
        def tick():
            log.info("tick %.3f", time.monotonic() - began)

        @every(3600)
        def never():
            log.info("came too early")
        """
    )
    with storm_on(pid, (signal.SIGALRM,)):
        text = box.await_log("tick ", 5)
    times = [float(line.rpartition(" ")[2]) for line in text.splitlines() if "tick " in line]
    for count, at in enumerate(times, start=1):  # by the daemon's own clock, which began before the grid
        assert at > 0.25 * count - 0.001, f"run {count} came before its time: {times}"
    assert "too early" not in text
    assert box.job("tick")["failures"] == 0


def test_row_15_foreign_children_are_reaped_by_whoever_started_them(box: Box) -> None:
    pid = box.start(
        """
        import subprocess

        @every(0.05)
        def tick():
            done = subprocess.run(["sh", "-c", "(sleep 0.01; exit 4) & exit 3"])
            child = os.fork()
            if child == 0:
                os._exit(7)
            seen = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            log.info("codes %d %d", done.returncode, seen)
        """
    )
    with storm_on(pid, (signal.SIGCHLD,)):
        box.await_log("codes 3 7", 10)
    assert box.job("tick")["failures"] == 0


# Each job does its harm once; `steady` keeps the record.
HARM = """
import threading
began, done = time.monotonic(), set()

def once(function):
    def job():
        if function.__name__ not in done:
            done.add(function.__name__)
            function()
    job.__name__ = function.__name__
    return every(0.05)(job)

@once
def raises(): raise ValueError("as it may")

@once
def raises_group(): raise BaseException("not even an Exception")

@once
def late(): time.sleep(0.5)

@once
def exits(): sys.exit(3)

@once
def forks():
    if os.fork() == 0:
        time.sleep(0.1)
        os._exit(0)

@once
def threads():
    for _ in range(5):
        threading.Thread(target=time.sleep, args=(600,)).start()

@once
def handlers():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, lambda number, frame: None)

@once
def moves(): os.chdir("/proc")

@once
def closes(): os.close(1)

@every(0.05)
def steady():
    if len(done) == 9 and sorted(done)[-1] != "said":
        log.info("all harm done")
        done.add("zz")
"""


def steadily(box: Box, pid: int) -> dict[str, Any]:
    """The record of the job ``steady``, from a daemon that may be busy just now."""
    answer = asking.ask(str(box.run_dir / "beat.sock"), {"do": "jobs"}, pid=pid, timeout=PATIENCE)
    found: dict[str, Any] = next(job for job in answer["jobs"] if job["name"] == "steady")
    return found


def ticks_between(before: dict[str, Any], after: dict[str, Any], interval: float) -> int:
    """How many ticks of the grid lie between the next runs of two records; both must be on that grid."""
    ticks: float = (after["next_run"] - before["next_run"]) / interval
    assert ticks == pytest.approx(round(ticks), abs=0.2), "the grid has moved"
    return round(ticks)


def counted(job: dict[str, Any]) -> int:
    """The ticks of the grid that a record knows of."""
    return int(job["runs"]) + int(job["missed"])


def test_row_16_jobs_that_misbehave_are_counted_and_named_and_the_others_stay_on_the_grid(box: Box) -> None:
    pid = box.start(HARM)
    before = steadily(box, pid)
    box.await_log("all harm done")
    began = box.job("steady")["runs"]
    text = box.await_log("daemonkit: ready")
    assert "as it may" in text
    status = box.status()
    jobs = {job["name"]: job for job in status["jobs"]}
    failures = {name for name, job in jobs.items() if job["failures"]}
    assert failures == {"raises", "raises_group", "exits"}
    assert {jobs[name]["failures"] for name in failures} == {1}
    assert jobs["raises"]["last_error"] == "ValueError: as it may"
    assert jobs["exits"]["last_error"] == "SystemExit: 3"
    assert jobs["late"]["missed"] >= 8
    assert "job handlers has set" in box.log.read_text()
    steady = jobs["steady"]
    assert steady["runs"] >= began
    assert ticks_between(before, steady, 0.05) == counted(steady) - counted(before), "a tick was lost"
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    ended_gracefully(box)


def test_row_16_a_forked_child_that_comes_back_from_its_job_does_not_become_a_second_daemon(box: Box) -> None:
    pid = box.start(
        """
        @after(0.001)
        def forks():
            log.info("forked %d", os.fork())

        @every(0.1)
        def beat():
            log.info("beat of %d", os.getpid())
        """
    )
    text = box.await_log("forked", 2)
    (child,) = set(re.findall(r"forked (\d+)", text)) - {"0"}
    await_end(int(child))
    text = box.await_log(f"beat of {pid}", 3)
    assert {line.rpartition(" ")[2] for line in text.splitlines() if "beat of" in line} == {str(pid)}
    assert box.call("kill", "beat").returncode == 0
    ended_gracefully(box)


def test_row_16_a_job_that_blocks_for_ever_is_named_by_status_and_ended_at_graceful_timeout(box: Box) -> None:
    script = """
    @after(0.001)
    def blocks():
        log.info("blocked")
        while True:
            time.sleep(600)

    @every(0.1)
    def beat(): pass

    @on("stop")
    def stop(): log.info("stop hook")
    """
    pid = box.start(script, "--graceful-timeout", "0.5")
    box.await_log("blocked")
    time.sleep(0.6)  # only a job that is longer in hand than this is asked about in a hurry
    assert box.status()["busy"].startswith("blocks for ")
    done = box.call("kill", "beat")
    assert (done.returncode, done.stdout) == (0, f"beat was stopped, pid {pid}\n")
    text = ended_gracefully(box)
    assert "job blocks: interrupted" in text
    assert text.count("stop hook") == 1


def test_row_16_a_job_that_swallows_every_interruption_cannot_keep_the_daemon(box: Box) -> None:
    script = """
    @after(0.001)
    def blocks():
        log.info("blocked")
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass

    """
    pid = box.start(script, "--graceful-timeout", "0.01")
    box.await_log("blocked")
    assert box.call("kill", "beat").stdout == f"beat was stopped, pid {pid}\n"
    assert "does not let itself be interrupted" in box.log.read_text()
    assert list(box.run_dir.iterdir()) == []


def test_row_17_missed_ticks_of_a_stopped_daemon_coalesce_and_its_grid_is_kept(box: Box) -> None:
    pid = box.start("@every(0.1)\ndef tick(): log.info('tick')\n")
    box.await_log("tick", 2)
    first = box.job("tick")
    os.kill(pid, signal.SIGSTOP)
    before = box.log.read_text().count("tick")
    time.sleep(2)  # the fault itself, not a wait for something
    os.kill(pid, signal.SIGCONT)
    box.await_log("tick", before + 3)
    job = box.job("tick")
    assert job["missed"] >= 18
    assert job["max_lateness"] >= 1.5
    assert ticks_between(first, job, 0.1) == counted(job) - counted(first)


def test_row_17_a_stopped_daemon_is_called_stopped_and_can_be_killed(box: Box) -> None:
    pid = box.start("@every(3600)\ndef beat(): pass\n")
    os.kill(pid, signal.SIGSTOP)
    assert box.status()["state"] == "stopped by a signal"
    done = box.call("kill", "--timeout", "5", "beat")
    assert (done.returncode, f"pid {pid}" in done.stdout) == (0, True)
    assert box.processes() == {}


@pytest.mark.parametrize("hours", [-26, -2, 2, 26])
def test_row_17_a_step_of_the_wall_clock_moves_cron_jobs_and_no_other(
    hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board()
    timer = Timer(Signals(Stop(graceful_timeout=1, last_resort=lambda: None)), board)
    board.close()  # no job is run here, and there is one board a process
    wall = datetime.now(UTC)
    soon = wall + timedelta(hours=1)
    cron = Job("cron", lambda: None, Cron(f"{soon.minute} {soon.hour} * * *", "UTC"), Policy())
    every = Job("every", lambda: None, Every(3600 * 10**9), Policy())
    timer.begin([cron, every])
    planned = every.planned
    true_time = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: true_time() + hours * 3600 * 10**9)
    timer.clock_stepped()
    assert every.planned == planned
    assert cron.planned is not None
    left = (cron.planned - time.monotonic_ns()) / 3600e9
    if hours == 2:
        assert left <= 0, "the job's time was stepped over: it runs now"
    else:
        assert left % 24 == pytest.approx((1 - hours) % 24, abs=0.02), "it waits for its own time on the new clock"


def test_row_17_the_descriptor_that_tells_of_steps_is_silent_while_nobody_sets_the_clock() -> None:
    fd = timerfd.on_clock_step()
    try:
        timerfd.watch_clock(fd)
        with pytest.raises(BlockingIOError):
            os.read(fd, 8)
    finally:
        os.close(fd)


def faked(box: Box, **environ: str) -> None:
    """Let the box's commands and daemons live with a wall clock of their own."""
    box.environ |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1", **environ}


def set_clock(box: Box, offset: str) -> None:
    """Step the wall clock of the box's processes."""
    fresh = box.path / "clock.new"
    fresh.write_text(f"{offset}\n")
    fresh.rename(box.path / "clock")


@needs_faketime
def test_row_17_clock_jumps_of_hours_neither_double_nor_lose_a_cron_job_nor_move_an_interval(box: Box) -> None:
    set_clock(box, "+0")
    faked(box, FAKETIME_TIMESTAMP_FILE=str(box.path / "clock"), FAKETIME_NO_CACHE="1", TZ="UTC")
    soon = datetime.now(UTC) + timedelta(hours=1)
    box.start(
        f"""
        @cron("{soon.minute} {soon.hour} * * *")
        def daily(): log.info("daily ran")

        @every(0.1)
        def tick(): log.info("tick")

        def loop():
            while True:
                signal.pause()

        main(loop)
        """
    )
    began = time.monotonic()
    before = box.await_log("test: tick").count("tick")
    # None is near 3 hours, where a change of the clock becomes a correction of it.
    steps = ("+7200", "-3000", "+7200", "+0", "-86400", "+0")
    for count, step in enumerate(steps, start=1):
        set_clock(box, step)
        text = box.await_log("the wall clock was set", count)
        text = box.await_log("tick", text.count("tick") + 3)
        assert text.count("daily ran") == 1, f"after {steps[:count]}"
    elapsed = time.monotonic() - began
    assert text.count("tick") - before <= elapsed / 0.1 + 2, "the interval followed the wall clock"
    assert text.count("the wall clock was set") == len(steps)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Lord_Howe"])
def test_row_18_the_timetable_shows_both_daylight_saving_nights_as_documented(box: Box, zone: str) -> None:
    here = ZoneInfo(zone)
    script = box.script('cron("15 2 * * *", name="fixed")(print)\ncron("15 * * * *", name="hourly")(print)\n')
    done = box.call("timetable", "--for", "400d", "--limit", "20000", "--json", script, env={**box.environ, "TZ": zone})
    assert done.returncode == 0, done.stderr
    runs: dict[str, list[datetime]] = {"fixed": [], "hourly": []}
    for run in json.loads(done.stdout):
        runs[run["job"]].append(datetime.fromtimestamp(run["at"], here))
    days = [run.date() for run in runs["fixed"]]
    assert len(days) == len(set(days)), "a fixed time came twice in one day"
    assert {b - a for a, b in itertools.pairwise(days)} == {timedelta(days=1)}, "a day was left out"
    for run in runs["fixed"]:
        skipped = (run.hour, run.minute) != (2, 15)
        assert not skipped or not exists(run.replace(hour=2, minute=15)), f"moved without need: {run}"
    nights = {run.date() for run in runs["hourly"] if hours_of(run.date(), here) != 24}
    assert len(nights) >= 2, "no daylight-saving night in 400 days"
    for night in sorted(nights):
        shown = [run for run in runs["hourly"] if run.date() == night]
        wanted = sum(exists(moment) for moment in faces(night, here)) + sum(
            exists(moment) and moment.replace(fold=1).utcoffset() != moment.utcoffset() for moment in faces(night, here)
        )
        assert len(shown) in (wanted, wanted - 1), f"{night}: {[f'{run:%H:%M %z}' for run in shown]}"
        assert all(run.minute == 15 for run in shown)


def faces(day: date, zone: ZoneInfo) -> list[datetime]:
    """A quarter past each hour of ``day``, whether the clock shows it or not."""
    return [datetime(day.year, day.month, day.day, hour, 15, tzinfo=zone) for hour in range(24)]


def exists(moment: datetime) -> bool:
    """Whether the clock ever shows this local time."""
    return moment.astimezone(UTC).astimezone(moment.tzinfo).replace(tzinfo=None) == moment.replace(tzinfo=None)


def hours_of(day: date, zone: ZoneInfo) -> float:
    """How many hours ``day`` has."""
    begin = datetime(day.year, day.month, day.day, tzinfo=zone)
    end = (begin.replace(tzinfo=None) + timedelta(days=1)).replace(tzinfo=zone)
    return (end.timestamp() - begin.timestamp()) / 3600


HOURS = """
@cron("0 2 * * *")
def fixed(): log.info("ran fixed")

@cron("0 * * * *")
def hourly(): log.info("ran hourly")

@cron("30 * * * *")
def not_yet(): log.info("ran not_yet")
"""


def start_shortly_before(box: Box, name: str, moment: datetime) -> None:
    """Start a daemon that is ready at ``moment``, or some seconds before if this machine, now, takes those for it."""
    for sooner in (0, 8, 25):
        began = moment - timedelta(seconds=sooner)
        faked(box, FAKETIME_FMT="%s", FAKETIME=f"@{int(began.timestamp())}", TZ="Europe/Berlin")
        box.start(HOURS, "--log", str(box.path / f"{name}.log"), name=f"{name}.py")
        since = box.status(name)["since"]
        if since < moment.timestamp() + 2:
            return
        assert box.call("kill", name).returncode == 0
        (box.path / f"{name}.log").unlink()
    pytest.fail(f"this machine takes more than {since - began.timestamp():g} s for a start")


@needs_faketime
def test_row_18_daemons_live_through_the_moments_at_which_the_hour_changes(box: Box) -> None:
    spring = datetime(2031, 3, 30, 0, 59, 57, tzinfo=UTC)  # 01:59:57, then 03:00: a fixed time of 02:00 runs now
    autumn = datetime(2031, 10, 26, 0, 59, 57, tzinfo=UTC)  # 02:59:57, then 02:00 again: it does not
    for name, before in (("spring", spring), ("autumn", autumn)):
        start_shortly_before(box, name, before)
    box.await_file(box.path / "spring.log", "ran ", 2)
    box.await_file(box.path / "autumn.log", "ran hourly")
    ran = [(box.path / f"{name}.log").read_text().count("ran ") for name in ("spring", "autumn")]
    assert ran == [2, 1]
    assert "ran not_yet" not in (box.path / "spring.log").read_text()


def test_row_19_a_hundred_thousand_jobs_are_registered_run_shown_and_stopped(box: Box) -> None:
    pid = box.start(
        """
        ran = bytearray(100_000)

        def job(number):
            def run():
                ran[number] += 1
            return run

        for number in range(100_000):
            every(3600, name=f"job-{number}", first=number % 100 / 100)(job(number))

        @every(0.1)
        def tick():
            if ran.count(1) == len(ran):
                log.info("all have run once")
        """
    )
    box.await_log("all have run once", 2)
    until = time.monotonic() + 2 * PATIENCE
    while len((status := box.status())["jobs"]) != 100_001:  # the command may not have had the time for so many
        assert time.monotonic() < until, (len(status["jobs"]), status.get("note"))
    assert sum(job["runs"] for job in status["jobs"] if job["name"] != "tick") == 100_000
    assert status["memory"] < 400 << 20
    assert box.call("kill", "beat").stdout == f"beat was stopped, pid {pid}\n"
    ended_gracefully(box)


HOOKS = """
import subprocess

def mark(text):
    log.info("now in the %s", text)

@on("stop")
def stop(): log.info("stop hook")

@every(3600)
def beat(): pass
"""


def test_row_20_term_during_the_import_ends_the_start_and_leaves_nothing(box: Box) -> None:
    starting = box.popen("start", box.script("log.info('importing')\ntime.sleep(600)\n"))
    box.await_log("importing")
    pid = await_pid(box)
    os.kill(pid, signal.SIGTERM)
    said = starting.communicate(timeout=60)[0]
    assert starting.returncode == 1
    assert "stopped by a signal before it was ready" in said
    await_end(pid)
    assert list(box.run_dir.iterdir()) == []
    assert box.processes() == {}


def test_row_20_term_to_the_waiting_start_command_ends_the_daemon_to_be_too(box: Box) -> None:
    starting = box.popen("start", box.script("log.info('importing')\ntime.sleep(600)\n"))
    box.await_log("importing")
    starting.terminate()
    said = starting.communicate(timeout=60)[0]
    assert (starting.returncode, "interrupted by SIGTERM" in said) == (1, True)
    assert list(box.run_dir.iterdir()) == []
    assert box.processes() == {}


def test_row_20_term_during_a_start_hook_ends_the_start_and_runs_the_stop_hooks(box: Box) -> None:
    gate = box.path / "gate"
    os.mkfifo(gate)
    text = "@on('start')\ndef begin():\n    mark('start hook')\n    open(sys.argv[1]).read()\n"
    starting = box.popen("start", box.script(HOOKS + text), gate)
    box.await_log("now in the start hook")
    os.kill(await_pid(box), signal.SIGTERM)
    gate.write_text("")
    said = starting.communicate(timeout=60)[0]
    assert (starting.returncode, "stopped before it was ready" in said) == (1, True)
    assert box.log.read_text().count("INFO test: stop hook") == 1
    assert list(box.run_dir.iterdir()) == []
    assert box.processes() == {}


IN_HAND = {
    "job": "@after(0.001)\ndef job():\n    mark('job')\n    time.sleep(0.3)\n    log.info('came to its end')\n",
    "signal handler": (
        "@on('SIGWINCH')\ndef handler():\n    mark('signal handler')\n    time.sleep(0.3)\n"
        "    log.info('came to its end')\n"
    ),
    "reload": "@on('reload')\ndef again():\n    mark('reload')\n    time.sleep(0.3)\n    log.info('came to its end')\n",
    "fork": (
        "@after(0.001)\ndef job():\n    mark('fork')\n    subprocess.run(['sleep', '0.3'], check=True)\n"
        "    log.info('came to its end')\n"
    ),
}


@pytest.mark.parametrize("what", IN_HAND)
def test_row_20_term_lets_what_is_in_hand_come_to_its_end_and_cleans_up(box: Box, what: str) -> None:
    pid = box.start(HOOKS + IN_HAND[what])
    for number in {"reload": [signal.SIGHUP], "signal handler": [signal.SIGWINCH]}.get(what, []):
        os.kill(pid, number)
    box.await_log(f"now in the {what}")
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    text = ended_gracefully(box)
    assert text.count("came to its end") == 1
    assert text.count("INFO test: stop hook") == 1
    assert text.index("came to its end") < text.index("INFO test: stop hook")


def test_row_20_term_while_a_fork_hangs_is_obeyed_within_graceful_timeout(box: Box) -> None:
    hangs = """
@after(0.001)
def job():
    child = subprocess.Popen(["sleep", "600"])
    try:
        mark("fork")
        child.wait()
    finally:
        child.kill()
        child.wait()
"""
    pid = box.start(HOOKS + hangs, "--graceful-timeout", "0.3")
    box.await_log("now in the fork")
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    assert "INFO test: stop hook" in ended_gracefully(box)


def test_row_20_term_while_an_upgrade_is_tried_stops_the_daemon_and_the_trial(box: Box) -> None:
    pid = box.start(HOOKS)
    box.script(f"open('{box.path}/trial', 'w').write('begun\\n')\ntime.sleep(600)\n")
    os.kill(pid, signal.SIGUSR2)
    box.await_file(box.path / "trial", "begun")
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    assert "INFO test: stop hook" in ended_gracefully(box)


def test_row_20_term_during_a_stop_hook_ends_the_daemon_at_once_and_cleans_up(box: Box) -> None:
    pid = box.start(
        "@every(3600)\ndef beat(): pass\n@on('stop')\ndef stop():\n    log.info('hook')\n    time.sleep(600)\n"
    )
    os.kill(pid, signal.SIGTERM)
    box.await_log("INFO test: hook")
    os.kill(pid, signal.SIGTERM)
    await_end(pid)
    ended_gracefully(box)


@pytest.mark.parametrize("delay", [0, 0.03, 0.06, 0.1])
def test_row_20_term_at_any_moment_of_a_start_leaves_nothing_behind(box: Box, delay: float) -> None:
    script = box.script(HOOKS)
    starting = box.popen("start", script)
    pid = await_pid(box)
    time.sleep(delay)  # the moment at which the fault comes
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    said = starting.communicate(timeout=60)[0]
    assert starting.returncode in (0, 1), said
    assert "Traceback" not in said
    await_end(pid)
    assert list(box.run_dir.iterdir()) == []
    assert box.processes() == {}
