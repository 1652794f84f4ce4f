"""daemonkit restart"""

from __future__ import annotations

import os
from typing import Any

import click

from daemonkit import ending
from daemonkit.cli import starting
from daemonkit.cli.common import TIMEOUT, Preset, configuration_options, place_of, target_argument
from daemonkit.core.holder import foreign_uid
from daemonkit.errors import AlreadyRunning, ControlError, DaemonkitError, NotRunning, UsageError
from daemonkit.handover import Handover


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--timeout", type=TIMEOUT, metavar="SECONDS", help="Send KILL after this long.  [default: see stop_schedule]"
)
@configuration_options()
@target_argument
@click.pass_context
def command(
    ctx: click.Context,
    /,
    module: str | None,
    args: tuple[str, ...],
    config_path: str | None,
    timeout: float | None,
    **options: Any,
) -> None:
    """Stop it and start it again.

    Given a NAME, a running daemon is started with the arguments that it was started with.  Given a SCRIPT, it is
    started with those given now, whether it runs or not.  What can be checked is checked before it is stopped.

    \b
      daemonkit restart heartbeat
      daemonkit restart heartbeat.py
    """
    from daemonkit import launch

    given = args[0] if args else None
    by_name = (
        not isinstance(ctx.obj, Preset) and module is None and given and not given.endswith(".py") and "/" not in given
    )
    if by_name:
        handover, chosen = _as_before(ctx, str(given), options.get("run_dir"), config_path)
    else:
        handover, chosen = starting.prepare(starting.request_of(ctx, module, args, options, config_path))
    schedule = chosen.stop_schedule if timeout is None else ending.schedule(timeout)
    how = ending.end(handover.pid_path, handover.socket_path, schedule)
    click.echo(f"{handover.name} {how}")
    try:
        pid = launch.start(handover, chosen)
    except AlreadyRunning as error:
        starting.say_running(handover, error.pid)
        return
    click.echo(f"{handover.name} is running, pid {pid}")


def _as_before(ctx: click.Context, name: str, run_dir: str | None, config_path: str | None) -> tuple[Handover, Any]:
    """How the running daemon was started."""
    place = place_of(ctx, name, None, run_dir, config_path)
    try:
        # Who takes over a daemon without privileges gets no more by telling us what to start.
        if uid := foreign_uid(place.pid()):
            raise ControlError(f"restart {name}: it runs as uid {uid}, whose word on what to start is not taken")
        launched = place.ask("launch")
    except NotRunning as error:
        raise NotRunning(f"{error}; to start it, name its script") from None
    except DaemonkitError as error:
        raise type(error)(f"{error}; name its script to restart it all the same") from None
    if not launched["detached"]:
        raise UsageError(f"restart {name}: it runs in front of a supervisor or a terminal; restart it there")
    target = f"-m {launched['target']}" if launched["is_module"] else launched["target"]
    request = starting.Request(
        target,
        launched["args"],
        command_line={**launched["command_line"], "name": name, "run_dir": place.run_dir},
        environ=launched["environ"],
        script=launched["script_options"],
        config_path=launched["config_path"],
        cwd=launched["cwd"] if os.path.isdir(launched["cwd"]) else "/",
    )
    return starting.prepare(request)
