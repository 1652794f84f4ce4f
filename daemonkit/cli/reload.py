"""daemonkit reload"""

from __future__ import annotations

import click

from daemonkit.cli.common import name_argument, place_of


@click.command()
@click.option(
    "--timeout", type=float, default=30.0, show_default=True, metavar="SECONDS", help="Wait so long for its result."
)
@name_argument
@click.pass_context
def command(
    ctx: click.Context,
    name: str | None,
    module: str | None,
    run_dir: str | None,
    config_path: str | None,
    timeout: float,
) -> None:
    """Let a daemon read its configuration again (SIGHUP), and wait for the result.

    If it fails, the error is shown, the exit code is 1, and the daemon goes on with the old configuration.

    \b
      daemonkit reload heartbeat
    """
    place = place_of(ctx, name, module, run_dir, config_path)
    place.ask("reload", timeout)
    click.echo(f"{place.name} was reloaded")
