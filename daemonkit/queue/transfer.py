"""Move tasks from one queue to another, of the same broker or of two, and lose none.

A task is put where it goes before it is deleted where it was, with its own key, or one that names it in the whole
world: done again after an interruption, nothing is there twice; beanstalkd keeps no keys, so there it may be.  ^C, and
a signal to end, wait for the step that is being done.  What a consumer takes meanwhile, stays his.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from daemonkit.errors import BrokerError, TaskTooLarge
from daemonkit.queue.broker import Broker, Delete, NewTask, Release, Reservation, State, Task
from daemonkit.queue.checks import LONGEST, check_queue
from daemonkit.queue.undivided import undivided

AT_ONCE: Final = 100


class Transfer:
    """From one queue to another."""

    def __init__(self, source: Broker, queue: str, target: Broker, target_queue: str) -> None:
        """Nothing is moved yet.

        Raises:
            UsageError: one of the names can be no queue's.
            BrokerError: the source cannot be reached.
        """
        check_queue(queue)
        check_queue(target_queue)
        self._source = source
        self._queue = queue
        self._target = target
        self._target_queue = target_queue
        self._name = "+".join(sorted(source.stores()))
        self._held: list[Reservation] = []  # too large for the target; given back at the end
        self.refused: dict[str, str] = {}  # ids of those that are too large for the target, and what it says

    def move(self, states: Iterable[State], most: int, moved: Callable[[int], object]) -> int:
        """Move up to ``most`` tasks in ``states``; return how many; see ``refused`` for those that cannot be.

        Args:
            states: ready, delayed, buried; delays, priorities and reasons stay as they are.
            most: tasks.
            moved: told how many more are there.

        Raises:
            BrokerError: one of the brokers cannot be reached, or refuses; what was not moved is where it was.
        """
        done = 0
        is_paused = any(each.paused for each in self._source.stats() if each.queue == self._queue)
        movers: dict[State, Callable[[int], int | None]] = {
            State.READY: self._move_paused if is_paused else self._move_ready,
            State.DELAYED: self._move_delayed,
            State.BURIED: self._move_buried,
        }
        try:
            for state in states:
                while done < most:
                    with undivided():
                        step = movers[state](min(most - done, AT_ONCE))
                    if step is None:
                        break
                    done += step
                    moved(step)
        finally:
            if self._held:
                with undivided():
                    self._source.exchange([Release(each) for each in self._held], {}, 0)
        return done

    def _move_ready(self, most: int) -> int | None:
        found = self._source.reserve(self._queue, count=most)
        if not found:
            return None
        try:
            ids = self._put(found, 0.0)
        except BrokerError:
            self._held += found
            raise
        self._held += [each for each, id in zip(found, ids, strict=True) if id is None]
        done = [each for each, id in zip(found, ids, strict=True) if id is not None]
        return len(done) - len(self._source.exchange([Delete(each) for each in done], {}, 0).lost)

    def _move_paused(self, most: int) -> int | None:
        """A paused queue hands out nothing."""
        return self._move_peeked(State.READY, most, 0.0)

    def _move_delayed(self, most: int) -> int | None:
        return self._move_peeked(State.DELAYED, most, None)

    def _move_buried(self, most: int) -> int | None:
        # One by one, and as good as for ever: should we be ended in between, what is bad is not done.
        return self._move_peeked(State.BURIED, 1, LONGEST)

    def _move_peeked(self, state: State, most: int, delay: float | None) -> int | None:
        seen = self._source.peek_state(self._queue, state, most + len(self.refused))
        found = [task for task in seen if task.id not in self.refused]
        if not found:
            return None
        count = 0
        ids = self._put(found, delay)
        for task, id in zip(found, ids, strict=True):
            if id is None:
                continue
            if state is State.BURIED:
                self._target.bury_task(id, task.reason or "")
            if self._source.delete_task(task.id):
                count += 1
            elif task.key is None:  # a consumer has it by now
                self._target.delete_task(id)
        return count

    def _put(self, tasks: Sequence[Reservation | Task], delay: float | None) -> list[str | None]:
        """Put them; their new ids, None for those that the target cannot take.  ``delay``: None: what is left of it."""
        made = [self._again(task, delay) for task in tasks]
        try:
            return list(self._target.put_many(self._target_queue, made))
        except TaskTooLarge:
            return [self._put_one(old.id, new) for old, new in zip(tasks, made, strict=True)]

    def _put_one(self, id: str, task: NewTask) -> str | None:
        try:
            return self._target.put(self._target_queue, task)
        except TaskTooLarge as error:
            self.refused[id] = str(error)
            return None

    def _again(self, task: Reservation | Task, delay: float | None) -> NewTask:
        if delay is None:
            delay = (task.left or 0.0) if isinstance(task, Task) else 0.0
        key = (task.key or f"{self._name}#{task.id}") if self._target.keeps_keys else None
        return NewTask(task.body, task.priority, delay, task.ttr, key)
