"""What the subcommands share: options made from the configuration's fields, and who is meant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import click

from daemonkit import config
from daemonkit.config import options
from daemonkit.core.pidfile import State, inspect
from daemonkit.errors import NotRunning, ScriptError, UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

TIMEOUT = click.FloatRange(0, 1_000_000)  # seconds
SOCKET_TIME = 10.0  # seconds that a daemon may take from its lock to its socket
AFFIRMED = "green"
ALARMED = "red"


class Preset(NamedTuple):
    """A script that is its own command: what others must name is known."""

    target: str
    name: str | None
    options: Mapping[str, Any]


class Place(NamedTuple):
    """A daemon's name and where its files are."""

    name: str
    run_dir: str
    config_path: str | None = None  # the configuration file that was named on the command line
    preset: Preset | None = None

    @property
    def pid_path(self) -> str:
        """The PID file."""
        return os.path.join(self.run_dir, f"{self.name}.pid")

    @property
    def socket_path(self) -> str:
        """The control socket."""
        return os.path.join(self.run_dir, f"{self.name}.sock")

    def state(self) -> State:
        """What the PID file says."""
        return inspect(self.pid_path)

    def pid(self) -> int:
        """The PID of the running daemon.

        Raises:
            NotRunning: it is not.
        """
        from daemonkit.core.holder import settled

        state = settled(self.pid_path)
        if not state.locked or state.pid is None:
            raise NotRunning(f"{self.name} is not running (no lock on {self.pid_path}){self._others()}")
        return state.pid

    def configuration(self) -> config.Configuration:
        """Its configuration, as ``start`` would find it."""
        return _load(self.preset, self.name, self.config_path)

    def ask(self, request: str, timeout: float = 5.0, **arguments: Any) -> dict[str, Any]:
        """Send the running daemon a request; its refusal is raised.

        Raises:
            NotRunning: it is not.
            ControlError: it did not answer, or answered with an error.
        """
        from daemonkit.core import asking
        from daemonkit.errors import ControlError

        pid = self.pid()
        if not os.path.exists(self.socket_path):  # it has just begun
            from daemonkit.core.inotify import wait_until

            wait_until(self.run_dir, lambda: os.path.exists(self.socket_path) or None, min(timeout, SOCKET_TIME))
        answer = asking.ask(self.socket_path, {"do": request, **arguments}, pid=pid, timeout=timeout)
        if not answer.get("ok"):
            raise ControlError(f"{self.name}: {answer.get('error', 'refused')}")
        return answer

    def _others(self) -> str:
        from difflib import get_close_matches

        near = get_close_matches(self.name, names_in(self.run_dir), 1)
        return f"; did you mean {near[0]!r}?" if near and near[0] != self.name else ""


def ensure_standard_streams() -> None:
    """Put /dev/null on a closed 0, 1 or 2 before anything of ours is opened there."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        from daemonkit.core.daemonize import open_standard_streams

        open_standard_streams()


def configuration_options(*only: str) -> Callable[[Command], Command]:
    """Add ``--config`` and one flag for each option of the configuration (or for those named)."""

    def decorate(function: Command) -> Command:
        for option in reversed(options.OPTIONS):
            if not only or option.key in only:
                function = click.option(option.flag, option.key, metavar=option.metavar, help=option.doc)(function)
        return click.option("--config", "config_path", metavar="FILE", help="Read this configuration file.")(function)

    return decorate


def target_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add SCRIPT (or -m MODULE, or --exec and a program) and the script's own arguments."""

    @wraps(function)
    def resolved(*args: Any, **values: Any) -> Any:
        if values.pop("is_program"):
            values |= _program(values)
        return function(*args, **values)

    made = click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT [ARG]...")(resolved)
    made = click.option("--exec", "is_program", is_flag=True, help="Keep a program alive, in place of a script.")(made)
    return click.option("-m", "module", metavar="MODULE", help="Load a module as the script, as python -m does.")(made)


def name_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add NAME, which may be a SCRIPT, and what tells where to look for it; the command is given its Place."""

    @click.pass_context
    @wraps(function)
    def resolved(ctx: click.Context, /, *args: Any, **values: Any) -> Any:
        given = [values.pop(key) for key in ("name", "module", "run_dir", "config_path")]
        return function(place_of(ctx, *given), *args, **values)

    return name_options(resolved)


def job_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add NAME and JOB; where the daemon is known, by -m or as the script itself, the first word is the job."""

    @click.pass_context
    @wraps(function)
    def resolved(ctx: click.Context, /, *args: Any, **values: Any) -> Any:
        name, module, run_dir, config_path, job = (
            values.pop(key) for key in ("name", "module", "run_dir", "config_path", "job")
        )
        if job is None and (module is not None or isinstance(ctx.obj, Preset)):
            name, job = None, name
        return function(place_of(ctx, name, module, run_dir, config_path), job, *args, **values)

    return name_options(click.argument("job", required=False)(resolved))


def name_options(function: Command) -> Command:
    """Add NAME, -m, --run-dir and --config."""
    function = click.argument("name", required=False, shell_complete=_complete_names)(function)
    function = click.option("-m", "module", metavar="MODULE", help="The daemon that runs this module.")(function)
    return configuration_options("run_dir")(function)


def _program(values: dict[str, Any]) -> dict[str, Any]:
    """What --exec makes of the rest of the command line: a module of ours that runs the program."""
    from shutil import which

    if values["module"] is not None:
        raise click.UsageError("--exec and -m exclude each other.")
    if not values["args"]:
        raise click.UsageError("Missing PROGRAM after --exec --.")
    program, *rest = values["args"]
    path = which(program)
    if path is None:
        raise ScriptError(f"{program}: no such program, or one that may not be executed")
    path = os.path.abspath(path)
    if os.geteuid() == 0:
        from daemonkit.config.trust import check_trusted

        check_trusted(path)
    name = values.get("name") or os.environ.get("DAEMONKIT_NAME") or options.name_of(path)
    return {"module": "daemonkit.exec", "args": (path, *rest), "name": name}


def target_of(ctx: click.Context, module: str | None, args: tuple[str, ...]) -> tuple[str, list[str]]:
    """The script and its arguments, from the command line or from the script that is running."""
    if isinstance(ctx.obj, Preset):
        return ctx.obj.target, list(args)
    if module is not None:
        return f"-m {module}", list(args)
    if not args:
        raise click.UsageError("Missing argument 'SCRIPT'.", ctx)
    return args[0], list(args[1:])


def place_of(
    ctx: click.Context, name: str | None, module: str | None, run_dir: str | None, config_path: str | None
) -> Place:
    """The daemon that is meant.  The configuration is read only if the run directory is not given."""
    preset = ctx.obj if isinstance(ctx.obj, Preset) else None
    if name is None and module is not None:
        name = options.name_of(f"-m {module}")
    if name is None and preset is not None:
        name = preset.name or options.name_of(preset.target)
    if name is None:
        raise click.UsageError("Missing argument 'NAME'.", ctx)
    if name.endswith(".py") or "/" in name:
        name = options.name_of(name)
    return Place(options.check_name(name), run_dir_of(preset, name, run_dir, config_path), config_path, preset)


def run_dir_of(preset: Preset | None, name: str | None, run_dir: str | None, config_path: str | None) -> str:
    """The run directory, as ``start`` would find it."""
    given = run_dir or (os.environ.get("DAEMONKIT_RUN_DIR") if config_path is None else None)
    if given:
        return os.path.abspath(given)
    return _load(preset, name, config_path).options.run_dir


def working_directory() -> str:
    """Where the command was called; / if that was deleted under us, for nothing relative can be meant then."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def configured(ctx: click.Context, given: Mapping[str, str | None], config_path: str | None) -> options.Options:
    """The options that hold for a command that is about no daemon: those ``given``, the environment's, the file's."""
    preset = ctx.find_object(Preset)
    found = config.load(
        preset.name if preset else None,
        command_line={key: value for key, value in given.items() if value is not None},
        environ=os.environ,
        script=preset.options if preset else None,
        config_path=config_path,
        cwd=working_directory(),
    )
    return found.options


def _load(preset: Preset | None, name: str | None, config_path: str | None) -> config.Configuration:
    return config.load(
        name,
        command_line={},
        environ=os.environ,
        script=preset.options if preset else None,
        config_path=config_path,
        cwd=working_directory(),
    )


def names_in(run_dir: str) -> list[str]:
    """The names of the daemons that have, or left, a PID file in ``run_dir``."""
    try:
        return sorted(entry.removesuffix(".pid") for entry in os.listdir(run_dir) if entry.endswith(".pid"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"read {run_dir}: {error.strerror}; choose another --run-dir") from None


def _complete_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    run_dir = run_dir_of(None, None, ctx.params.get("run_dir"), ctx.params.get("config_path"))
    return [name for name in names_in(run_dir) if name.startswith(incomplete)]


def as_json(value: Any) -> None:
    """Print ``value`` for programs."""
    import json

    click.echo(json.dumps(value, indent=2))


def answer(json_wanted: bool, value: Any, words: str) -> None:
    """Print what was done: ``value`` for programs, or ``words`` for people."""
    if json_wanted:
        as_json(value)
    else:
        click.echo(words)


json_option = click.option("--json", "json_wanted", is_flag=True, help="Print it for programs.")


def as_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print ``rows`` for people, each column as wide as need be."""
    lines = [head, *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(words: str) -> str:
    """What others have written, without what a terminal would obey."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in words)
