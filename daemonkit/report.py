"""What a daemon says of itself, as data and as text."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from daemonkit.core.duration import describe as duration

if TYPE_CHECKING:
    from daemonkit.core.job import Job
    from daemonkit.master.master import Master

Status = Mapping[str, Any]


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


def as_text(status: Status, name: str) -> str:
    """The status for people."""
    lines = [f"{status.get('name') or name}: {status['state']}, pid {status['pid']}"]
    if status.get("since"):
        lines[0] += f", since {_moment(status['since'])} ({_ago(status['since'])})"
    if "memory" in status:
        lines.append(
            f"  memory {status['memory'] / 1048576:.1f} MB, cpu {status['cpu']:.2f} s, script {status['script']}"
        )
        lost = f", {status['log_lost']} lines lost" if status["log_lost"] else ""
        lines.append(f"  log {status['log']}{lost}")
    if status.get("busy"):
        lines.append(f"  busy: {status['busy']}")
    if status.get("note"):
        lines.append(f"  {status['note']}")
    if status.get("cluster"):
        lines += cluster_as_text(status["cluster"])
    if status.get("children"):
        lines += ["", *children_as_text(status["children"])]
    if status.get("jobs"):
        lines += ["", *jobs_as_text(status["jobs"])]
    return "\n".join(lines)


def jobs_as_text(jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """A table of the jobs, then the last error of those that failed."""
    rows = [("JOB", "WHEN", "LAST RUN", "NEXT RUN", "LATE", "RUNS", "FAILED", "MISSED")]
    errors = []
    for job in jobs:
        upcoming = _moment(job["next_run"]) if job["next_run"] else job["state"]
        last = _moment(job["last_run"]) if job["last_run"] else "-"
        late = f"{job['lateness'] * 1000:.1f} ms" if job["runs"] else "-"
        counts = (str(job["runs"]), str(job["failures"]), str(job["missed"]))
        rows.append((job["name"], job["when"], last, upcoming, late, *counts))
        if job["last_error"]:
            errors.append(f"  {job['name']}: last error: {job['last_error']}")
        if job["receipt"]:
            errors.append(f"  {job['name']}: last process: {job['receipt']}")
    return _table(rows) + errors


def cluster_as_text(cluster: Mapping[str, Any]) -> list[str]:
    """Its place in the cluster."""
    token = f", token {cluster['token']}" if cluster["token"] else ""
    session = f", session {cluster['session']}" if cluster["session"] else ""
    lines = [f"  cluster: {cluster['role']}{token}{session}, {cluster['state']}, {cluster['coordinator']}"]
    if cluster["error"]:
        lines.append(f"  cluster: {cluster['error']}")
    if (leader := cluster["leader"]) and not cluster["token"]:
        since = f"since {_moment(leader['since'])}, token {leader['token']}"
        lines.append(f"  led by pid {leader['pid']} on {leader['host']}, {since}")
    if cluster["peers"]:
        there = ", ".join(f"{peer['host']}:{peer['pid']}" for peer in cluster["peers"])
        lines.append(f"  peers: {there}")
    return lines


def children_as_text(children: Iterable[Mapping[str, Any]]) -> list[str]:
    """A table of the processes under the master, what they say of themselves, how the last of each ended."""
    rows = [("CHILD", "PID", "STATE", "SINCE", "RESTARTS")]
    ends = []
    for child in children:
        since = _moment(child["since"]) if child["since"] else "-"
        rows.append((child["name"], str(child["pid"] or "-"), child["state"], since, str(child["restarts"])))
        if child.get("doing"):
            ends.append(f"  {child['name']}: {child['doing']}")
        if child["last"]:
            ends.append(f"  {child['name']}: last end: {child['last']}")
    return _table(rows) + ends


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _memory() -> int:
    """Resident bytes (proc(5), statm)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _moment(seconds: float) -> str:
    local = time.localtime(round(seconds, 3))
    same_day = local[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S", local)


def _ago(seconds: float) -> str:
    return duration(max(0, round(time.time() - seconds)))
