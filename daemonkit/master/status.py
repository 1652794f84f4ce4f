"""What the daemon says of itself, as data: for ``status``, and for the log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from daemonkit.core.job import Job

if TYPE_CHECKING:
    from daemonkit.master.master import Master


def describe(master: Master) -> dict[str, Any]:
    """The daemon's status; times in seconds, moments in seconds since the epoch."""
    handover, sink = master.parts.handover, master.parts.sink
    return {
        "name": handover.name,
        "state": "stopping" if master.is_stopping else "running" if master.ready_at else "starting",
        "pid": os.getpid(),
        "since": master.ready_at,
        "script": handover.script,
        "memory": _memory(),
        "cpu": round(sum(os.times()[:2]), 2),
        "log": sink.path or ("journal" if sink.journal else "stderr"),
        "log_lost": sink.lost,
        "python": sys.version.split()[0],
        "config": master.configuration.config_path,
        "jobs": describe_jobs(master.script.jobs.values()),
        "children": master.crew.describe() if master.crew else [],
        "cluster": master.leading.describe() if master.leading else None,
    }


def describe_jobs(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """One object a job."""
    offset = time.time_ns() - time.monotonic_ns()
    return [_job(job, offset) for job in jobs]


def describe_child(
    name: str,
    pid: int | None,
    state: str,
    since: float | None,
    restarts: int = 0,
    last: str | None = None,
    doing: str | None = None,
) -> dict[str, Any]:
    """One process under the master; ``last``: how the one before it ended, ``doing``: what it says of itself."""
    return {
        "name": name,
        "pid": pid,
        "state": state,
        "since": since,
        "restarts": restarts,
        "last": last,
        "doing": doing,
    }


def _job(job: Job, offset: int) -> dict[str, Any]:
    record = job.record
    is_standby = job.gate is not None and not job.gate()
    state = "done" if job.planned is None else "paused" if job.paused else "standby" if is_standby else "waiting"
    return {
        "name": job.name,
        "when": job.when,
        "state": state,
        "last_run": record.last_started / 1e9 if record.runs else None,
        "next_run": None if job.planned is None or job.paused or is_standby else (job.planned + offset) / 1e9,
        "duration": record.last_duration / 1e9,
        "lateness": record.lateness / 1e9,
        "max_lateness": record.max_lateness / 1e9,
        "runs": record.runs,
        "failures": record.failures,
        "missed": record.missed,
        "last_error": record.last_error,
        "receipt": record.receipt,
    }


def _memory() -> int:
    """Resident bytes (proc(5), statm)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
