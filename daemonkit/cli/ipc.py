"""daemonkit ipc"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from daemonkit.cli.common import Preset, as_json, as_table, configuration_options, json_option, run_dir_of
from daemonkit.errors import IpcError, NotAllowed

if TYPE_CHECKING:
    from daemonkit.ipc.registry import Found


@click.command()
@json_option
@configuration_options("run_dir")
@click.argument("action", type=click.Choice(["list", "clean"]), metavar="list|clean")
@click.pass_context
def command(ctx: click.Context, action: str, json_wanted: bool, run_dir: str | None, config_path: str | None) -> None:
    """System V semaphores, message queues and shared memory that daemonkit has made and that are still there.

    ``list`` shows them: a creator is dead if the process with this PID and start time has ended.  ``clean`` removes
    those whose creator is dead, and so is the daemon for which it was made.  Objects that others have made are neither
    shown nor touched; see ipcs(1) for them.

    \b
      daemonkit ipc list
      daemonkit ipc clean
    """
    from daemonkit.ipc import registry

    preset = ctx.obj if isinstance(ctx.obj, Preset) else None
    refused: list[NotAllowed | IpcError] = []
    found: list[Found] = []
    for path in registry.registries(run_dir_of(preset, None, run_dir, config_path)):
        try:
            found += registry.find(path) if action == "list" else registry.remove_left(path)
        except (NotAllowed, IpcError) as error:  # the others are looked at all the same
            refused.append(error)
            click.echo(str(error), err=True)
    if json_wanted:
        as_json([_as_dict(each) for each in found])
    elif action == "list":
        _show(found)
    else:
        for each in found:
            click.echo(f"removed {each.title}, left by pid {each.entry.pid}, which is dead")
    if refused:
        ctx.exit(refused[0].exit_code)


def _show(found: list[Found]) -> None:
    rows = []
    for each in found:
        kind, key = each.title.split()
        state = "alive" if each.entry.creator_lives else "dead"
        rows.append((kind, key, str(each.entry.id), each.content, str(each.entry.pid), state, each.daemon or "-"))
    if rows:
        as_table(("KIND", "KEY", "ID", "HOLDS", "CREATOR", "STATE", "DAEMON"), rows)


def _as_dict(found: Found) -> dict[str, Any]:
    entry = found.entry
    return {
        "kind": entry.kind,
        "key": entry.key,
        "id": entry.id,
        "creator": entry.pid,
        "creator_is_dead": not entry.creator_lives,
        "daemon": found.daemon,
        "is_left": found.is_left,
        **found.sizes,
    }
