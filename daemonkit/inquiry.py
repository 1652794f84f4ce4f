"""What is true of a daemon, seen from outside: the lock first, its own word second, the kernel's where it is silent."""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

from daemonkit.core import asking, board
from daemonkit.core.holder import settled
from daemonkit.core.pidfile import holds, inspect
from daemonkit.errors import ControlError, DaemonkitError

RUNNING: Final = 0  # the exit codes of LSB, "Init Script Actions", status
DEAD: Final = 1
NOT_RUNNING: Final = 3
UNKNOWN: Final = 4

ANSWER_TIME: Final = 5.0  # seconds for a daemon that has nothing in hand
BUSY_TIME: Final = 0.5  # ... and for one that has


class Answer(NamedTuple):
    """A status and the exit code that says the same."""

    status: dict[str, Any]
    code: int


def inquire(name: str, pid_path: str, socket_path: str) -> Answer:
    """Find out about the daemon ``name``; raises nothing that is its state."""
    try:
        state = settled(pid_path)
        if not state.locked and os.path.exists(socket_path) and (found := _without_pid_file(socket_path)):
            return Answer(found, RUNNING)
        if not state.locked:
            return _not_running(name, pid_path, state.exists, state.pid)
        if state.pid is None:
            return Answer(_plain(name, "starting", None, note="its PID is not yet written"), RUNNING)
        if not holds(state.pid, pid_path):
            note = (
                f"{pid_path} is locked, but not by pid {state.pid}, which stands in it; find the holder with lslocks(8)"
            )
            return Answer(_plain(name, "unknown", None, note=note), UNKNOWN)
        return Answer(_of_running(name, state.pid, socket_path), RUNNING)
    except DaemonkitError as error:
        return Answer(_plain(name, "unknown", None, note=str(error)), UNKNOWN)


def _not_running(name: str, pid_path: str, exists: bool, pid: int | None) -> Answer:
    if not exists:
        return Answer(_plain(name, "not running", None), NOT_RUNNING)
    of = f" of pid {pid}" if pid else ""
    note = f"it died and left {pid_path}{of}; the next start or kill removes it"
    return Answer(_plain(name, "dead", None, note=note), DEAD)


def _of_running(name: str, pid: int, socket_path: str) -> dict[str, Any]:
    """Ask it; if it cannot answer, say what it is at."""
    seen = board.read(pid)
    if seen is None or seen.state == "starting":  # between exec and board there is nothing to see, too
        return _from_outside(name, pid, "starting", seen)
    try:
        answer = asking.ask(socket_path, {"do": "status"}, pid=pid, timeout=_answer_time(pid, seen))
    except ControlError as error:
        seen = board.read(pid)
        return _from_outside(name, pid, seen.state if seen else "running", seen, str(error))
    except DaemonkitError as error:
        return _plain(name, "running", pid, note=f"no details: {error}")
    answer.pop("ok", None)
    return answer


def _answer_time(pid: int, seen: board.Activity) -> float:
    """How long to wait for its word."""
    in_a_hurry = seen.state != "running" or seen.seconds > BUSY_TIME or _is_stopped(pid)
    return BUSY_TIME if in_a_hurry else ANSWER_TIME


def _from_outside(
    name: str, pid: int, state: str, seen: board.Activity | None, note: str | None = None
) -> dict[str, Any]:
    """What can be told without its word."""
    stopped, busy = _is_stopped(pid), seen is not None and seen.name
    status = _plain(name, "stopped by a signal" if stopped else state, pid, note=None if busy or stopped else note)
    if seen and busy:
        status["busy"] = f"{seen.name} for {seen.seconds:.1f} s"
    return status


def _without_pid_file(socket_path: str) -> dict[str, Any] | None:
    """A daemon whose PID file was deleted still answers, and restores the file when it is asked."""
    pid = asking.listener(socket_path)
    if pid is None:
        return None
    seen = board.read(pid)
    try:
        timeout = _answer_time(pid, seen) if seen else BUSY_TIME
        answer = asking.ask(socket_path, {"do": "status"}, pid=pid, timeout=timeout)
    except DaemonkitError:
        return None
    answer.pop("ok", None)
    restored = inspect(f"{socket_path.removesuffix('.sock')}.pid").locked
    answer["note"] = "its PID file had been deleted; it was restored" if restored else answer.get("note")
    return answer


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _plain(name: str, state: str, pid: int | None, note: str | None = None) -> dict[str, Any]:
    return {"name": name, "state": state, "pid": pid, "note": note, "jobs": []}
