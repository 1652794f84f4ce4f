"""daemonkit status"""

from __future__ import annotations

import click

from daemonkit import inquiry
from daemonkit.cli.common import (
    AFFIRMED,
    ALARMED,
    Place,
    Preset,
    as_json,
    json_option,
    name_options,
    names_in,
    place_of,
    run_dir_of,
)


@click.command()
@json_option
@name_options
@click.pass_context
def command(
    ctx: click.Context,
    name: str | None,
    module: str | None,
    run_dir: str | None,
    config_path: str | None,
    json_wanted: bool,
) -> int:
    """What runs, since when, and how its jobs fare.

    Exit code: 0 it runs, 1 it is dead but its PID file is left, 3 it does not run, 4 unknown.  Without NAME, every
    daemon in the run directory, and the worst of their codes; 3 if there is none.

    \b
      daemonkit status heartbeat
      daemonkit status --json heartbeat.py
    """
    if name is None and module is None and not isinstance(ctx.obj, Preset):
        directory = run_dir_of(None, None, run_dir, config_path)
        places = [Place(each, directory) for each in names_in(directory)]
    else:
        places = [place_of(ctx, name, module, run_dir, config_path)]
    answers = [inquiry.inquire(place.name, place.pid_path, place.socket_path) for place in places]
    if json_wanted:
        statuses = [answer.status for answer in answers]
        as_json(statuses[0] if name or module or isinstance(ctx.obj, Preset) else statuses)
    else:
        for answer in answers:
            _show(answer)
        if not answers:
            click.echo("nothing runs here")
    return max((answer.code for answer in answers), default=inquiry.NOT_RUNNING)


def _show(answer: inquiry.Answer) -> None:
    status = answer.status
    if status["pid"] is None:
        click.secho(f"{status['name']}: {status['state']}", fg=ALARMED if answer.code == inquiry.DEAD else None)
        if status["note"]:
            click.echo(f"  {status['note']}")
        return
    from daemonkit.report import as_text

    first, *rest = as_text(status, status["name"]).split("\n")
    click.secho(first, fg=AFFIRMED)
    if rest:
        click.echo("\n".join(rest))
