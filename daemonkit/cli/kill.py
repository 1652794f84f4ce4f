"""daemonkit kill"""

from __future__ import annotations

import click

from daemonkit import ending
from daemonkit.cli.common import name_argument, place_of, stop_schedule_of


@click.command()
@click.option(
    "--timeout", type=float, metavar="SECONDS", help="Send KILL after this long.  [default: see stop_schedule]"
)
@name_argument
@click.pass_context
def command(
    ctx: click.Context,
    name: str | None,
    module: str | None,
    run_dir: str | None,
    config_path: str | None,
    timeout: float | None,
) -> None:
    """Stop a daemon; return when it is gone.

    It is sent TERM, and finishes what it has in hand; after the time-out its whole process tree is sent KILL.
    A daemon that does not run is a success.

    \b
      daemonkit kill heartbeat
      daemonkit kill --timeout 5 heartbeat.py
    """
    place = place_of(ctx, name, module, run_dir, config_path)
    schedule = stop_schedule_of(ctx, place, config_path) if timeout is None else ending.schedule(timeout)
    how = ending.end(place.pid_path, place.socket_path, schedule)
    click.echo(f"{place.name} {how}")
