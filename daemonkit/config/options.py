"""The options: one field each, from which flag, environment name, TOML key, help and sample file are made.

``Options`` is frozen and has one field per option, but is no dataclass: importing that module costs 6 to 10 ms
(it draws in inspect and ast), a tenth of the whole start of a daemon, and nothing else in its image needs it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeVar, cast, overload

from daemonkit.core.duration import positive_seconds, seconds
from daemonkit.core.size import in_bytes
from daemonkit.errors import UsageError

T = TypeVar("T")
Schedule = tuple[tuple[int, float], ...]

PREFIX: Final = "DAEMONKIT_"
MAX_NAME: Final = 64  # characters
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
POLICIES: Final = ("refuse", "warn", "close")  # of processes.guard
HARMLESS: Final = frozenset(["CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "WINCH", "ALRM"])  # end no daemon
_LETTERS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")


def check_name(name: str) -> str:
    """Return ``name`` if it can name a daemon, and so its files; UsageError if not."""
    if (
        not name
        or name[0] not in _LETTERS
        or len(name) > MAX_NAME
        or not _LETTERS.issuperset(name.translate(_PUNCTUATION))
    ):
        raise UsageError(
            f"name a daemon {name!r}: up to {MAX_NAME} letters, digits, '.', '_' and '-', the first a letter or digit;"
            " choose another --name"
        )
    if name.endswith((".pid", ".sock")):
        raise UsageError(f"name a daemon {name!r}: its files would end in .pid and .sock twice; choose another --name")
    return name


_PUNCTUATION: Final = str.maketrans("", "", "._-")


def name_of(script: str) -> str:
    """The name that a script's daemon has unless told otherwise: its stem, or its module's last component.

    ``script`` is a path or ``"-m package.module"``; for ``package.__main__`` and ``dir/__main__.py`` the parent counts.
    """
    if script.startswith("-m "):
        parts = script[3:].strip().split(".")
    else:
        parts = os.path.abspath(script).removesuffix(".py").split("/")
    if parts[-1] == "__main__" and len(parts) > 1:
        parts.pop()
    return check_name(parts[-1])


def parse_stop_schedule(value: object, what: str = "stop_schedule") -> Schedule:
    """``"TERM/30/KILL/5"`` as pairs of signal number and seconds to wait after it; UsageError if it is not that."""
    if isinstance(value, tuple):  # parsed before
        return value
    parts = _text(value, what).split("/")
    if len(parts) % 2:
        _refuse(what, value, 'not pairs of signal and seconds, as in "TERM/30/KILL/5"')
    steps: list[tuple[int, float]] = []
    for name, wait in zip(parts[::2], parts[1::2], strict=True):
        if steps and steps[-1][0] == signal.SIGKILL:
            _refuse(what, value, "nothing can follow KILL")
        steps.append((_stop_signal(name, value, what), positive_seconds(wait, what=f"{what}, after {name},")))
    return tuple(steps)


def stop_schedule_as_text(schedule: Schedule) -> str:
    """``schedule`` as it is written on a command line."""
    return "/".join(f"{signal.Signals(number).name[3:]}/{wait:g}" for number, wait in schedule)


def _stop_signal(name: str, value: object, what: str) -> int:
    plain = name.strip().upper().removeprefix("SIG")
    number = getattr(signal, f"SIG{plain}", None)
    if not isinstance(number, signal.Signals):
        _refuse(what, value, f"{name!r} is not a signal{nearest(plain, (s.name[3:] for s in signal.Signals))}")
    if plain in HARMLESS:
        _refuse(what, value, f"{plain} does not end a daemon; use TERM, INT, QUIT or KILL")
    return int(number)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        _refuse(what, value, "not a text")
    if not value.strip() or "\0" in value:
        _refuse(what, value, "empty" if not value.strip() else "holds a NUL character")
    return value


def _seconds(value: object, what: str) -> float:
    return seconds(cast(float, value), what=what)  # refuses other types itself


def _bound(value: object, what: str) -> float:
    return positive_seconds(cast(float, value), what=what)


def _account(value: object, what: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    return _text(value, what)


def _count(value: object, what: str) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(what, value, "not a whole number")
    if value < 1:
        _refuse(what, value, "must be 1 or more")
    return value


def _size(value: object, what: str) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    try:
        return in_bytes(value, what, 0)
    except UsageError:
        _refuse(what, value, 'not a number of bytes, or text such as "200M", "1G"')


def _octal(value: object, what: str) -> int:
    if isinstance(value, str):
        digits = value.strip().removeprefix("0o")
        if not digits or not set(digits) <= set("01234567"):
            _refuse(what, value, 'not an octal number, as in "022"')
        value = int(digits, 8)
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(what, value, 'not an octal number in quotes, as in "022"')
    if not 0 <= value <= 0o777:
        _refuse(what, f"{value:03o}", "must be between 000 and 777")
    return value


def _level(value: object, what: str) -> str:
    level = _text(value, what).strip().upper()
    if level not in LEVELS:
        _refuse(what, value, f"not one of {', '.join(LEVELS)}{nearest(level, LEVELS)}")
    return level


def _policy(value: object, what: str) -> str:
    policy = _text(value, what).strip().lower()
    if policy not in POLICIES:
        _refuse(what, value, f"not one of {', '.join(POLICIES)}{nearest(policy, POLICIES)}")
    return policy


def _name(value: object, what: str) -> str:
    return check_name(_text(value, what))


class Kind(NamedTuple, Generic[T]):
    """What values an option takes; ``parse`` also takes what it returned, so that values can be handed on."""

    name: str
    metavar: str
    unit: str
    parse: Callable[[object, str], T]


NAME: Final = Kind("name", "NAME", "", _name)
PATH: Final = Kind("path", "PATH", "", _text)
TEXT: Final = Kind("text", "URL", "", _text)
USER: Final = Kind("user", "USER", "name or number", _account)
GROUP: Final = Kind("group", "GROUP", "name or number", _account)
MODE: Final = Kind("octal mode", "MODE", "octal", _octal)
SECONDS: Final = Kind("seconds", "SECONDS", 'seconds, or text such as "90s", "5m"', _seconds)
BOUND: Final = Kind("seconds", "SECONDS", 'seconds above 0, or text such as "90s", "5m"', _bound)
SCHEDULE: Final = Kind("schedule", "SCHEDULE", "SIGNAL/SECONDS/...", parse_stop_schedule)
COUNT: Final = Kind("integer", "N", "", _count)
SIZE: Final = Kind("size", "SIZE", 'bytes, or text such as "200M", "1G"', _size)
POLICY: Final = Kind("policy", "POLICY", "|".join(POLICIES), _policy)
LEVEL: Final = Kind("level", "LEVEL", "|".join(LEVELS), _level)


class Option(Generic[T]):
    """One option; as a field of ``Options`` it reads its value.

    ``default`` is written as in a file; None: there is none, and ``doc`` says what happens then.  ``late``: it takes
    effect after the script has been imported, so the script itself may set it.
    """

    __slots__ = ("default", "doc", "key", "kind", "late")

    def __init__(self, kind: Kind[Any], default: str | int | None, doc: str, *, late: bool = False) -> None:
        self.key = ""
        self.kind, self.default, self.doc, self.late = kind, default, doc, late

    def __set_name__(self, owner: type, key: str) -> None:
        self.key = key

    @overload
    def __get__(self, options: None, owner: type) -> Option[T]: ...
    @overload
    def __get__(self, options: Options, owner: type) -> T: ...
    def __get__(self, options: Options | None, owner: type) -> Option[T] | T:
        return self if options is None else cast(T, options._values[self.key])

    def __set__(self, options: Options, value: T) -> NoReturn:
        raise AttributeError(f"set {self.key}: options are frozen; load the configuration again")

    @property
    def flag(self) -> str:
        """``--run-dir``"""
        return "--" + self.key.replace("_", "-")

    @property
    def env(self) -> str:
        """``DAEMONKIT_RUN_DIR``"""
        return PREFIX + self.key.upper()

    @property
    def metavar(self) -> str:
        """What stands for the value in help texts."""
        return self.kind.metavar

    @property
    def unit(self) -> str:
        """What the value is counted or written in; empty if that is plain."""
        return self.kind.unit


class Options:
    """The options in force; paths are absolute, times are seconds."""

    __slots__ = ("_values",)

    name: Option[str | None] = Option(NAME, None, "Name of the daemon and its files (default: the script's stem).")
    run_dir: Option[str] = Option(
        PATH,
        "/run/daemonkit",
        "Directory of PID files and control sockets (for users $XDG_RUNTIME_DIR/daemonkit or /tmp/daemonkit-UID).",
    )
    log: Option[str] = Option(
        PATH,
        "/var/log/daemonkit/NAME.log",
        "Log file; NAME stands for the name (for users in $XDG_STATE_HOME/daemonkit).",
    )
    user: Option[str | None] = Option(USER, None, "User to become, for good (default: whoever starts it).")
    group: Option[str | None] = Option(GROUP, None, "Group to become (default: the user's).")
    umask: Option[int] = Option(MODE, "022", "Permissions withheld from new files.")
    chdir: Option[str | None] = Option(
        PATH, None, "Working directory (default: / for a daemon, unchanged in the foreground)."
    )
    ready_timeout: Option[float] = Option(BOUND, 60, "How long a start may take until the daemon is ready.")
    graceful_timeout: Option[float] = Option(
        SECONDS, 20, "How long the work in hand may take to finish after the request to stop.", late=True
    )
    stop_schedule: Option[Schedule] = Option(
        SCHEDULE, "TERM/30/KILL/5", "Signals that stop a process, each with the time to wait after it.", late=True
    )
    broker: Option[str] = Option(
        TEXT, "sqlite:RUN_DIR/queue.db", "Where tasks are queued; RUN_DIR stands for the run directory.", late=True
    )
    coordinator: Option[str] = Option(
        TEXT, "local:RUN_DIR/cluster", "Where leaders are elected; RUN_DIR stands for the run directory.", late=True
    )
    concurrency: Option[int | None] = Option(
        COUNT, None, "Tasks that run at the same time (default: one per processor).", late=True
    )
    min_free_memory: Option[int] = Option(
        SIZE, "64M", "No task is begun while less memory than this is free, in the machine or the cgroup.", late=True
    )
    fork_guard: Option[str] = Option(
        POLICY, "close", "What children do with connections that the script opened at its import.", late=True
    )
    log_level: Option[str] = Option(LEVEL, "INFO", "Least level that is logged.", late=True)

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Hold ``values``, one for every option, already parsed."""
        self._values: dict[str, Any] = dict(values)

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, Options) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"Options({self._values!r})"


BY_KEY: Final[dict[str, Option[Any]]] = {o.key: o for o in vars(Options).values() if isinstance(o, Option)}
OPTIONS: Final[tuple[Option[Any], ...]] = tuple(BY_KEY.values())


def _refuse(what: str, value: object, why: str) -> NoReturn:
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    raise UsageError(f"{what} = {shown[:60]}: {why}")


def check_keywords(what: str, function: Callable[..., Any], given: Iterable[str]) -> None:
    """See that each name in ``given`` is that of an argument which ``function`` takes by keyword alone.

    Raises:
        UsageError: one is not; the message names the nearest that is.
    """
    code: CodeType = getattr(function, "__code__")  # noqa: B009 - not all that can be called has one
    known = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    for word in given:
        if word not in known:
            near = nearest(word, known) or f"; there are: {', '.join(known)}"
            raise UsageError(f"{what}: there is no option {word!r}{near}")


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?``, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
