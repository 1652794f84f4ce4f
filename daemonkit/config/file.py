"""The configuration file: which one is read, what may stand in it, and where in it a mistake is."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple, cast

from daemonkit.config.options import BY_KEY, MODE, check_name, nearest
from daemonkit.errors import ConfigError, UsageError

CONFIG_VARIABLE: Final = "DAEMONKIT_CONFIG"
LOCAL_FILE: Final = "etc/daemonkit.toml"  # in the working directory
SYSTEM_FILE: Final = "/etc/daemonkit/daemonkit.toml"
TABLES: Final = ("daemon", "settings", "cluster")
_DEEPEST: Final = 100  # levels of tables and lists; what reads them goes down by calling itself
MAX_FILE: Final = 1 << 20  # bytes; /dev/zero is no configuration


class Layer(NamedTuple):
    """The options of one source, not yet read."""

    source: str
    what: str  # how messages call an option
    base: str  # what paths are relative to
    raw: Mapping[str, object]
    error: Callable[[str, str], UsageError]  # from key and message


class File(NamedTuple):
    """A configuration file that has been read, and found to hold known tables only."""

    path: str
    text: str
    tables: dict[str, Any]

    def layers(self, name: str | None) -> list[Layer]:
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
        """Refuse tables that mean nothing."""
        for key, value in self.tables.items():
            if key in BY_KEY and not isinstance(value, dict):
                raise self.error("", key, f"{key} stands outside any table; put it under [daemon]")
            if key == "queue":
                raise self.error(key, "", f"[{key}] means nothing to this version of daemonkit; remove it")
            if key not in TABLES:
                near = nearest(key, TABLES)
                raise self.error(key, key, f"unknown table or key {key!r}{near or '; use [daemon] or [settings]'}")
            if not isinstance(value, dict):
                raise self.error(key, key, f"{key} must be a table: write [{key}]")

    @property
    def cluster_config(self) -> str | None:
        """The path in the cluster whose value is laid over this file; None: there is none."""
        table = self.tables.get("cluster", {})
        for key in table:
            if key != "config":
                raise self.error("cluster", key, f"[cluster] has the unknown key {key!r}{nearest(key, ('config',))}")
        path = table.get("config")
        if path is not None and not (isinstance(path, str) and path.startswith("/")):
            raise self.error("cluster", "config", f"[cluster] config = {path!r}: a path in the cluster begins with /")
        return path

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

    def _layer(self, table: str, options: dict[str, Any]) -> Layer:
        """The table's options; the keys of all tables are checked, whichever daemon is meant."""
        for key, value in options.items():
            if key not in BY_KEY:
                dotted = f'; quote a name that holds a dot: [daemon."{table[7:]}.{key}"]'
                hint = dotted if isinstance(value, dict) else nearest(key, BY_KEY)
                raise self.error(table, key, f"[{table}] has the unknown key {key!r}{hint}")
            if key == "name":
                raise self.error(table, key, f"[{table}] name: only --name can name a daemon; write [daemon.NAME]")
            if BY_KEY[key].kind is MODE and not isinstance(value, str):
                # TOML reads 22 as decimal and 0o22 as the same kind of number: only text tells what was meant.
                raise self.error(table, key, f'[{table}] {key} = {value!r}: write it in quotes, as in "022"')

        def error(key: str, why: str) -> ConfigError:
            return self.error(table, key, why)

        return Layer(f"{self.path} [{table}]", f"[{table}] {{key}}", os.path.dirname(self.path), options, error)


def find(config_path: str | None, environ: Mapping[str, str], cwd: str) -> File | None:
    """The file that was named, which must be there, or the first of the well-known ones that is."""
    if named := config_path or environ.get(CONFIG_VARIABLE):
        return _read(os.path.normpath(os.path.join(cwd, named)), named=True)
    for path in (os.path.join(cwd, LOCAL_FILE), SYSTEM_FILE):
        if os.path.lexists(path):
            return _read(path, named=False)
    return None


def laid_over(path: str, text: str) -> File:
    """What the cluster has at ``path``, as a file; it says no more of the cluster."""
    where = f"{path} in the cluster"
    file = File(where, text, _tables(where, text))
    file.check_tables()
    if "cluster" in file.tables:
        raise file.error("cluster", "", "[cluster] can stand in a file only")
    return file


def _tables(path: str, text: str) -> dict[str, Any]:
    import tomllib

    try:
        tables = tomllib.loads(text)
    except ValueError as error:  # also of numbers of more digits than int() reads
        raise ConfigError(f"read {path}: not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"read {path}: nested too deep") from None
    level: list[Any] = [tables]
    for _ in range(_DEEPEST):
        if any(isinstance(each, int) and each.bit_length() > 63 for each in level):
            raise ConfigError(f"read {path}: a number in it has more than 64 bits")
        level = [below for each in level for below in _below(each)]
        if not level:
            return tables
    raise ConfigError(f"read {path}: nested deeper than {_DEEPEST} levels")


def _below(value: Any) -> Collection[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _read(path: str, *, named: bool) -> File:
    from daemonkit.config.trust import check_trusted

    try:
        check_trusted(path, named=named)
        text = _content(path).decode()
        file = File(path, text, _tables(path, text))
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
