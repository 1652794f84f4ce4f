"""daemonkit cluster"""

from __future__ import annotations

import base64
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from daemonkit.cli.common import as_json, as_table, configuration_options, configured, json_option, printable
from daemonkit.core.duration import describe
from daemonkit.errors import CoordinatorError

if TYPE_CHECKING:
    from daemonkit.cluster.coordinator import Coordinator
    from daemonkit.cluster.election import Leader
    from daemonkit.cluster.hold import LockInfo
    from daemonkit.cluster.watching import Value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """The cluster, by hand: who leads, who is there, who has which lock, and what is configured.

    URL names the coordinator; without it the configured one is meant.

    \b
      daemonkit cluster status
      daemonkit cluster members zookeeper://zk1,zk2,zk3/app
      daemonkit cluster get /config/x
      daemonkit cluster set /config/x "workers = 4" --version 7
    """


def on_coordinator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what tells which coordinator is meant; the subcommand is given that, open."""

    @click.pass_context
    @wraps(function)
    def resolved(ctx: click.Context, /, *args: Any, **values: Any) -> Any:
        given = {key: values.pop(key) for key in ("coordinator", "run_dir")}
        given["coordinator"] = values.pop("url") or given["coordinator"]
        url = _url_of(ctx, given, values.pop("config_path"))
        with _opened(url, make=ctx.info_name in ("set", "watch")) as coordinator:
            return function(coordinator, *args, **values)

    return click.argument("url", required=False)(configuration_options("coordinator", "run_dir")(resolved))


def _url_of(ctx: click.Context, given: dict[str, str | None], config_path: str | None) -> str:
    return configured(ctx, given, config_path).coordinator


@contextmanager
def _opened(url: str, *, make: bool) -> Iterator[Coordinator]:
    from daemonkit.cluster.connect import connect

    path = url.removeprefix("local:")
    if path != url and not make and not os.path.isdir(path):
        raise CoordinatorError(f"use {url}: nobody has used it yet; there is no such directory")
    with connect(url) as coordinator:
        yield coordinator


@command.command()
@json_option
@on_coordinator
def status(coordinator: Coordinator, json_wanted: bool) -> None:
    """Who leads what, since when, with which token, and how many would."""
    leaders = coordinator.leaders()
    counts = {each: len(coordinator.members(each)) for each in coordinator.groups()}
    if json_wanted:
        found = [{**each._asdict(), "members": counts.get(each.name, 0)} for each in leaders]
        as_json({"coordinator": coordinator.url, "leaders": found, "groups": counts})
    elif leaders:
        rows = [
            (each.name, _process(each), _ago(each.since), str(each.token), str(counts.get(each.name, 0)))
            for each in leaders
        ]
        as_table(("NAME", "LEADER", "SINCE", "TOKEN", "MEMBERS"), rows)
    else:
        click.echo(f"nobody leads anything at {coordinator.url}")


@command.command()
@json_option
@on_coordinator
def members(coordinator: Coordinator, json_wanted: bool) -> None:
    """Who is there, by group: the daemons of one name are a group."""
    found = [(group, each) for group in coordinator.groups() for each in coordinator.members(group)]
    if json_wanted:
        as_json([{"group": group, **each._asdict()} for group, each in found])
    elif found:
        rows = [(group, each.host, str(each.pid), _ago(each.since), each.session) for group, each in found]
        as_table(("GROUP", "HOST", "PID", "SINCE", "SESSION"), rows)
    else:
        click.echo(f"nobody is there at {coordinator.url}")


@command.command()
@json_option
@on_coordinator
def locks(coordinator: Coordinator, json_wanted: bool) -> None:
    """Who has which lock or semaphore, and who waits for it, in the order in which they will get it."""
    found = coordinator.locks()
    if json_wanted:
        as_json([each._asdict() for each in found])
    elif found:
        as_table(("NAME", "KIND", "STATE", "BY", "DAEMON", "SINCE", "TOKEN"), map(_lock_row, found))
    else:
        click.echo(f"no locks at {coordinator.url}")


@command.command()
@click.argument("path")
@json_option
@on_coordinator
def get(coordinator: Coordinator, path: str, json_wanted: bool) -> None:
    """Print the value at PATH."""
    value = coordinator.get(path)
    if value.data is None:
        raise CoordinatorError(f"get {path}: there is no value at {coordinator.url}")
    if json_wanted:
        as_json(_as_dict(value._replace(children=tuple(coordinator.children(path)))))
    else:
        sys.stdout.buffer.write(value.data)
        if sys.stdout.isatty():
            click.echo()


@command.command(name="set")
@click.argument("path")
@click.argument("value")
@click.option("--version", type=click.IntRange(0), help="Only if it has this version.")
@json_option
@on_coordinator
def set_value(coordinator: Coordinator, path: str, value: str, version: int | None, json_wanted: bool) -> None:
    """Let VALUE, or standard input for "-", be the value at PATH."""
    data = sys.stdin.buffer.read() if value == "-" else os.fsencode(value)
    changed = coordinator.set(path, data, version)
    if json_wanted:
        as_json({"path": path, "version": changed})
    else:
        click.echo(f"{path} has version {changed}")


@command.command()
@click.argument("path")
@click.option("-n", "count", type=click.IntRange(1), help="End after so many.")
@json_option
@on_coordinator
def watch(coordinator: Coordinator, path: str, count: int | None, json_wanted: bool) -> None:
    """Print the value at PATH and the names below it, now and after each change, until interrupted."""
    seen: list[Value] = []

    def tell(value: Value) -> None:
        seen.append(value)
        if json_wanted:
            import json

            click.echo(json.dumps(_as_dict(value)))
            return
        data = "no value" if value.data is None else repr(value.data.decode(errors="replace"))
        below = f", below it {', '.join(value.children)}" if value.children else ""
        click.echo(printable(f"{time.strftime('%H:%M:%S')} {path} version {value.version}: {data}{below}"))

    coordinator.get(path)  # what keeps us from it is told; later it is waited for
    coordinator.watch(path, tell)
    while count is None or len(seen) < count:
        coordinator.wait(None if count is None else 1.0)


def _as_dict(value: Value) -> dict[str, Any]:
    values = value._asdict()
    if value.data is not None:
        try:
            values["data"] = value.data.decode()
        except UnicodeDecodeError:
            values["data"] = None
            values["data_base64"] = base64.b64encode(value.data).decode()
    return values


def _lock_row(lock: LockInfo) -> tuple[str, ...]:
    state = "held" if lock.is_held else "waits"
    return lock.name, lock.kind, state, _process(lock), lock.daemon or "-", _ago(lock.since), str(lock.token)


def _process(each: Leader | LockInfo) -> str:
    return f"{each.host}:{each.pid}"


def _ago(since: float) -> str:
    return describe(max(0, round(time.time() - since))) + " ago"
