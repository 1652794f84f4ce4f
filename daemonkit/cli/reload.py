"""daemonkit reload"""

from __future__ import annotations

import click

from daemonkit.cli.common import TIMEOUT, Place, name_argument


@click.command()
@click.option(
    "--timeout", type=TIMEOUT, default=90.0, show_default=True, metavar="SECONDS", help="Wait so long for its result."
)
@name_argument
def command(place: Place, timeout: float) -> None:
    """Let a daemon read its configuration again and replace its workers by new code (SIGHUP); wait for the result.

    If it fails, the error is shown, the exit code is 1, and the daemon goes on with the old configuration or code.

    \b
      daemonkit reload heartbeat
    """
    place.ask("reload", timeout)
    click.echo(f"{place.name} was reloaded")
