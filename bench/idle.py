"""What a daemon with one job a minute costs between its due times, beside a bare Python that only waits."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

import peers
from rig import DAEMONKIT, PYTHON, as_a_user, box, cost, goal, running, table

SETTLING = 4.0  # seconds
DAEMONKIT_SCRIPT = """
from daemonkit import every

@every(60)
def work():
    pass
"""
BARE = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
signal.setitimer(signal.ITIMER_REAL, 60, 60)
while True:
    signal.sigwait({signal.SIGALRM})
"""
APSCHEDULER = """
from apscheduler.schedulers.blocking import BlockingScheduler
scheduler = BlockingScheduler(timezone="UTC")
scheduler.add_job(lambda: None, "interval", seconds=60)
scheduler.start()
"""
SCHEDULE = """
import schedule, time
schedule.every(60).seconds.do(lambda: None)
while True:
    schedule.run_pending()
    time.sleep(1)
"""


def main() -> None:
    """All idle at once, so that all share the interpreter's memory alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    seconds = parser.parse_args().seconds
    as_a_user()
    with box() as path, ExitStack() as stack:
        pids = {
            name: stack.enter_context(running(*command, quiet=True)).pid for name, command in commands(path).items()
        }
        time.sleep(SETTLING)
        before = {name: cost(pid) for name, pid in pids.items()}
        time.sleep(seconds)
        after = {name: cost(pid) for name, pid in pids.items()}
    rows = [
        [
            name,
            now.processes,
            (now.switches - before[name].switches) / seconds,
            now.pss / 1e6,
            (now.cpu - before[name].cpu) / seconds * 86400,
        ]
        for name, now in after.items()
    ]
    table(f"One job a minute, {seconds:g} s", ("", "processes", "wake-ups/s", "PSS, MB", "CPU seconds a day"), rows)
    goal("processes", after["daemonkit"].processes, 1)
    goal("wake-ups between due times", after["daemonkit"].switches - before["daemonkit"].switches, 0)
    goal("PSS / bare Python", after["daemonkit"].pss / after["bare Python"].pss, 3)


def commands(path: Path) -> dict[str, list[str]]:
    """Who is idle."""
    (path / "idle.py").write_text(DAEMONKIT_SCRIPT)
    peers.supervisor(path)
    return {
        "daemonkit": [DAEMONKIT, "run", str(path / "idle.py")],
        "bare Python": [PYTHON, "-c", BARE],
        "supervisord": [peers.SUPERVISORD, "-c", str(path / "supervisord.conf")],
        "APScheduler": [PYTHON, "-c", APSCHEDULER],
        "schedule": [PYTHON, "-c", SCHEDULE],
    }


if __name__ == "__main__":
    peers.require()
    main()
