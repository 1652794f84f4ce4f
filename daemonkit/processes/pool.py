"""Calls in processes of their own: an executor of the standard library that nobody has to fear."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Final

from daemonkit.errors import UsageError
from daemonkit.processes import call as child_call
from daemonkit.processes import mainmodule, pickled
from daemonkit.processes.assignment import Assignment, Limits
from daemonkit.processes.dispatch import Dispatcher
from daemonkit.processes.future import Call
from daemonkit.processes.item import Item
from daemonkit.processes.outcomes import Outcomes

_MOST: Final = {"timeout": 10**9, "max_rss": 2**62, "cpu": 10**9}  # a call without a limit has None


class Pool(Executor):
    """Runs calls in child processes: a fresh one for each call, or children that are kept for several.

    The children are forked by a small interpreter of the pool's own, never from this process: its threads, memory and
    connections are not theirs (law 3).  One that dies takes its own call with it, and nothing else: WorkerLost.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        reuse: int | None = 1,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_pending: int | None = None,
        timeout: float | None = None,
        max_rss: float | None = None,
        cpu: float | None = None,
    ) -> None:
        """Start nothing yet: the first call does.

        Args:
            max_workers: calls that run at once; None: as many as this process may use processors.
            reuse: calls that a child is kept for; None: any number.
            initializer: called with ``initargs`` in each child first.
            initargs: its arguments.
            max_pending: calls that may wait for a child; ``submit`` blocks when there are more.
            timeout: for each call, in seconds; see ``options``.
            max_rss: for each call, in bytes; see ``options``.
            cpu: for each call, in seconds; see ``options``.

        Raises:
            UsageError: a number cannot be meant.
        """
        self._limits = _checked(Limits(timeout, max_rss, cpu))
        if not (reuse is None or _is_count(reuse)):
            raise UsageError(f"reuse must be greater than 0 and whole, or None for any number of calls, not {reuse!r}")
        if not (max_pending is None or _is_count(max_pending)):
            raise UsageError(f"max_pending must be greater than 0 and whole, not {max_pending!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        width = _width(_processors() if max_workers is None else max_workers)
        first = pickled.dumps_call((initializer, initargs)) if initializer is not None else b""
        self._prefix = first if reuse == 1 else b""
        self._outcomes = Outcomes()
        self._dispatcher = Dispatcher(width, reuse, max_pending, first, self._outcomes.forsake)
        weakref.finalize(self, self._dispatcher.close).atexit = False
        mainmodule.accept_alias()

    @property
    def max_workers(self) -> int:
        """Calls that run at once; may be set while the pool works."""
        return self._dispatcher.width

    @max_workers.setter
    def max_workers(self, number: int) -> None:
        self._dispatcher.width = _width(number)
        self._dispatcher.wake()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Call:
        """Have ``fn(*args, **kwargs)`` called in a child; its future.

        What cannot be pickled is told by the future.

        Raises:
            RuntimeError: the pool is shut down, or belongs to another process.
        """
        return self._submit(self._limits, fn, args, kwargs)

    def options(
        self,
        *,
        timeout: float | None = None,
        max_rss: float | None = None,
        cpu: float | None = None,
        on_progress: Callable[[Any], object] | None = None,
        block: bool = True,
    ) -> Options:
        """The same pool for calls with limits: ``pool.options(timeout=5).submit(func)``.

        Args:
            timeout: seconds from the start of the call; then its child is killed, with all that descends from it
                (CallTimeout).
            max_rss: bytes of private memory (setrlimit(2), RLIMIT_DATA: heap and anonymous mappings, touched or not);
                the allocation that exceeds them raises MemoryError in the call.
            cpu: seconds of processor time, rounded up to whole ones (RLIMIT_CPU); then SIGXCPU ends the child
                (WorkerLost).
            on_progress: called, in a thread of the pool, with what the call gives to ``daemonkit.progress``.
            block: False: ``submit`` raises PoolFull instead of waiting when ``max_pending`` calls wait.

        Raises:
            UsageError: a number cannot be meant.
        """
        own = self._limits
        limits = Limits(
            own.timeout if timeout is None else timeout,
            own.max_rss if max_rss is None else max_rss,
            own.cpu if cpu is None else cpu,
            on_progress,
            block,
        )
        return Options(self, _checked(limits))

    def _submit(self, limits: Limits, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = Call(self._dispatcher, _name(fn), limits)
        try:
            self._outcomes.expect(call)
            self._ask(call, fn, args, kwargs)
        except BaseException:  # refused; or control-C, wherever it struck
            call.cancel()
            raise
        return call

    def _ask(self, call: Assignment, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            pickle = pickled.dumps_call((fn, args, kwargs))
        except Exception as error:  # noqa: BLE001 - it is the call's to tell
            call.set_exception(error)
            return
        limits = call.limits
        call.request = child_call.request(pickle, int(limits.max_rss or 0), limits.cpu or 0, self._prefix)
        self._dispatcher.submit(call)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """The results of ``fn`` for the items, in order, as ``map`` would give them.

        Args:
            fn: called in children.
            iterables: its arguments.
            timeout: seconds from now after which asking for a further result raises TimeoutError.
            chunksize: items for each call.
            buffersize: calls that are submitted ahead of the iteration; None: all at once.
        """
        return self._map(self._limits, fn, iterables, timeout, chunksize, buffersize)

    def _map(
        self,
        limits: Limits,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
    ) -> Iterator[Any]:
        if chunksize < 1:
            raise UsageError(f"chunksize must be at least 1, not {chunksize!r}")
        if buffersize is not None and not _is_count(buffersize):
            raise UsageError(f"buffersize must be greater than 0 and whole, or None, not {buffersize!r}")
        end = None if timeout is None else time.monotonic() + timeout
        items = zip(*iterables, strict=False)
        if chunksize == 1:
            submit = partial(self._submit_items, limits, fn)
            return _results(map(submit, items), end, buffersize)
        chunks = iter(lambda: tuple(islice(items, chunksize)), ())
        submit = partial(self._submit_chunk, limits, fn)
        return _flat(_results(map(submit, chunks), end, buffersize))

    def _submit_items(self, limits: Limits, fn: Callable[..., Any], items: tuple[Any, ...]) -> Item:
        item = Item(self._dispatcher, _name(fn), limits)
        self._ask(item, fn, items, {})
        return item

    def _submit_chunk(self, limits: Limits, fn: Callable[..., Any], chunk: tuple[tuple[Any, ...], ...]) -> Item:
        return self._submit_items(limits, child_call.run_chunk, (fn, chunk))

    def results(self, timeout: float | None = None) -> Iterator[Any]:
        """The results of submitted calls as they finish, until none is left; a failed call's exception is raised.

        Calls whose outcome somebody has asked the future for, and those of ``map``, are not among them; the latest
        10,000 outcomes are kept.  After an exception the next iteration goes on with the next call.

        Args:
            timeout: seconds to wait for each result; TimeoutError then.
        """
        return self._outcomes.read(timeout)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls; what was accepted is done, unless ``cancel_futures`` takes back what has not begun.

        Args:
            wait: return when all is done and every child has ended.
            cancel_futures: cancel the calls that wait.
        """
        self._dispatcher.close(cancel_futures)
        if wait:
            self._dispatcher.join()

    def kill(self) -> None:
        """End the pool now: calls that wait are cancelled, those that run are killed with all they have started."""
        self._dispatcher.close(kill=True)
        self._dispatcher.join()


class Options(Executor):
    """A pool whose calls have limits; made by ``Pool.options``."""

    def __init__(self, pool: Pool, limits: Limits) -> None:
        """Use ``Pool.options``."""
        self._pool = pool
        self._limits = limits

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Call:
        """As ``Pool.submit``, within the limits."""
        return self._pool._submit(self._limits, fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """As ``Pool.map``, each call within the limits."""
        return self._pool._map(self._limits, fn, iterables, timeout, chunksize, buffersize)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the pool down."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the pool as it is: it is not ours."""


def _results(calls: Iterator[Item], end: float | None, ahead: int | None) -> Iterator[Any]:
    """Submit now what is to be ahead, and give the results later."""
    waiting = deque(islice(calls, ahead))
    # What has submitted all must not hold on to the pool: it ends when nobody does.
    return _in_order(waiting, iter(()) if ahead is None else calls, end)


def _in_order(waiting: deque[Item], calls: Iterator[Item], end: float | None) -> Iterator[Any]:
    try:
        while waiting:
            yield _result(_next(waiting, calls), end)  # no name here holds on to it
    finally:
        for left in waiting:
            left.cancel()


def _next(waiting: deque[Item], calls: Iterator[Item]) -> Item:
    call = waiting.popleft()
    waiting.extend(islice(calls, 1))
    return call


def _result(call: Item, end: float | None) -> Any:
    """Without a reference of ours to the result, or from its traceback to us (an exception holds its frames)."""
    try:
        try:
            return call.take(None if end is None else end - time.monotonic())
        except BaseException:
            call.cancel()
            raise
    finally:
        del call


def _flat(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


def _checked(limits: Limits) -> Limits:
    for name, value in zip(("timeout", "max_rss", "cpu"), limits[:3], strict=True):
        if value is not None and not (_is_number(value) and 0 < value <= _MOST[name]):
            raise UsageError(f"{name} must be a number greater than 0 and at most {_MOST[name]}, not {value!r}")
    return limits


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


def _width(number: int) -> int:
    if not _is_count(number):
        raise UsageError(f"max_workers must be greater than 0 and whole, not {number!r}")
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _processors() -> int:
    return len(os.sched_getaffinity(0))
