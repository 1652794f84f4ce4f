"""daemonkit reload"""

from __future__ import annotations

import click

from daemonkit.cli.common import TIMEOUT, Place, name_argument


@click.command()
@click.option(
    "--timeout", type=TIMEOUT, default=30.0, show_default=True, metavar="SECONDS", help="Wait so long for its result."
)
@name_argument
def command(place: Place, timeout: float) -> None:
    """Let a daemon read its configuration again (SIGHUP), and wait for the result.

    If it fails, the error is shown, the exit code is 1, and the daemon goes on with the old configuration.

    \b
      daemonkit reload heartbeat
    """
    place.ask("reload", timeout)
    click.echo(f"{place.name} was reloaded")
