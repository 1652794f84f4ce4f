"""Why a task does not run."""

from __future__ import annotations

from daemonkit.core.duration import describe
from daemonkit.queue.broker import Broker, QueueStats, State, Task
from daemonkit.queue.owner import is_dead


def explain(broker: Broker, task: Task) -> list[str]:
    """Sentences that say why ``task`` does not run, or that it does."""
    queue = next((each for each in broker.stats() if each.queue == task.queue), None)
    found = {State.READY: _ready, State.DELAYED: _delayed, State.RESERVED: _reserved, State.BURIED: _buried}
    lines = found[task.state](broker, task)
    if queue is not None and queue.paused is not None and task.state is not State.RESERVED:
        lines.append(_paused(queue))
    if task.reason and task.failures and task.state is not State.BURIED:
        lines.append(f"it has failed {task.failures} time(s), last: {task.reason.partition(chr(10))[0]}")
    return lines


def _ready(broker: Broker, task: Task) -> list[str]:
    ahead = broker.ahead(task)
    before = "" if ahead is None else f", {ahead or 'no'} task(s) of its queue before it"
    lines = [f"task {task.id} of {task.queue} is ready{before}"]
    consumers = [each for each in broker.consumers() if task.queue in each.queues]
    if not consumers:
        lines.append(f"no consumer takes tasks of {task.queue}; start a daemon whose script declares one")
    for each in consumers:
        of = "" if each.concurrency is None else f" of {each.concurrency}"
        lines.append(f"consumer {each.owner} takes {', '.join(each.queues)}; {each.busy}{of} are busy")
    return lines


def _delayed(broker: Broker, task: Task) -> list[str]:
    return [f"task {task.id} of {task.queue} is delayed for another {describe(round(task.left or 0))}"]


def _reserved(broker: Broker, task: Task) -> list[str]:
    left = describe(round(task.left or 0))
    line = f"task {task.id} of {task.queue} is being done by {task.owner or 'somebody'}, attempt {task.failures + 1}"
    if is_dead(task.owner):
        return [f"{line}; that has ended, and it is given back within {left}, or when a consumer starts"]
    return [f"{line}; if that is not heard of any more, it is given back in {left}"]


def _buried(broker: Broker, task: Task) -> list[str]:
    reason = f": {task.reason}" if task.reason else ""
    return [
        f"task {task.id} of {task.queue} is buried, after {task.failures} failure(s){reason}",
        f"daemonkit queue kick --id {task.id} makes it ready again",
    ]


def _paused(queue: QueueStats) -> str:
    why = f": {queue.pause_reason}" if queue.pause_reason else ""
    return f"{queue.queue} is paused for another {describe(round(queue.paused or 0))}{why}"
