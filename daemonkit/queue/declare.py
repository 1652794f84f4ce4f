"""From the words of ``@task`` to what is done with the tasks, or to the sentence that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

from daemonkit.core.duration import positive_seconds, seconds
from daemonkit.core.plain import plain_code
from daemonkit.errors import UsageError
from daemonkit.queue.broker import DEFAULT_PRIORITY, DEFAULT_TTR
from daemonkit.queue.checks import LONGEST, check_priority, check_queue, check_seconds

OPTIONS: Final = ("delay", "priority", "ttr", "key")  # of put, and so no names of a task's parameters
MODES: Final = ("fork", "prefork")
MOST: Final = 10_000  # processes at once


class Policy(NamedTuple):
    """What is done with the tasks of a function.  Times in seconds."""

    queue: str
    priority: int
    ttr: float
    max_retries: int
    backoff: float  # before the first retry; doubled for each further one,
    max_backoff: float  # up to this
    timeout: float | None  # then its process is killed, with all that it has started
    soft_timeout: float | None  # then TaskTimeout is raised in it
    concurrency: int | None  # processes of the queue at once; None: as many as all tasks may be
    unique: bool  # no two with the same arguments are in the queue
    mode: str  # "fork": each has a process of its own; "prefork": processes are kept for many
    keep_result: float  # seconds for which what it returns is kept; 0: not at all

    def wait(self, failures: int, chance: float) -> float:
        """Seconds until the next attempt, after ``failures`` earlier ones; ``chance``, 0 to 1, spreads them."""
        delay = min(self.backoff * 2.0 ** min(failures, 60), self.max_backoff)
        return min(delay * (0.9 + 0.2 * chance), LONGEST)


def policy(
    what: str,
    queue: str = "default",
    *,
    priority: int = DEFAULT_PRIORITY,
    ttr: float | str = DEFAULT_TTR,
    max_retries: int = 3,
    backoff: float | str = 5,
    max_backoff: float | str = 3600,
    timeout: float | str | None = None,
    soft_timeout: float | str | None = None,
    concurrency: int | None = None,
    unique: bool = False,
    mode: str = "fork",
    keep_result: float | str = 0,
) -> Policy:
    """The options of ``@task``, checked.  Times are seconds, or text such as "90s", "5m".

    Args:
        what: names the task in errors.
        queue: where its tasks are put.
        priority: lower ones are done first; 0 is the most urgent.
        ttr: for so long a task is its consumer's, which says again and again that it lives: it is the time after which
            a task of a host that has died is done by another, and no limit for the task.
        max_retries: a task that fails is tried again so often, then buried.
        backoff: wait before the first retry, doubled for each further one and changed by chance by up to a tenth,
        max_backoff: up to this.
        timeout: a task that takes longer is killed, with all that it has started, and has failed.
        soft_timeout: after that time TaskTimeout is raised in it, so that it can tidy up.
        concurrency: so many of the queue's tasks run at the same time.
        mode: "fork": each task has a process of its own, which no other task shares.  "prefork": processes are kept,
            for tasks that are many and short; each must be done within nine tenths of its ttr; a queue has one mode.
        keep_result: what the function returns, which JSON must have, is kept so long for ``handle.result()``.
        unique: a put with the arguments of a task that is there, in whatever state, is no second task.

    Raises:
        UsageError: a value that cannot be meant.
    """
    hard, soft = _time(timeout, f"{what}, timeout"), _time(soft_timeout, f"{what}, soft_timeout")
    if hard is not None and soft is not None and soft >= hard:
        raise UsageError(f"{what}: soft_timeout={soft_timeout!r} must be less than timeout={timeout!r}")
    if not isinstance(unique, bool):
        raise UsageError(f"{what}: unique={unique!r} must be True or False")
    if mode not in MODES:
        raise UsageError(f"{what}: mode={mode!r} is not one of {', '.join(MODES)}")
    lifetime = check_seconds(positive_seconds(ttr, what=f"{what}, ttr"), f"{what}, ttr")
    if mode == "prefork" and max(hard or 0, soft or 0) > lifetime:
        raise UsageError(f'{what}: with mode="prefork" a time-out may not be longer than the ttr, {lifetime:g} s')
    try:
        check_queue(queue)
        check_priority(priority)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    return Policy(
        queue,
        priority,
        lifetime,
        _count(max_retries, f"{what}, max_retries", 0),
        check_seconds(seconds(backoff, what=f"{what}, backoff"), f"{what}, backoff"),
        check_seconds(seconds(max_backoff, what=f"{what}, max_backoff"), f"{what}, max_backoff"),
        lifetime if mode == "prefork" and hard is None else hard,
        soft,
        None if concurrency is None else _count(concurrency, f"{what}, concurrency", 1),
        unique,
        mode,
        check_seconds(seconds(keep_result, what=f"{what}, keep_result"), f"{what}, keep_result"),
    )


def check_function(function: Callable[..., Any], what: str) -> None:
    """See that the function can be a task.

    Raises:
        UsageError: it cannot.
    """
    parameters = _parameters(function, what)
    for name in OPTIONS:
        if name in parameters:
            raise UsageError(f"{what}: its parameter {name!r} is an option of put(); give it another name")


def _parameters(function: Callable[..., Any], what: str) -> Collection[str]:
    if code := plain_code(function):
        if code.co_varnames[:1] == ("self",):
            raise UsageError(f"{what}: it would be called without its object; put @task above a function")
        return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    import inspect

    if not callable(function) or isinstance(function, type):
        raise UsageError(f"{what}: put it above a function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise UsageError(f"{what}: put it above a plain function; use asyncio.run() inside one for coroutines")
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UsageError(f"{what}: its arguments cannot be known; put @task above a function of your own") from None


def check_name(name: Any, what: str) -> str:
    """Return ``name`` if it can name a task.

    Raises:
        UsageError: it cannot.
    """
    if not isinstance(name, str) or not name.isprintable() or not name or " " in name:
        raise UsageError(f"{what}: name={name!r} must be a text without spaces that can be printed")
    return name


def _count(value: Any, what: str, least: int) -> int:
    if type(value) is not int or not least <= value <= MOST:
        raise UsageError(f"{what}={value!r} must be a whole number from {least} to {MOST}")
    return value


def _time(value: float | str | None, what: str) -> float | None:
    return None if value is None else check_seconds(positive_seconds(value, what=what), what)
