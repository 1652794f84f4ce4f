"""The texts of a systemd unit and of an LSB init script for one script."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from daemonkit.config import defaults
from daemonkit.options import Options

NOTIFY_RELOAD: Final = 253  # the first systemd with Type=notify-reload (systemd.service(5))
MARGIN: Final = 10.0  # seconds that the manager allows on top of the daemon's own bounds
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@+=:,./-")


class Spec(NamedTuple):
    """What is to be run, and how."""

    name: str
    command: Sequence[str]  # how the command is called: its path, or python -m daemonkit
    flags: Sequence[str]  # options that differ from the defaults
    target: Sequence[str]  # the script and its arguments
    options: Options
    systemd: int = 252


def specify(
    name: str, target: str, is_module: bool, args: Sequence[str], options: Options, flags: Sequence[str]
) -> Spec:
    """Describe the daemon ``name`` that runs ``target`` on this machine.

    Args:
        name: the daemon's name.
        target: the script's absolute path, or the module's name.
        is_module: which of the two it is.
        args: the script's own arguments.
        options: the configuration in force.
        flags: the options as they are to be given to ``daemonkit run`` and ``start``.
    """
    words = ["-m", target] if is_module else [target]
    return Spec(name, _command(), flags, [*words, *args], options, systemd_version())


def systemd_version() -> int:
    """The machine's systemd, or the oldest that is served if it has none."""
    import subprocess

    if path := shutil.which("systemctl"):
        words = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.split()
        if len(words) > 1 and words[1].split(".")[0].isdigit():
            return int(words[1].split(".")[0])
    return 252


def systemd_unit(spec: Spec) -> str:
    """A hardened Type=notify unit (systemd.service(5), systemd.exec(5)).

    It starts as root and daemonkit drops to ``user`` itself, so that all daemons share one run directory, in which
    every ``status`` finds them.
    """
    options = spec.options
    run = " ".join(_unit_word(word) for word in [*spec.command, "run", *spec.flags, *spec.target])
    reload = " ".join(_unit_word(word) for word in [*spec.command, "reload", "--run-dir", options.run_dir, spec.name])
    notify_reload = spec.systemd >= NOTIFY_RELOAD
    home = "read-only" if any("/home/" in word or "/root/" in word for word in [run]) else "yes"
    capabilities = "CAP_SETUID CAP_SETGID CAP_CHOWN" if options.user or options.group else ""
    return _UNIT.format(
        name=spec.name,
        type="notify-reload" if notify_reload else "notify",
        run=run,
        # "+": the daemon may run as another user by then, and the sandbox has no power over that one
        reload="" if notify_reload else f"ExecReload=+{reload}\n",
        start=round(options.ready_timeout + MARGIN),
        stop=round(options.graceful_timeout + 5 + MARGIN),
        umask=f"{options.umask:04o}",
        run_name=os.path.basename(options.run_dir),
        writable="" if options.run_dir.startswith("/run/") else f"ReadWritePaths={_unit_word(options.run_dir)}\n",
        home=home,
        capabilities=capabilities,
    )


def initd_script(spec: Spec) -> str:
    """An LSB init script (Linux Standard Base, "Init Script Actions")."""
    options = spec.options
    return _INITD.format(
        name=spec.name,
        command=" ".join(shlex.quote(word) for word in spec.command),
        program=shlex.quote(spec.command[0]),
        run_dir=shlex.quote(options.run_dir),
        pid_path=f"{options.run_dir}/{spec.name}.pid",
        flags=" ".join(shlex.quote(word) for word in spec.flags),
        script=shlex.quote(spec.target[0] if spec.target[0] != "-m" else ""),
        target=" ".join(shlex.quote(word) for word in spec.target),
        timeout=round(options.graceful_timeout + 5 + MARGIN),
    )


def ready_made() -> dict[str, str]:
    """The files of ``etc/``: a template unit for any script in /etc/daemonkit, an init script for the example."""
    command, options = ["/usr/bin/daemonkit"], defaults(0)
    template = Spec("INSTANCE", command, ["--name", "INSTANCE"], ["/etc/daemonkit/INSTANCE.py"], options)
    example = Spec("heartbeat", command, [], ["/etc/daemonkit/heartbeat.py"], options)
    return {
        "systemd/daemonkit@.service": systemd_unit(template).replace("INSTANCE", "%i"),
        "init.d/heartbeat": initd_script(example),
    }


def _command() -> list[str]:
    """The installed command beside this interpreter, or the interpreter itself."""
    beside = os.path.join(os.path.dirname(sys.executable), "daemonkit")
    return [beside] if os.access(beside, os.X_OK) else [sys.executable, "-m", "daemonkit"]


def _unit_word(word: str) -> str:
    """One word of a command line as systemd reads it (systemd.service(5), "Command lines")."""
    word = word.replace("%", "%%").replace("$", "$$")
    if word and _PLAIN.issuperset(word.replace("%%", "").replace("$$", "")):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


_UNIT: Final = """\
[Unit]
Description={name}, a daemon under daemonkit
After=network.target

[Service]
Type={type}
NotifyAccess=main
ExecStart={run}
{reload}Restart=on-failure
RestartSec=1
WatchdogSec=60
TimeoutStartSec={start}
TimeoutStopSec={stop}
KillMode=mixed
UMask={umask}
RuntimeDirectory={run_name}
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
LogsDirectory=daemonkit
StateDirectory=daemonkit
{writable}
# What a daemon of this kind does not need.  Loosen what yours does.
CapabilityBoundingSet={capabilities}
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome={home}
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@resources

[Install]
WantedBy=multi-user.target
"""

_INITD: Final = """\
#!/bin/sh
### BEGIN INIT INFO
# Provides:          {name}
# Required-Start:    $remote_fs $syslog
# Required-Stop:     $remote_fs $syslog
# Should-Start:      $network $named $time
# Should-Stop:       $network $named $time
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: {name}, a daemon under daemonkit
# Description:       Starts, stops and watches {name} with daemonkit(1).
### END INIT INFO
# pidfile: {pid_path}

PATH=/sbin:/usr/sbin:/bin:/usr/bin
NAME={name}
SCRIPT={script}
RUN_DIR={run_dir}
ENABLED=yes

# May set ENABLED=no, and DAEMONKIT_* variables with export.
# shellcheck source=/dev/null
[ ! -r "/etc/default/$NAME" ] || . "/etc/default/$NAME"

daemonkit() {{
    {command} "$@"
}}

# LSB exit codes: 0 done, 1 failed, 2 wrong action, 4 not allowed, 5 not installed, 6 not configured, 7 not running
usable() {{
    [ -x {program} ] || {{ echo "$NAME: {command} is not installed" >&2; exit 5; }}
    [ -z "$SCRIPT" ] || [ -r "$SCRIPT" ] || {{ echo "$NAME: $SCRIPT is not installed" >&2; exit 5; }}
    [ "$ENABLED" = yes ] || {{ echo "$NAME: switched off in /etc/default/$NAME" >&2; exit 6; }}
}}

may() {{
    [ "$(id -u)" = 0 ] || {{ echo "$NAME: only root may do that" >&2; exit 4; }}
}}

start() {{
    daemonkit start --name "$NAME" --run-dir "$RUN_DIR" {flags} {target}
}}

stop() {{
    daemonkit kill --timeout {timeout} --run-dir "$RUN_DIR" "$NAME"
}}

running() {{
    daemonkit status --run-dir "$RUN_DIR" "$NAME" >/dev/null 2>&1
}}

case "${{1:-}}" in
    start)
        may
        usable
        start
        ;;
    stop)
        may
        stop
        ;;
    restart)
        may
        usable
        stop && start
        ;;
    try-restart)
        may
        running || exit 0
        usable
        stop && start
        ;;
    reload | force-reload)
        may
        usable
        daemonkit reload --run-dir "$RUN_DIR" "$NAME"
        ;;
    status)
        daemonkit status --run-dir "$RUN_DIR" "$NAME"
        ;;
    *)
        echo "usage: $0 {{start|stop|restart|try-restart|reload|force-reload|status}}" >&2
        exit 2
        ;;
esac
"""
