"""daemonkit scale"""

from __future__ import annotations

import click

from daemonkit.cli.common import Place, name_argument
from daemonkit.processes.worker import MOST


@click.command(context_settings={"ignore_unknown_options": True})  # -1 is a wrong count
@name_argument
@click.argument("worker", required=False)
@click.argument("count", required=False, type=click.IntRange(0, MOST))
def command(place: Place, worker: str | None, count: int | None) -> None:
    """More or fewer processes of a named worker.

    \b
      daemonkit scale crunch-numbers crunch 8
    """
    if worker is None or count is None:
        raise click.UsageError("NAME, WORKER and a COUNT are wanted.")
    place.ask("scale", worker=worker, count=count)
    click.echo(f"{place.name}: {worker} has {count} processes")
