"""daemonkit timetable"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator

import click

from daemonkit import loader
from daemonkit.cli.check import load
from daemonkit.cli.common import as_json, json_option, target_argument, target_of
from daemonkit.core.duration import seconds
from daemonkit.core.job import Job


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--for", "span", default="24h", show_default=True, metavar="TIME", help="So far ahead, as in 90s, 1h30m, 7d."
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=1000, show_default=True, metavar="N", help="Show at most N runs."
)
@json_option
@target_argument
@click.pass_context
def command(
    ctx: click.Context, module: str | None, args: tuple[str, ...], span: str, limit: int, json_wanted: bool
) -> None:
    """Show when each job would run if the daemon became ready now; nothing is started, nothing is waited for.

    \b
      daemonkit timetable --for 24h heartbeat.py
      daemonkit timetable heartbeat.py --for 24h
    """
    args, span, limit, json_wanted = _trailing(args, span, limit, json_wanted)
    target, rest = target_of(ctx, module, args)
    path, is_module = loader.find(target)
    script = load(path, is_module, rest)
    length = round(seconds(span, what="--for") * 1e9)
    wall = time.time_ns()
    merged = heapq.merge(*(_runs(job, wall, length) for job in script.jobs.values()))
    runs = [run for run, _ in zip(merged, range(limit + 1), strict=False)]
    if json_wanted:
        as_json([{"at": at / 1e9, "job": name} for at, name in runs[:limit]])
        return
    for at, name in runs[:limit]:
        click.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(at / 1e9))}  {name}")
    if len(runs) > limit:
        click.echo(f"... and more; --limit shows more than {limit}")


def _runs(job: Job, wall: int, length: int) -> Iterator[tuple[int, str]]:
    """The times of ``job``'s runs, as nanoseconds since the epoch."""
    due = job.schedule.first(0, wall)
    while due is not None and due <= length:
        yield wall + due, job.name
        due = job.schedule.successor(due, due, wall + due)


def _trailing(
    args: tuple[str, ...], span: str, limit: int, json_wanted: bool
) -> tuple[tuple[str, ...], str, int, bool]:
    """Take our own options from behind the SCRIPT too, as the manual's `timetable SCRIPT --for 24h` has them."""
    rest = list(args)
    while len(rest) > 1 and rest[1] in ("--for", "--limit", "--json"):
        option = rest.pop(1)
        if option == "--json":
            json_wanted = True
        elif len(rest) < 2:
            raise click.UsageError(f"Option {option!r} requires an argument.")
        elif option == "--for":
            span = rest.pop(1)
        else:
            limit = _positive(rest.pop(1))
    return tuple(rest), span, limit, json_wanted


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise click.UsageError(f"Invalid value for '--limit': {text!r} is not a number of 1 or more.")
    return int(text)
