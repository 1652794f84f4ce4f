"""daemonkit list"""

from __future__ import annotations

import click

from daemonkit import inquiry
from daemonkit.cli.common import Place, as_json, configuration_options, json_option, names_in, run_dir_of


@click.command("list")
@json_option
@configuration_options("run_dir")
def command(run_dir: str | None, config_path: str | None, json_wanted: bool) -> None:
    """Every daemon in the run directory, one a line.

    \b
      daemonkit list
    """
    directory = run_dir_of(None, None, run_dir, config_path)
    places = [Place(name, directory) for name in names_in(directory)]
    statuses = [inquiry.inquire(place.name, place.pid_path, place.socket_path).status for place in places]
    if json_wanted:
        as_json([{key: status.get(key) for key in ("name", "state", "pid", "since", "script")} for status in statuses])
        return
    width = max((len(status["name"]) for status in statuses), default=0)
    for status in statuses:
        pid, script = status["pid"] or "-", status.get("script") or ""
        click.echo(f"{status['name']:<{width}}  {status['state']:<11}  {pid:>7}  {script}".rstrip())
