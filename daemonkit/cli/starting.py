"""From a command line to a handover: shared by start, run and restart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from daemonkit import config, loader
from daemonkit.cli.common import Preset, target_of, working_directory
from daemonkit.config import options, trust
from daemonkit.core import board
from daemonkit.errors import StartError
from daemonkit.handover import Handover


class Request(NamedTuple):
    """What was asked for: a script, its arguments, and where its configuration comes from."""

    target: str
    args: list[str]
    command_line: dict[str, Any]
    environ: dict[str, str]
    script: Mapping[str, Any] | None
    config_path: str | None
    cwd: str
    script_name: str | None = None

    @property
    def name(self) -> str:
        """The daemon's name: as given, else as the script says, else the script's stem."""
        given = self.command_line.get("name") or self.environ.get("DAEMONKIT_NAME") or self.script_name
        return options.check_name(given or options.name_of(self.target))

    def configuration(self, script: Mapping[str, Any] | None = None) -> config.Configuration:
        """Read the configuration; ``script`` are the options that the loaded script declares."""
        return config.load(
            self.name,
            command_line=self.command_line,
            environ=self.environ,
            script=script or self.script,
            config_path=self.config_path,
            cwd=self.cwd,
        )


def request_of(
    ctx: click.Context, module: str | None, args: tuple[str, ...], flags: Mapping[str, Any], config_path: str | None
) -> Request:
    """The request on the command line."""
    preset = ctx.obj if isinstance(ctx.obj, Preset) else None
    target, rest = target_of(ctx, module, args)
    return Request(
        target,
        rest,
        command_line={key: value for key, value in flags.items() if value is not None},
        environ=config.relevant(os.environ),
        script=preset.options if preset else None,
        config_path=config_path,
        cwd=working_directory(),
        script_name=preset.name if preset else None,
    )


def prepare(request: Request) -> tuple[Handover, options.Options]:
    """Check everything that can be checked before a process is started, and make the run directory.

    Raises:
        ScriptError, ConfigError, UsageError, UntrustedFile, RunDirectoryError: as their names say.
    """
    path, is_module = loader.find(request.target)
    loaded = request.configuration()
    if os.geteuid() == 0:
        for file in filter(None, (loaded.config_path, *loader.files_of(path, is_module, request.cwd))):
            trust.check_trusted(file)
    trust.prepare_run_dir(loaded.options.run_dir, owner=loaded.options.user)
    _make_module_path_absolute(request.cwd)
    handover = Handover(
        name=request.name,
        target=path,
        is_module=is_module,
        args=request.args,
        cwd=request.cwd,
        command_line=request.command_line,
        environ=request.environ,
        config_path=loaded.config_path,
        script_options=dict(request.script or {}),
        run_dir=loaded.options.run_dir,
        uid=os.geteuid(),
        detached=True,
    )
    return handover, loaded.options


def _make_module_path_absolute(cwd: str) -> None:
    """The daemon has another working directory: a relative PYTHONPATH must not change its meaning."""
    if path := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join(os.path.join(cwd, part) for part in path.split(os.pathsep))


def say_running(handover: Handover, pid: int | None) -> None:
    """The answer to a start of what runs already: success, as LSB has it.

    Raises:
        StartError: it is another script that runs under this name.
    """
    name, running = handover.name, board.facts(pid).get("script") if pid else None
    if running is not None and not _is_same(running, handover):
        raise StartError(
            f"start {handover.script}: {name} is already running, pid {pid}, and it is {running}; "
            "give this one a name of its own with --name"
        )
    click.echo(f"{name} is already running, pid {pid}" if pid else f"{name} is already starting")


def _is_same(running: str, handover: Handover) -> bool:
    if handover.is_module or running.startswith("-m "):
        return running == handover.script
    return os.path.realpath(running) == os.path.realpath(handover.target)
