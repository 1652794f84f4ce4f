"""What a daemon has said of itself, as text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daemonkit.core.duration import describe as duration

Status = Mapping[str, Any]


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


def _moment(seconds: float) -> str:
    local = time.localtime(round(seconds, 3))
    same_day = local[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S", local)


def _ago(seconds: float) -> str:
    return duration(max(0, round(time.time() - seconds)))
