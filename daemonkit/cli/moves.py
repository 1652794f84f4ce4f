"""daemonkit queue move, and migrate"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from daemonkit.cli.broker import on_broker, opened
from daemonkit.cli.common import answer, json_option
from daemonkit.cli.types import ALL, COUNT, MOVABLE, STATES
from daemonkit.errors import BrokerError, TaskTooLarge
from daemonkit.queue.broker import State

if TYPE_CHECKING:
    from daemonkit.queue.broker import Broker


@click.command()
@click.argument("queue")
@click.argument("target")
@click.option("--state", "states", type=STATES, multiple=True, default=[State.READY.value], show_default=True)
@click.option("-n", "count", type=COUNT, help="So many at most; default: all.")
@json_option
@on_broker
def move(
    broker: Broker, queue: str, target: str, states: tuple[str, ...], count: int | None, json_wanted: bool
) -> None:
    """Move tasks from QUEUE to the queue TARGET."""
    from daemonkit.queue.transfer import Transfer

    if queue == target:
        raise click.UsageError("QUEUE and TARGET are the same.")
    wanted = [State(state) for state in states]
    with _progress(broker, [queue], wanted, count) as moved:
        done = Transfer(broker, queue, broker, target).move(wanted, count or ALL, moved)
    value = {"queue": queue, "target": target, "moved": done}
    answer(json_wanted, value, f"moved {done} task(s) from {queue} to {target}")


@click.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@json_option
def migrate(source: str, target: str, json_wanted: bool) -> None:
    """Move all queues of the broker at the URL FROM to that at TO: ready, delayed and buried tasks.

    Stop the consumers of FROM first.  Interrupted, it can be called again: nothing is lost, nothing is there twice,
    but that beanstalkd, which keeps no keys, may then have up to 100 tasks twice.
    """
    from daemonkit.queue.transfer import Transfer

    with opened(source) as origin, opened(target, make=True) as goal:
        if origin.stores() & goal.stores():
            raise click.UsageError("FROM and TO are the same broker.")
        origin.recover()
        found = origin.stats()
        queues = [each.queue for each in found if each.ready or each.delayed or each.buried]
        done, refused = 0, dict[str, str]()
        with _progress(origin, queues, list(MOVABLE), None) as moved:
            for each in found:
                if each.paused:  # right before its tasks: beanstalkd forgets that of a queue that is empty and left
                    goal.pause(each.queue, each.paused, each.pause_reason)
                if each.queue in queues:
                    transfer = Transfer(origin, each.queue, goal, each.queue)
                    done += transfer.move(MOVABLE, ALL, moved)
                    refused |= transfer.refused
        for each in origin.stats():
            if each.paused and not (each.ready or each.delayed or each.buried):
                origin.pause(each.queue, 0)
        left = sum(each.reserved for each in origin.stats())
    value = {"moved": done, "queues": queues, "refused": refused, "reserved": left}
    answer(json_wanted, value, f"moved {done} task(s) of {len(queues)} queue(s)")
    if refused:
        raise TaskTooLarge(f"migrate {source}: task(s) {', '.join(refused)} stay there: {next(iter(refused.values()))}")
    if left:
        raise BrokerError(f"migrate {source}: {left} task(s) are reserved by consumers; stop those, and call it again")


@contextmanager
def _progress(
    broker: Broker, queues: list[str], states: list[State], most: int | None
) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, while tasks are moved."""
    there = sum(getattr(each, state.value) for each in broker.stats() if each.queue in queues for state in states)
    with click.progressbar(length=min(there, most or there), file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield bar.update
