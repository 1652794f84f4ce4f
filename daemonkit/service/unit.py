"""The texts of a systemd unit and of an LSB init script for one script."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from daemonkit.config import COMMAND_LINE, DEFAULT, ENVIRONMENT, Configuration, defaults
from daemonkit.config.file import SYSTEM_FILE
from daemonkit.config.options import BY_KEY, MODE, OPTIONS, SCHEDULE, Option, Options, stop_schedule_as_text

NOTIFY_RELOAD: Final = 253  # the first systemd with Type=notify-reload (systemd.service(5))
MARGIN: Final = 10.0  # seconds that the manager allows on top of the daemon's own bounds
WATCHDOG: Final = 60.0  # seconds, unless a job may take longer to finish
HOMES: Final = ("/home/", "/root/", "/run/user/")  # what ProtectHome= hides
TEMPORARY: Final = ("/tmp/", "/var/tmp/")  # what PrivateTmp= hides
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@+=:,./-")


class Spec(NamedTuple):
    """What is to be run, and how."""

    name: str
    command: Sequence[str]  # how the command is called: its path, or python -m daemonkit
    flags: Sequence[str]  # options that differ from the defaults
    target: Sequence[str]  # the script and its arguments
    options: Options
    systemd: int = 252
    reads: Sequence[str] = ()  # what else it must be able to read: its interpreter, its configuration
    logs_to_file: bool = False


def specify(name: str, target: str, is_module: bool, args: Sequence[str], configuration: Configuration) -> Spec:
    """Describe the daemon ``name`` that runs ``target`` on this machine.

    What the command line and the environment ask for becomes flags, and so does the name of a configuration file that
    would not be found from ``/``.

    Args:
        name: the daemon's name.
        target: the script's absolute path, or the module's name.
        is_module: which of the two it is.
        args: the script's own arguments.
        configuration: the configuration in force.
    """
    words, config_path = ["-m", target] if is_module else [target], configuration.config_path
    reads = [sys.prefix, os.path.realpath(sys.executable), *([config_path] if config_path else [])]
    flags, options = _flags(configuration), _as_root(configuration)
    return Spec(name, _command(), flags, [*words, *args], options, systemd_version(), reads, "--log" in flags)


def _as_root(configuration: Configuration) -> Options:
    """The options with root's default directories: whoever prints the text, a service manager starts it as root."""
    options, root = configuration.options, defaults(0)
    own = {key for key in ("run_dir", "log") if configuration.sources[key] == DEFAULT}
    return Options({o.key: getattr(root if o.key in own else options, o.key) for o in OPTIONS})


def _flags(configuration: Configuration) -> list[str]:
    flags = []
    if configuration.config_path not in (None, SYSTEM_FILE):
        flags += ["--config", str(configuration.config_path)]
    for key, source in configuration.sources.items():
        value = getattr(configuration.options, key)
        if source in (COMMAND_LINE, ENVIRONMENT) and value is not None:
            flags += [BY_KEY[key].flag, _as_text(BY_KEY[key], value)]
    return flags


def _as_text(option: Option[Any], value: Any) -> str:
    """A parsed value as it is written on a command line."""
    if option.kind is MODE:
        return f"{value:03o}"
    if option.kind is SCHEDULE:
        return stop_schedule_as_text(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


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
    capabilities = "CAP_SETUID CAP_SETGID CAP_CHOWN" if options.user or options.group else ""
    writable = [] if options.run_dir.startswith("/run/") else [options.run_dir]
    logs = os.path.dirname(options.log)
    if spec.logs_to_file and logs != "/var/log/daemonkit":
        writable.append(logs)
    return _UNIT.format(
        name=_escaped(spec.name),
        type="notify-reload" if notify_reload else "notify",
        run=run,
        # "+": the daemon may run as another user by then, and the sandbox has no power over that one
        reload="" if notify_reload else f"ExecReload=+{reload}\n",
        state=_state_directory(spec),
        watchdog=round(max(WATCHDOG, 2 * options.graceful_timeout)),
        start=round(options.ready_timeout + MARGIN),
        stop=round(options.graceful_timeout + 5 + MARGIN),
        umask=f"{options.umask:04o}",
        runtime=_RUNTIME.format(_unit_word(options.run_dir[5:])) if options.run_dir.startswith("/run/") else "",
        writable="".join(f"ReadWritePaths={_unit_word(path)}\n" for path in writable),
        home="read-only" if _reads_any(spec, HOMES) else "yes",
        temporary="no" if _reads_any(spec, TEMPORARY) else "yes",
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
        flags=shlex.join(_without(spec.flags, "--name", "--run-dir")),
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


def _state_directory(spec: Spec) -> str:
    """A directory that lasts.  systemd would give its own kind to root, as whom the daemon starts."""
    options, path = spec.options, f"/var/lib/daemonkit/{_escaped(spec.name)}"
    if not options.user and not options.group:
        return f"StateDirectory={path.removeprefix('/var/lib/')}\n"
    owner = [*(["-o", options.user] if options.user else []), *(["-g", options.group] if options.group else [])]
    make = " ".join(_unit_word(word) for word in ["/usr/bin/install", "-d", *owner])
    return f"ExecStartPre=+{make} {path}\nEnvironment=STATE_DIRECTORY={path}\nReadWritePaths=-{path}\n"


def _reads_any(spec: Spec, tops: tuple[str, ...]) -> bool:
    return any(word.startswith(tops) for word in (*spec.command, *spec.flags, *spec.target, *spec.reads))


def _without(flags: Sequence[str], *unwanted: str) -> list[str]:
    """``flags``, which are pairs of flag and value, without those that the init script gives itself."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for flag, value in pairs if flag not in unwanted for word in (flag, value)]


def _command() -> list[str]:
    """The installed command beside this interpreter, or the interpreter itself."""
    beside = os.path.join(os.path.dirname(sys.executable), "daemonkit")
    return [beside] if os.access(beside, os.X_OK) else [sys.executable, "-m", "daemonkit"]


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _unit_word(word: str) -> str:
    """One word of a command line as systemd reads it (systemd.service(5), "Command lines")."""
    word = word.replace("%", "%%").replace("$", "$$")
    if word and _PLAIN.issuperset(word.replace("%%", "").replace("$$", "")):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


_RUNTIME: Final = "RuntimeDirectory={}\nRuntimeDirectoryMode=0755\nRuntimeDirectoryPreserve=yes\n"
_UNIT: Final = """\
[Unit]
Description={name}, a daemon under daemonkit
After=network.target

[Service]
Type={type}
NotifyAccess=main
ExecStart={run}
{reload}Restart=on-failure
# Seldom enough for systemd's start limit: what a start lacks, a database say, may be there in an hour.
RestartSec=5
# More than any one job may take: the daemon is killed and restarted if its loop stands still for so long.
WatchdogSec={watchdog}
SyslogIdentifier={name}
TimeoutStartSec={start}
TimeoutStopSec={stop}
KillMode=mixed
UMask={umask}
{runtime}LogsDirectory=daemonkit
{state}{writable}
# What a daemon of this kind does not need.  Loosen what yours does.
CapabilityBoundingSet={capabilities}
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
PrivateDevices=yes
PrivateTmp={temporary}
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

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
NAME={name}
SCRIPT={script}
RUN_DIR={run_dir}
ENABLED=yes

# What runs this script is watched, not the daemon: with these it would take itself for the service and not fork.
unset NOTIFY_SOCKET INVOCATION_ID

# May set ENABLED=no, and DAEMONKIT_* variables with export.
# shellcheck source=/dev/null
[ ! -r "/etc/default/$NAME" ] || . "/etc/default/$NAME"

# Where systemd runs, this hands the action to systemctl: the unit that it makes of this script is to know of it.
# shellcheck source=/dev/null
[ ! -r /lib/lsb/init-functions ] || . /lib/lsb/init-functions

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
