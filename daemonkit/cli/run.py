"""daemonkit run"""

from __future__ import annotations

from typing import Any

import click

from daemonkit.cli import starting
from daemonkit.cli.common import configuration_options, target_argument


@click.command(context_settings={"allow_interspersed_args": False})
@configuration_options()
@target_argument
@click.pass_context
def command(
    ctx: click.Context, /, module: str | None, args: tuple[str, ...], config_path: str | None, **options: Any
) -> None:
    """Run in the foreground: in a terminal, under systemd, in a container.

    The log goes to stderr unless --log names a file.  ^C stops it as TERM does.  The exit code is the daemon's.

    \b
      daemonkit run heartbeat.py
    """
    handover, chosen = starting.prepare(starting.request_of(ctx, module, args, options, config_path))
    from daemonkit import launch

    launch.run_in_front(handover._replace(detached=False), chosen)
