"""The options: one field each, from which flag, environment name, TOML key, help and sample file are made.

Each source is weaker than the one before it: command line, environment (``DAEMONKIT_KEY``), ``[daemon.NAME]``,
``[daemon]``, the script, the default.  A value is checked wherever it stands, also where a stronger one wins.

``Options`` is frozen and has one field per option, but is no dataclass: importing that module costs 6 to 8 ms
(it draws in inspect and ast), four times what this one does, and nothing else in its image needs it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Generic, NamedTuple, Never, NoReturn, TypeVar, cast, overload

from daemonkit.core.duration import positive_seconds, seconds
from daemonkit.errors import ConfigError, UsageError

T = TypeVar("T")
Schedule = tuple[tuple[int, float], ...]

PREFIX: Final = "DAEMONKIT_"
CONFIG_VARIABLE: Final = "DAEMONKIT_CONFIG"
LOCAL_FILE: Final = "etc/daemonkit.toml"  # in the working directory
SYSTEM_FILE: Final = "/etc/daemonkit/daemonkit.toml"
MAX_FILE: Final = 1 << 20  # bytes; /dev/zero is no configuration
MAX_NAME: Final = 64  # characters
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
HARMLESS: Final = frozenset(["CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "WINCH", "ALRM"])  # end no daemon
_LETTERS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
COMMAND_LINE: Final = "command line"
ENVIRONMENT: Final = "environment"
SCRIPT: Final = "script"
DEFAULT: Final = "default"


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
    if isinstance(value, list | tuple):  # parsed before
        return tuple((int(number), float(wait)) for number, wait in value)
    parts = _text(value, what).split("/")
    if len(parts) % 2:
        _refuse(what, value, 'not pairs of signal and seconds, as in "TERM/30/KILL/5"')
    steps: list[tuple[int, float]] = []
    for name, wait in zip(parts[::2], parts[1::2], strict=True):
        if steps and steps[-1][0] == signal.SIGKILL:
            _refuse(what, value, "nothing can follow KILL")
        steps.append((_stop_signal(name, value, what), positive_seconds(wait, what=f"{what}, after {name},")))
    return tuple(steps)


def _stop_signal(name: str, value: object, what: str) -> int:
    plain = name.strip().upper().removeprefix("SIG")
    number = getattr(signal, f"SIG{plain}", None)
    if not isinstance(number, signal.Signals):
        _refuse(what, value, f"{name!r} is not a signal{_nearest(plain, (s.name[3:] for s in signal.Signals))}")
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
        _refuse(what, value, f"not one of {', '.join(LEVELS)}{_nearest(level, LEVELS)}")
    return level


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

    def __set__(self, options: Options, value: Never) -> NoReturn:
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

    name = Option[str | None](NAME, None, "Name of the daemon and its files (default: the script's stem).")
    run_dir = Option[str](
        PATH,
        "/run/daemonkit",
        "Directory of PID files and control sockets (for users $XDG_RUNTIME_DIR/daemonkit or /tmp/daemonkit-UID).",
    )
    log = Option[str](
        PATH,
        "/var/log/daemonkit/NAME.log",
        "Log file; NAME stands for the name (for users in $XDG_STATE_HOME/daemonkit).",
    )
    user = Option[str | None](USER, None, "User to become, for good (default: whoever starts it).")
    group = Option[str | None](GROUP, None, "Group to become (default: the user's).")
    umask = Option[int](MODE, "022", "Permissions withheld from new files.")
    chdir = Option[str | None](PATH, None, "Working directory (default: / for a daemon, unchanged in the foreground).")
    ready_timeout = Option[float](BOUND, 60, "How long a start may take until the daemon is ready.")
    graceful_timeout = Option[float](
        SECONDS, 30, "How long the work in hand may take to finish after the request to stop.", late=True
    )
    stop_schedule = Option[Schedule](
        SCHEDULE, "TERM/30/KILL/5", "Signals that stop a process, each with the time to wait after it.", late=True
    )
    broker = Option[str](
        TEXT, "sqlite:RUN_DIR/queue.db", "Where tasks are queued; RUN_DIR stands for the run directory.", late=True
    )
    coordinator = Option[str](
        TEXT, "local:RUN_DIR/cluster", "Where leaders are elected; RUN_DIR stands for the run directory.", late=True
    )
    concurrency = Option[int | None](
        COUNT, None, "Tasks that run at the same time (default: one per processor).", late=True
    )
    log_level = Option[str](LEVEL, "INFO", "Least level that is logged.", late=True)

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Hold ``values``, one for every option, already parsed."""
        self._values: dict[str, Any] = dict(values)

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, Options) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"Options({self._values!r})"


_BY_KEY: Final[dict[str, Option[Any]]] = {o.key: o for o in vars(Options).values() if isinstance(o, Option)}
OPTIONS: Final[tuple[Option[Any], ...]] = tuple(_BY_KEY.values())


class Configuration(NamedTuple):
    """The options, where each of them came from, and what the file holds for the script itself."""

    options: Options
    sources: dict[str, str]  # "command line", "environment", "PATH [daemon.NAME]", "script" or "default"
    config_path: str | None
    settings: dict[str, Any]  # [settings] and [settings.NAME]; dates and times as ISO 8601 text

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can carry it to another process image."""
        return {**self._asdict(), "options": self.options._values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Configuration:
        """Undo ``as_dict``, through JSON or not; UsageError if the data are not that."""
        given = data["options"]
        values = {o.key: None if given[o.key] is None else o.kind.parse(given[o.key], o.key) for o in OPTIONS}
        return cls(Options(values), dict(data["sources"]), data["config_path"], dict(data["settings"]))


class _Layer(NamedTuple):
    """The options of one source, not yet read."""

    source: str
    what: str  # how messages call an option
    base: str  # what paths are relative to
    raw: Mapping[str, object]
    error: Callable[[str, str], UsageError]  # from key and message


def load(
    name: str | None,
    *,
    command_line: Mapping[str, Any],
    environ: Mapping[str, str],
    script: Mapping[str, Any] | None = None,
    config_path: str | None = None,
    cwd: str,
    uid: int | None = None,
) -> Configuration:
    """Read the configuration of the daemon ``name`` (None: of none in particular) from all its sources.

    Args:
        command_line: option key -> value; None for a flag that was not given.
        environ: the variables, at least those of ``relevant``; an empty one counts as not set.
        script: what the script itself asks for.
        config_path: a file that must exist; otherwise the first of the well-known ones that does.
        cwd: absolute; what relative paths, but for those in a file, are relative to.
        uid: whose default directories; that of the start, if privileges were dropped since.

    Raises:
        UsageError: an option on the command line or in the script is unknown or wrong.
        ConfigError: the same in the file or the environment, or the file cannot be read.
        UntrustedFile: somebody else may change the file.
    """
    if name is not None:
        check_name(name)
    file = _find(config_path, environ, cwd)
    layers = [
        _Layer(SCRIPT, "{key}, given by the script,", cwd, script or {}, _usage_error),
        *(file.layers(name) if file else ()),
        _Layer(ENVIRONMENT, "{env}", cwd, _from_environment(environ), _config_error),
        _Layer(COMMAND_LINE, "{flag}", cwd, command_line, _usage_error),
    ]
    values = _defaults(environ, os.geteuid() if uid is None else uid)
    sources = dict.fromkeys(_BY_KEY, DEFAULT)
    for layer in layers:
        read = _parse(layer, environ)
        values.update(read)
        sources.update(dict.fromkeys(read, layer.source))
    _fill_in(values, name)
    return Configuration(Options(values), sources, file and file.path, file.settings(name) if file else {})


def relevant(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ``load`` looks at, for whoever will load again in another environment."""
    wanted = ("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")
    return {key: value for key, value in environ.items() if key.startswith(PREFIX) or key in wanted}


def _parse(layer: _Layer, environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for key, raw in layer.raw.items():
        if raw is None:
            continue
        option = _BY_KEY.get(key)
        if option is None:
            raise layer.error(key, f"unknown option {key!r}{_nearest(key, _BY_KEY)}")
        try:
            value = option.kind.parse(raw, layer.what.format(key=key, flag=option.flag, env=option.env))
        except UsageError as error:
            raise layer.error(key, str(error)) from None
        values[key] = _absolute(value, layer.base, environ) if option.kind is PATH else value
    return values


def _absolute(path: str, base: str, environ: Mapping[str, str]) -> str:
    if path == "~" or path.startswith("~/"):
        path = _home(environ) + path[1:]
    return os.path.normpath(os.path.join(base, path))


def _defaults(environ: Mapping[str, str], uid: int) -> dict[str, Any]:
    """Every option's default; only root's directories are the ones that the fields tell."""
    values = {o.key: None if o.default is None else o.kind.parse(o.default, o.key) for o in OPTIONS}
    if uid != 0:
        runtime = _xdg(environ, "XDG_RUNTIME_DIR")
        state = _xdg(environ, "XDG_STATE_HOME") or os.path.join(_home(environ), ".local/state")
        values["run_dir"] = os.path.join(runtime, "daemonkit") if runtime else f"/tmp/daemonkit-{uid}"
        values["log"] = os.path.join(state, "daemonkit/NAME.log")
    return values


def _fill_in(values: dict[str, Any], name: str | None) -> None:
    """Put the real ones for the words NAME and RUN_DIR."""
    if name is not None:
        values["name"] = name
        directory, _, file = values["log"].rpartition("/")
        values["log"] = f"{directory}/{'.'.join(name if part == 'NAME' else part for part in file.split('.'))}"
    for key in ("broker", "coordinator"):
        values[key] = values[key].replace("RUN_DIR", values["run_dir"])


def _xdg(environ: Mapping[str, str], key: str) -> str | None:
    path = environ.get(key, "")
    return path if path.startswith("/") else None  # "must be absolute ... ignore it" (XDG Base Directory)


def _home(environ: Mapping[str, str]) -> str:
    if home := environ.get("HOME"):
        return home
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/"


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    by_variable = {option.env: key for key, option in _BY_KEY.items()}
    found = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable not in by_variable:
            near = _nearest(variable, [*by_variable, CONFIG_VARIABLE])
            raise ConfigError(f"read the environment: unknown variable {variable}{near}")
        if value:
            found[by_variable[variable]] = value
    return found


class _File(NamedTuple):
    """A configuration file that has been read, and found to hold known tables only."""

    path: str
    text: str
    tables: dict[str, Any]

    def layers(self, name: str | None) -> list[_Layer]:
        """The options for all daemons, then those for this one."""
        shared = {key: value for key, value in self._daemon.items() if not isinstance(value, dict)}
        layers = [self._layer("daemon", shared)]
        for section, options in self._daemon.items():
            if isinstance(options, dict):
                self._check_section(section)
                layer = self._layer(f"daemon.{section}", options)
                layers += [layer] if section == name else []
        return layers

    def settings(self, name: str | None) -> dict[str, Any]:
        """What the file holds for the script: for all of them, and over it for this one."""
        table = self.tables.get("settings", {})
        shared = {key: value for key, value in table.items() if not isinstance(value, dict)}
        own = table.get(name, {}) if name else {}
        plain = _plain({**shared, **(own if isinstance(own, dict) else {})})
        return cast(dict[str, Any], plain)

    def check_tables(self) -> None:
        """Refuse what is neither [daemon] nor [settings]."""
        for key, value in self.tables.items():
            if key in _BY_KEY and not isinstance(value, dict):
                raise self.error("", key, f"{key} stands outside any table; put it under [daemon]")
            if key in ("cluster", "queue"):
                raise self.error(key, "", f"[{key}] means nothing to this version of daemonkit; remove it")
            if key not in ("daemon", "settings"):
                near = _nearest(key, ("daemon", "settings"))
                raise self.error(key, key, f"unknown table or key {key!r}{near or '; use [daemon] or [settings]'}")
            if not isinstance(value, dict):
                raise self.error(key, key, f"{key} must be a table: write [{key}]")

    def error(self, table: str, key: str, why: str) -> ConfigError:
        """The error, with the line that it is about if that can be told."""
        line = _line(self.text, table, key)
        return ConfigError(f"read {self.path}{f':{line}' if line else ''}: {why}")

    @property
    def _daemon(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.tables.get("daemon", {}))

    def _check_section(self, section: str) -> None:
        try:
            check_name(section)
        except UsageError as error:
            raise self.error(f"daemon.{section}", "", f"[daemon.{section!r}]: {error}") from None

    def _layer(self, table: str, options: dict[str, Any]) -> _Layer:
        """The table's options; the keys of all tables are checked, whichever daemon is meant."""
        for key, value in options.items():
            if key not in _BY_KEY:
                dotted = f'; quote a name that holds a dot: [daemon."{table[7:]}.{key}"]'
                hint = dotted if isinstance(value, dict) else _nearest(key, _BY_KEY)
                raise self.error(table, key, f"[{table}] has the unknown key {key!r}{hint}")
            if key == "name":
                raise self.error(table, key, f"[{table}] name: only --name can name a daemon; write [daemon.NAME]")
            if _BY_KEY[key].kind is MODE and not isinstance(value, str):
                # TOML reads 22 as decimal and 0o22 as the same kind of number: only text tells what was meant.
                raise self.error(table, key, f'[{table}] {key} = {value!r}: write it in quotes, as in "022"')

        def error(key: str, why: str) -> ConfigError:
            return self.error(table, key, why)

        return _Layer(f"{self.path} [{table}]", f"[{table}] {{key}}", os.path.dirname(self.path), options, error)


def _find(config_path: str | None, environ: Mapping[str, str], cwd: str) -> _File | None:
    """The file that was named, which must be there, or the first of the well-known ones that is."""
    if named := config_path or environ.get(CONFIG_VARIABLE):
        return _read(os.path.normpath(os.path.join(cwd, named)), named=True)
    for path in (os.path.join(cwd, LOCAL_FILE), SYSTEM_FILE):
        if os.path.lexists(path):
            return _read(path, named=False)
    return None


def _read(path: str, *, named: bool) -> _File:
    import tomllib

    from daemonkit.trust import check_trusted

    try:
        check_trusted(path, named=named)
        text = _content(path).decode()
        file = _File(path, text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"read {path}: not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"read {path}: not UTF-8 at byte {error.start}") from None
    except FileNotFoundError:
        raise ConfigError(f"read {path}: no such file; create it, or name another with --config") from None
    except PermissionError as error:
        if error.errno is None:  # UntrustedFile: a decision of ours, not the kernel's
            raise
        raise ConfigError(f"read {path}: permission denied; make it readable, or name another with --config") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"read {path}: {why}; name another with --config") from None
    file.check_tables()
    return file


def _content(path: str) -> bytes:
    import stat

    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would hang us
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"read {path}: not a regular file; name another with --config")
    with open(fd, "rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ConfigError(f"read {path}: longer than {MAX_FILE} bytes, so hardly a configuration")
    return content


def _line(text: str, table: str, key: str) -> int | None:
    """Where ``key`` is set in ``table``, or else where the table begins; 1 is the first line."""
    here, begin = "", None
    for number, line in enumerate(text.splitlines(), 1):
        code = line.strip()
        if code.startswith("["):
            here = code.partition("#")[0].strip().strip("[]").replace('"', "").replace("'", "").replace(" ", "")
            begin = number if here == table and begin is None else begin
            if key and here == (f"{table}.{key}" if table else key):
                return number
        elif key and here in (table, "") and code.partition("=")[0].strip().strip("\"'") == key:
            return number
    return begin


def _plain(value: Any) -> Any:
    """The same in values that JSON knows: TOML's dates and times become text."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.isoformat() if hasattr(value, "isoformat") else value


def _usage_error(key: str, why: str) -> UsageError:
    return UsageError(why)


def _config_error(key: str, why: str) -> UsageError:
    return ConfigError(why)


def _refuse(what: str, value: object, why: str) -> NoReturn:
    shown = f'"{value}"' if isinstance(value, str) else repr(value)
    raise UsageError(f"{what} = {shown[:60]}: {why}")


def _nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?``, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
