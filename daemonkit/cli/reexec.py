"""daemonkit reexec"""

from __future__ import annotations

import click

from daemonkit.cli.common import TIMEOUT, Place, name_argument


@click.command()
@click.option(
    "--timeout", type=TIMEOUT, default=90.0, show_default=True, metavar="SECONDS", help="Wait so long for its result."
)
@name_argument
def command(place: Place, timeout: float) -> None:
    """Execute the new code in place (SIGUSR2): same PID, lock never released, timer grid kept.

    The new code is imported in a child first; if that fails, its traceback is shown, the exit code is 1, and the
    old code goes on.

    \b
      daemonkit reexec heartbeat
    """
    place.ask("reexec", timeout)
    click.echo(f"{place.name} runs the new code, pid {place.pid()}")
