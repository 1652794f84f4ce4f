"""A task that was put: where it is, how far it has come, what has come of it."""

from __future__ import annotations

import json
import select
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn

from daemonkit.errors import NoSuchTask, TaskFailed, UsageError
from daemonkit.queue.broker import Broker, State, Task

if TYPE_CHECKING:
    from daemonkit.queue.outlet import Outlet

_LOOK: Final = 1.0  # seconds after which it is looked again, whoever has been silent


class Handle:
    """What ``put`` returns."""

    def __init__(self, outlet: Outlet, queue: str, id: str) -> None:
        """Of task ``id`` in ``queue``."""
        self.queue = queue
        self.id = id
        self._outlet = outlet

    def __repr__(self) -> str:
        return f"Handle(queue={self.queue!r}, id={self.id!r})"

    def __reduce__(self) -> NoReturn:
        raise UsageError(f"{self!r} is not pickled: send its id, and call the task's handle(id) there")

    def state(self) -> str | None:
        """ "ready", "delayed", "reserved" or "buried"; None when it is done or deleted.

        Raises:
            BrokerError: the broker cannot be reached.
        """
        task = self._peek()
        return None if task is None else task.state.value

    def progress(self) -> Any:
        """What the task has said last of how far it has come; None if it has said nothing, or is done.

        Raises:
            BrokerError: the broker cannot be reached.
        """
        task = self._peek()
        return None if task is None or task.progress is None else json.loads(task.progress)

    def result(self, timeout: float | None = None) -> Any:
        """What the function has returned; wait until it has.

        For tasks with ``keep_result``, and for so long.

        Args:
            timeout: seconds; None: without end.

        Raises:
            TaskFailed: it is buried; the message is the reason.
            NoSuchTask: it was deleted, or its result is not kept, or no longer.
            TimeoutError: it is not done by then.
            BrokerError: the broker cannot be reached.
        """
        if timeout is not None and not (isinstance(timeout, int | float) and timeout >= 0):
            raise UsageError(f"result(timeout={timeout!r}): it must be 0 or more seconds, or None")
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._outlet.broker() as broker:
                fd = broker.watch()
                broker.drain()
                found = self._look(broker)
            if found is not None:
                return json.loads(found)
            left = _LOOK if end is None else min(end - time.monotonic(), _LOOK)
            if left <= 0:
                raise TimeoutError(f"task {self.id} of {self.queue} is not done after {timeout:g} s")
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(left * 1000)

    def _look(self, broker: Broker) -> bytes | None:
        """The result; None if there is none yet."""
        found = broker.result(self.id)
        if found is not None:
            return found
        task = broker.peek(self.id)
        if task is not None and task.state is State.BURIED:
            raise TaskFailed(f"task {self.id} of {self.queue}: {task.reason}")
        if task is None and (found := broker.result(self.id)) is None:  # it may have been done in between
            raise NoSuchTask(f"task {self.id} of {self.queue}: it is done or deleted, and no result of it is kept")
        return found

    def _peek(self) -> Task | None:
        with self._outlet.broker() as broker:
            return broker.peek(self.id)
