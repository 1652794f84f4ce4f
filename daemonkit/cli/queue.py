"""daemonkit queue"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from daemonkit.cli import moves
from daemonkit.cli.broker import on_broker, opened, url_of
from daemonkit.cli.common import answer, as_json, as_table, configuration_options, json_option, printable
from daemonkit.cli.types import ALL, COUNT, MOVABLE, STATES, Duration, Words
from daemonkit.core.duration import describe
from daemonkit.errors import BrokerError, NoSuchTask
from daemonkit.queue.broker import DEFAULT_PRIORITY, DEFAULT_TTR, NewTask, State

if TYPE_CHECKING:
    from daemonkit.queue.broker import Broker, QueueStats, Task


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """The tasks of a broker, by hand: look, put, kick, bury, delete, pause, move.

    Without --broker URL the configured broker is meant; doctor is given one as URL, too, and migrate two.

    \b
      daemonkit queue stats
      daemonkit queue peek mail --state buried
      daemonkit queue why 4711
      daemonkit queue kick mail 10
      daemonkit queue pause mail 10m --reason "the relay is down"
    """


@command.command()
@json_option
@on_broker
def stats(broker: Broker, json_wanted: bool) -> None:
    """How many tasks are in each queue, by state."""
    found = broker.stats()
    if json_wanted:
        as_json([each._asdict() for each in found])
    elif found:
        as_table(("QUEUE", "READY", "DELAYED", "RESERVED", "BURIED", "PAUSED"), map(_stats_row, found))
    else:
        click.echo(f"no tasks at {broker.url}")


@command.command()
@click.argument("queue")
@click.argument("body")
@click.option("--delay", type=Duration(), default=0.0, metavar="TIME", help="Not before that time has passed.")
@click.option("--priority", type=int, default=DEFAULT_PRIORITY, help="Lower ones come first.", show_default=True)
@click.option("--ttr", type=Duration(), default=DEFAULT_TTR, metavar="TIME", help="Time to run.", show_default=True)
@click.option("--key", help="No second task, if one with this key is there.")
@json_option
@on_broker
def put(broker: Broker, queue: str, body: str, json_wanted: bool, key: str | None, **options: Any) -> None:
    """Put a task whose body is BODY, or standard input for "-".

    \b
      daemonkit queue put mail '{"task": "send_mail", "args": ["a@b.c"]}'
    """
    data = sys.stdin.buffer.read() if body == "-" else os.fsencode(body)
    id = broker.put(queue, NewTask(data, key=key, **options))
    answer(json_wanted, {"queue": queue, "id": id}, id)


@command.command()
@click.argument("queue", required=False)
@click.option("--id", help="This task.")
@click.option(
    "--state", type=STATES, default=State.READY.value, show_default=True, help="The first ones in this state."
)
@click.option("-n", "count", type=COUNT, default=1, show_default=True, help="So many.")
@json_option
@on_broker
def peek(broker: Broker, queue: str | None, id: str | None, state: str, count: int, json_wanted: bool) -> None:
    """Show tasks: the first of QUEUE, or the one with --id."""
    if (queue is None) == (id is None):
        raise click.UsageError("QUEUE or --id is wanted, and not both.")
    found = broker.peek_state(queue, State(state), count) if queue is not None else [_task(broker, str(id))]
    if json_wanted:
        as_json([_as_dict(task) for task in found])
    elif found:
        _show("\n\n".join(_as_text(task) for task in found))
    else:
        click.echo(f"no {state} task in {queue}")


@command.command()
@click.argument("id")
@json_option
@on_broker
def why(broker: Broker, id: str, json_wanted: bool) -> None:
    """Say why a task does not run."""
    from daemonkit.queue.explain import explain

    lines = explain(broker, _task(broker, id))
    if json_wanted:
        as_json({"id": id, "why": lines})
    else:
        _show("\n".join(lines))


@command.command()
@click.argument("queue", required=False)
@click.argument("count", type=COUNT, required=False)
@click.option("--id", "ids", multiple=True, help="This task; may be given again.")
@click.option("--all", "is_all", is_flag=True, help="All of QUEUE.")
@json_option
@on_broker
def kick(
    broker: Broker, queue: str | None, count: int | None, ids: tuple[str, ...], is_all: bool, json_wanted: bool
) -> None:
    """Make COUNT buried tasks of QUEUE ready, their failures forgotten; delayed ones, if none is buried."""
    if ids:
        _each(ids, broker.kick_task, "kicked", "neither buried nor delayed", json_wanted)
        return
    if queue is None or (count is None) == (not is_all):
        raise click.UsageError("QUEUE and a COUNT or --all are wanted, or --id.")
    kicked = broker.kick(queue, ALL if count is None else count)
    answer(json_wanted, {"queue": queue, "kicked": kicked}, f"kicked {kicked} task(s) of {queue}")


@command.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--reason", type=Words(), default="by hand", show_default=True)
@json_option
@on_broker
def bury(broker: Broker, ids: tuple[str, ...], reason: str, json_wanted: bool) -> None:
    """Put ready or delayed tasks aside."""
    _each(ids, lambda id: broker.bury_task(id, reason), "buried", "neither ready nor delayed", json_wanted)


@command.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@json_option
@on_broker
def delete(broker: Broker, ids: tuple[str, ...], json_wanted: bool) -> None:
    """Delete tasks that are not reserved."""
    _each(ids, broker.delete_task, "deleted", "reserved, or not there", json_wanted)


@command.command()
@click.argument("queue")
@click.argument("time", type=Duration())
@click.option("--reason", type=Words(), help="Shown to whoever asks.")
@json_option
@on_broker
def pause(broker: Broker, queue: str, time: float, reason: str | None, json_wanted: bool) -> None:
    """Hand out no task of QUEUE for TIME, whoever is restarted meanwhile."""
    _pause(broker, queue, time, reason, json_wanted)


@command.command()
@click.argument("queue")
@json_option
@on_broker
def resume(broker: Broker, queue: str, json_wanted: bool) -> None:
    """End the pause of QUEUE."""
    _pause(broker, queue, 0, None, json_wanted)


@command.command()
@click.argument("queue")
@click.option("--timeout", type=Duration(), metavar="TIME", help="Wait no longer than that; default: without end.")
@click.option("--delayed", is_flag=True, help="Wait for delayed tasks, too.")
@json_option
@on_broker
def drain(broker: Broker, queue: str, timeout: float | None, delayed: bool, json_wanted: bool) -> None:
    """Wait until no task of QUEUE is ready or being done; exit with 1 if there still is one when the time is up."""
    from daemonkit.queue.drain import await_drained

    left = await_drained(broker, queue, timeout, delayed=delayed)
    if left:
        raise BrokerError(f"drain {queue}: {left} task(s) are left after {describe(timeout or 0)}")
    answer(json_wanted, {"queue": queue, "left": 0}, f"{queue} is drained")


@command.command()
@click.argument("queue")
@click.option("--state", "states", type=STATES, multiple=True, help="Only these; may be given again.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@on_broker
def empty(broker: Broker, queue: str, states: tuple[str, ...], yes: bool, json_wanted: bool) -> None:
    """Delete all tasks of QUEUE but those that are reserved."""
    if not yes:
        click.confirm(f"delete {' and '.join(states) or 'all'} tasks of {queue} at {broker.url}?", abort=True, err=True)
    deleted = broker.empty(queue, [State(state) for state in states] or MOVABLE)
    answer(json_wanted, {"queue": queue, "deleted": deleted}, f"deleted {deleted} task(s) of {queue}")


@command.command()
@click.argument("url", required=False)
@json_option
@configuration_options("broker", "run_dir")
@click.pass_context
def doctor(
    ctx: click.Context, /, url: str | None, json_wanted: bool, config_path: str | None, **given: str | None
) -> None:
    """Say what would be lost, and when, at the broker URL (default: the configured one)."""
    with opened(url or url_of(ctx, given, config_path)) as broker:
        lines = broker.doctor()
        answer(json_wanted, {"broker": broker.url, "lost": lines}, "\n".join(lines))


command.add_command(moves.move)
command.add_command(moves.migrate)


def _task(broker: Broker, id: str) -> Task:
    task = broker.peek(id)
    if task is None:
        raise NoSuchTask(f"task {id}: there is none at {broker.url}; it is done, deleted, or of another broker")
    return task


def _show(text: str) -> None:
    """Print lines, of which some are what others have written."""
    click.echo("\n".join(map(printable, text.split("\n"))))


def _each(ids: tuple[str, ...], act: Callable[[str], bool], done: str, why: str, json_wanted: bool) -> None:
    from daemonkit.queue.undivided import undivided

    ids = tuple(dict.fromkeys(ids))  # one that is given twice would be refused the second time
    refused = []
    for id in ids:
        with undivided():
            is_done = act(id)
        if not is_done:
            refused.append(id)
    taken = [id for id in ids if id not in refused]
    if taken or json_wanted:
        answer(json_wanted, {done: taken, "refused": refused}, f"{done} {', '.join(taken)}")
    if refused:
        raise NoSuchTask(f"not {done}: {', '.join(refused)}: {why}")


def _pause(broker: Broker, queue: str, time: float, reason: str | None, json_wanted: bool) -> None:
    broker.pause(queue, time, reason)
    words = f"{queue} is paused for {describe(time)}" if time else f"{queue} is not paused"
    answer(json_wanted, {"queue": queue, "paused": time or None}, words)


def _stats_row(each: QueueStats) -> tuple[str, ...]:
    paused = "-" if each.paused is None else f"{describe(round(each.paused))} {each.pause_reason or ''}".strip()
    return each.queue, str(each.ready), str(each.delayed), str(each.reserved), str(each.buried), paused


def _as_dict(task: Task) -> dict[str, Any]:
    values = task._asdict()
    try:
        values["body"] = task.body.decode()
    except UnicodeDecodeError:
        values["body"] = None
        values["body_base64"] = base64.b64encode(task.body).decode()
    return values


def _as_text(task: Task) -> str:
    left = "" if task.left is None else f", {describe(round(task.left))} left"
    lines = [
        f"task {task.id} of {task.queue}: {task.state.value}{left}",
        f"  put {describe(round(task.age))} ago, priority {task.priority}, ttr {describe(task.ttr)}",
        f"  reserved {task.reserves}, released {task.releases}, timed out {task.timeouts}, buried {task.buries}, "
        f"kicked {task.kicks}, failures {task.failures}",
    ]
    if task.progress:
        lines.append(f"  progress: {task.progress}")
    if task.reason:
        lines += ["  " + line for line in f"reason: {task.reason}".splitlines()]
    try:
        body = task.body.decode()
    except UnicodeDecodeError:
        body = repr(task.body)
    return "\n".join([*lines, f"  body: {body}"])
