"""daemonkit resume"""

from __future__ import annotations

import click

from daemonkit.cli.common import name_argument, place_of
from daemonkit.cli.jobnames import split


@click.command()
@name_argument
@click.argument("job", required=False)
@click.pass_context
def command(
    ctx: click.Context,
    name: str | None,
    module: str | None,
    run_dir: str | None,
    config_path: str | None,
    job: str | None,
) -> None:
    """Put a paused timer job, or all of them, back on the grid; what was missed is not made up.

    \b
      daemonkit resume heartbeat beat
      daemonkit resume heartbeat
    """
    name, job = split(ctx, name, job)
    place = place_of(ctx, name, module, run_dir, config_path)
    place.ask("resume", job=job)
    click.echo(f"{place.name}: {job or 'all jobs'} resumed")
