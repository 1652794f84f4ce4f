"""From the words of a script to a ``Worker``, or to the sentence that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, Final

from daemonkit.config.options import parse_stop_schedule
from daemonkit.core.duration import positive_seconds
from daemonkit.core.plain import plain_code
from daemonkit.core.size import in_bytes
from daemonkit.errors import UsageError
from daemonkit.processes.worker import MOST, Recycling, Restarts, Worker

_MORE: Final = 0x04 | 0x08  # flags of *args, **kwargs (inspect, CO_VARARGS, CO_VARKEYWORDS)


def worker(
    function: Callable[..., Any],
    count: int = 1,
    name: str | None = None,
    *,
    readiness: bool = False,
    essential: bool = False,
    heartbeat_timeout: float | str | None = None,
    max_tasks: int | None = None,
    max_age: float | str | None = None,
    max_rss: int | str | None = None,
    recycle_jitter: float = 0.1,
    max_restarts: int = 10,
    restart_window: float | str = 60,
    backoff: float | str = 1,
    max_backoff: float | str = 30,
    stop_schedule: str | None = None,
    leader: bool = False,
) -> Worker:
    """Describe a worker.  Times are seconds, or text such as "90s", "5m".

    Args:
        function: called with the stop flag, and with the worker's index if it takes a second argument.
        count: processes.
        name: default: the function's.
        readiness: the function calls ``stop.ready()`` when its set-up is done; else its first look at the flag counts.
        essential: when it is fatal the daemon ends, with exit code 1.
        heartbeat_timeout: a worker that did not look at the flag, or call ``stop.heartbeat()``, for so long is killed.
        max_tasks: it makes room for a fresh one after so many looks at the flag,
        max_age: after that time,
        max_rss: or with more bytes of memory than that ("200M"), each checked when it looks at the flag.
        recycle_jitter: each limit is exceeded by a random share of itself up to this.
        max_restarts: restarts within ``restart_window``; one more, and the worker is given up as fatal.  With the
            defaults of the four, one that always fails at once is tried again every 30 s, for ever.
        restart_window: see ``max_restarts``.
        backoff: wait before the second restart in the window, doubled for each further one,
        max_backoff: up to this.
        stop_schedule: signals and waits that stop it, as "TERM/30/KILL/5"; default: the configuration's.
        leader: run it only while this daemon leads those of its name; when it does no more it is stopped, and killed
            before another can lead.

    Raises:
        UsageError: a value that cannot be meant.
    """
    own = name or str(getattr(function, "__name__", type(function).__name__))
    what = f"@worker {own}"
    return Worker(
        _name(own, "@worker"),
        function,
        (),
        _count(count, f"{what}, count", 0, MOST),
        _wants_index(function, what),
        _flag(readiness, f"{what}, readiness"),
        _flag(essential, f"{what}, essential"),
        _time(heartbeat_timeout, f"{what}, heartbeat_timeout"),
        None if stop_schedule is None else parse_stop_schedule(stop_schedule, f"{what}, stop_schedule"),
        Recycling(
            None if max_tasks is None else _count(max_tasks, f"{what}, max_tasks"),
            _time(max_age, f"{what}, max_age"),
            None if max_rss is None else in_bytes(max_rss, f"{what}, max_rss"),
            _share(recycle_jitter, f"{what}, recycle_jitter"),
        ),
        _restarts(what, max_restarts, restart_window, backoff, max_backoff),
        leader=_flag(leader, f"{what}, leader"),
    )


def program(
    name: str,
    argv: Sequence[str],
    count: int = 1,
    *,
    essential: bool = False,
    max_restarts: int = 10,
    restart_window: float | str = 60,
    backoff: float | str = 1,
    max_backoff: float | str = 30,
    stop_schedule: str | None = None,
) -> Worker:
    """Describe a program that is kept alive as a worker is; the options are a worker's.

    Raises:
        UsageError: a value that cannot be meant.
    """
    what = f"program({name!r})"
    if not isinstance(argv, list | tuple) or not argv or not all(_is_word(word) for word in argv):
        raise UsageError(f'{what}: argv={argv!r} must be a list of texts, the program first: ["sleep", "60"]')
    return Worker(
        _name(name, "program"),
        None,
        tuple(argv),
        _count(count, f"{what}, count", 0, MOST),
        essential=_flag(essential, f"{what}, essential"),
        stop_schedule=None if stop_schedule is None else parse_stop_schedule(stop_schedule, f"{what}, stop_schedule"),
        restarts=_restarts(what, max_restarts, restart_window, backoff, max_backoff),
    )


def _restarts(what: str, most: int, window: float | str, backoff: float | str, longest: float | str) -> Restarts:
    return Restarts(
        _count(most, f"{what}, max_restarts", 0),
        positive_seconds(window, what=f"{what}, restart_window"),
        positive_seconds(backoff, what=f"{what}, backoff"),
        positive_seconds(longest, what=f"{what}, max_backoff"),
    )


def _wants_index(function: Callable[..., Any], what: str) -> bool:
    if (whole := plain_code(function)) is not None and whole.co_varnames[:1] == ("self",):
        raise UsageError(f"{what}: it would be called without its object; declare the method of one: worker(it.run)")
    if (code := _simple_code(function)) is not None:
        return code.co_argcount == 2
    import inspect

    is_plain = not (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function))
    if not callable(function) or not is_plain or inspect.isgeneratorfunction(function):
        raise UsageError(f"{what}: put it above a plain function: def crunch(stop), or def crunch(stop, index)")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    for arguments in (2, 1):
        try:
            signature.bind(*range(arguments))
        except TypeError:
            continue
        return arguments == 2
    raise UsageError(f"{what}: it is called with (stop) or (stop, index); it takes {signature}")


def _simple_code(function: Any) -> CodeType | None:
    """Its code if it is a ``def crunch(stop)`` or ``def crunch(stop, index)`` and nothing more, as nearly all are."""
    code = plain_code(function)
    if code is None or function.__defaults__ or code.co_flags & _MORE or code.co_kwonlyargcount:
        return None
    return code if code.co_argcount in (1, 2) else None


def _name(name: Any, what: str) -> str:
    if not isinstance(name, str) or not name.isprintable() or not name or " " in name:
        raise UsageError(f"{what}: name={name!r} must be a text without spaces that can be printed")
    return name


def _count(value: Any, what: str, least: int = 1, most: int | None = None) -> int:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"from {least} to {most}"
        raise UsageError(f"{what}={value!r} must be a whole number, {bounds}")
    return value


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{what}={value!r} must be True or False")
    return value


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _time(value: float | str | None, what: str) -> float | None:
    return None if value is None else positive_seconds(value, what=what)


def _share(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UsageError(f"{what}={value!r} must be a number from 0 to 1")
    return float(value)
