"""daemonkit trigger"""

from __future__ import annotations

import click

from daemonkit.cli.common import name_argument, place_of
from daemonkit.cli.jobnames import split


@click.command()
@click.option(
    "--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="Wait so long for its end."
)
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
    timeout: float,
) -> None:
    """Run a timer job now, beside its schedule; return when it has ended, with exit code 1 if it failed.

    \b
      daemonkit trigger heartbeat beat
    """
    name, job = split(ctx, name, job)
    if job is None:
        raise click.UsageError("Missing argument 'JOB'.", ctx)
    place = place_of(ctx, name, module, run_dir, config_path)
    place.ask("trigger", timeout, job=job)
    click.echo(f"{place.name}: {job} has run")
