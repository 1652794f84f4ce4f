"""Move tasks from one queue to another, of the same broker or of two, and lose none.

A task is put where it goes before it is deleted where it was, with a key that names it: done again after an
interruption, nothing is there twice; beanstalkd keeps no keys, so there it may be.  What a consumer takes meanwhile,
stays his.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from daemonkit.queue.broker import Broker, Delete, NewTask, Reservation, State, Task

AT_ONCE: Final = 100
_ASIDE: Final = 3600.0  # seconds that a buried task is delayed until it is buried again


class Transfer:
    """From one queue to another."""

    def __init__(self, source: Broker, queue: str, target: Broker, target_queue: str) -> None:
        """Nothing is moved yet."""
        self._source = source
        self._queue = queue
        self._target = target
        self._target_queue = target_queue

    def move(self, states: Iterable[State], most: int, moved: Callable[[int], object]) -> int:
        """Move up to ``most`` tasks in ``states``; return how many.

        Args:
            states: ready, delayed, buried; delays, priorities and reasons stay as they are.
            most: tasks.
            moved: told how many more are there.

        Raises:
            BrokerError: one of the brokers cannot be reached, or refuses; what was not moved is where it was.
        """
        done = 0
        movers: Mapping[State, Callable[[int], int | None]] = {
            State.READY: self._move_ready,
            State.DELAYED: self._move_delayed,
            State.BURIED: self._move_buried,
        }
        for state in states:
            while done < most and (step := movers[state](min(most - done, AT_ONCE))) is not None:
                done += step
                moved(step)
        return done

    def _move_ready(self, most: int) -> int | None:
        found = self._source.reserve(self._queue, count=most)
        if not found:
            return None
        self._put([self._again(each, each.id) for each in found])
        lost = self._source.exchange([Delete(each) for each in found], {}, 0).lost
        return len(found) - len(lost)

    def _move_delayed(self, most: int) -> int | None:
        return self._move_peeked(State.DELAYED, most, lambda task: self._again(task, task.id, task.left or 0.0))

    def _move_buried(self, most: int) -> int | None:
        return self._move_peeked(State.BURIED, most, lambda task: self._again(task, task.id, _ASIDE))

    def _move_peeked(self, state: State, most: int, again: Callable[[Task], NewTask]) -> int | None:
        found = self._source.peek_state(self._queue, state, most)
        if not found:
            return None
        count = 0
        for task, id in zip(found, self._put([again(task) for task in found]), strict=True):
            if state is State.BURIED:
                self._target.bury_task(id, task.reason or "")
            if self._source.delete_task(task.id):
                count += 1
            else:  # a consumer has it by now
                self._target.delete_task(id)
        return count

    def _put(self, tasks: list[NewTask]) -> list[str]:
        return self._target.put_many(self._target_queue, tasks)

    def _again(self, task: Reservation | Task, id: str, delay: float = 0.0) -> NewTask:
        key = f"{self._source.url[-150:]}#{id}" if self._target.keeps_keys else None
        return NewTask(task.body, task.priority, delay, task.ttr, key)
