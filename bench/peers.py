"""The same small daemon, written for daemonkit and for each of its peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rig import DAEMONKIT, PYTHON

SUPERVISORCTL = str(Path(PYTHON).with_name("supervisorctl"))
SUPERVISORD = str(Path(PYTHON).with_name("supervisord"))

# Each daemon writes when it began to work, and who it is; one line a daemon, so that two are seen.
_HEAD = """\
import os, signal, sys, time

def mark():
    with open({mark!r}, "a") as file:
        file.write(f"{{time.monotonic_ns()}} {{os.getpid()}}\\n")
"""
_DAEMONKIT = """
from daemonkit import every

{body}

@every(60, first=0)
def work():
    mark()
"""
_PYTHON_DAEMON = """
import daemon, daemon.pidfile

with daemon.DaemonContext(pidfile=daemon.pidfile.PIDLockFile({pid_path!r})):
    {body}
    mark()
    while True:
        signal.pause()
"""
_DAEMONOCLE = """
import daemonocle

def work():
    {body}
    mark()
    while True:
        signal.pause()

daemonocle.Daemon(name="beat", worker=work, pid_file={pid_path!r}).do_action(sys.argv[1])
"""
_PLAIN = """
{body}
mark()
while True:
    signal.pause()
"""
_SUPERVISORD = """
[unix_http_server]
file={box}/supervisor.sock
[supervisord]
nodaemon=true
logfile={box}/supervisord.log
pidfile={box}/supervisord.pid
childlogdir={box}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{box}/supervisor.sock
[program:beat]
command={python} {script}
autostart=false
"""


class Peer(NamedTuple):
    """How one kind of daemon is started, asked and stopped, and where it leaves its marks."""

    name: str
    start: list[str]
    status: list[str] | None
    stop: list[str]
    pid_path: Path
    mark_path: Path

    def pids(self) -> list[int]:
        """The daemons that have begun to work, dead ones too."""
        return [int(line.split()[1]) for line in self._marks()]

    def began_at(self) -> int:
        """When the first one began to work (monotonic nanoseconds)."""
        return int(self._marks()[0].split()[0])

    def forget(self) -> None:
        """Remove the marks."""
        self.mark_path.unlink(missing_ok=True)

    def _marks(self) -> list[str]:
        return self.mark_path.read_text().splitlines() if self.mark_path.exists() else []


def daemonkit(box: Path, body: str = "") -> Peer:
    """The script under the command."""
    script, mark = _script(box, "kit", _DAEMONKIT, body)
    command = [DAEMONKIT]
    return Peer(
        "daemonkit",
        [*command, "start", str(script)],
        [*command, "status", "kit"],
        [*command, "kill", "kit"],
        Path(os.environ["DAEMONKIT_RUN_DIR"], "kit.pid"),
        mark,
    )


def python_daemon(box: Path, body: str = "pass") -> Peer:
    """python-daemon has no command: its users send TERM to the number in the PID file."""
    script, mark = _script(box, "pythondaemon", _PYTHON_DAEMON, body)
    pid_path = box / "pythondaemon.pid"
    stop = ["sh", "-c", f"kill $(cat {pid_path})"]
    return Peer("python-daemon", [PYTHON, str(script)], None, stop, pid_path, mark)


def daemonocle(box: Path, body: str = "pass") -> Peer:
    """daemonocle's actions are arguments of the script."""
    script, mark = _script(box, "daemonocle_script", _DAEMONOCLE, body)
    command, pid_path = [PYTHON, str(script)], box / "daemonocle_script.pid"
    return Peer("daemonocle", [*command, "start"], [*command, "status"], [*command, "stop"], pid_path, mark)


def supervisor(box: Path, body: str = "") -> Peer:
    """supervisorctl, for a supervisord that runs with the file "supervisord.conf" in ``box``."""
    script, mark = _script(box, "plain", _PLAIN, body)
    conf = box / "supervisord.conf"
    conf.write_text(_SUPERVISORD.format(box=box, python=PYTHON, script=script))
    command = [SUPERVISORCTL, "-c", str(conf)]
    start, status, stop = ([*command, action, "beat"] for action in ("start", "status", "stop"))
    return Peer("supervisorctl", start, status, stop, box / "none.pid", mark)


WITH_PID_FILE: tuple[Callable[..., Peer], ...] = (daemonkit, python_daemon, daemonocle)


def _script(box: Path, name: str, text: str, body: str) -> tuple[Path, Path]:
    script, mark = box / f"{name}.py", box / f"{name}.mark"
    head = _HEAD.format(mark=str(mark))
    script.write_text(head + text.format(body=body, pid_path=str(box / f"{name}.pid")))
    return script, mark


def require() -> None:
    """Leave with one sentence if the peers are not installed."""
    try:
        import apscheduler
        import daemon
        import daemonocle
        import schedule
        import supervisor
    except ImportError as error:
        sys.exit(f"{error.name} is not installed; the figures need: pip install '.[bench]'")
    del apscheduler, daemon, daemonocle, schedule, supervisor
