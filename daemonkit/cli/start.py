"""daemonkit start"""

from __future__ import annotations

import os
from typing import Any

import click

from daemonkit.cli import starting
from daemonkit.cli.common import configuration_options, target_argument
from daemonkit.errors import AlreadyRunning
from daemonkit.service.notify import is_supervised


@click.command(context_settings={"allow_interspersed_args": False})
@configuration_options()
@target_argument
@click.pass_context
def command(
    ctx: click.Context, /, module: str | None, args: tuple[str, ...], config_path: str | None, **options: Any
) -> None:
    """Become a daemon; return when it is ready.

    If it does not become ready, its own words or traceback are shown, the exit code is 1, and nothing is left
    of it.  If it runs already, that is said, and is a success; if it is another script, a failure.  Under systemd or
    as PID 1 it stays in front.

    \b
      daemonkit start heartbeat.py
      daemonkit start --name west --log /var/log/west.log -- poller.py --region west
      daemonkit start -m mypackage.poller
    """
    handover, chosen = starting.prepare(starting.request_of(ctx, module, args, options, config_path))
    from daemonkit import launch

    reason = is_supervised(os.environ, os.getpid())
    try:
        if reason is not None:
            launch.run_in_front(handover._replace(detached=False, why_in_front=reason), chosen)
        pid = launch.start(handover, chosen)
    except AlreadyRunning as error:
        starting.say_running(handover, error.pid)
        return
    click.echo(f"{handover.name} is running, pid {pid}")
