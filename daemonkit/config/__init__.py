"""The configuration in force: the options from all their sources.

Each source is weaker than the one before it: command line, environment (``DAEMONKIT_KEY``), ``[daemon.NAME]``,
``[daemon]``, the script, the default.  What the cluster has (``[cluster] config``) is laid over the
file.  A value is checked wherever it stands, also where a stronger one wins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from daemonkit.config.file import CONFIG_VARIABLE, Layer, find, laid_over
from daemonkit.config.options import BY_KEY, OPTIONS, PATH, PREFIX, Options, check_name, nearest
from daemonkit.errors import ConfigError, UsageError

COMMAND_LINE: Final = "command line"
ENVIRONMENT: Final = "environment"
SCRIPT: Final = "script"
DEFAULT: Final = "default"


class Configuration(NamedTuple):
    """The options, where each of them came from, and what the file holds for the script itself."""

    options: Options
    sources: dict[str, str]  # "command line", "environment", "PATH [daemon.NAME]", "script" or "default"
    config_path: str | None
    settings: dict[str, Any]  # [settings] and [settings.NAME]; dates and times as ISO 8601 text
    cluster_config: str | None = None  # the path in the cluster of what is laid over the file


def load(
    name: str | None,
    *,
    command_line: Mapping[str, Any],
    environ: Mapping[str, str],
    script: Mapping[str, Any] | None = None,
    config_path: str | None = None,
    cwd: str,
    uid: int | None = None,
    overlay: Sequence[str] = (),
) -> Configuration:
    """Read the configuration of the daemon ``name`` (None: of none in particular) from all its sources.

    Args:
        command_line: option key -> value; None for a flag that was not given.
        environ: the variables, at least those of ``relevant``; an empty one counts as not set.
        script: what the script itself asks for.
        config_path: a file that must exist; otherwise the first of the well-known ones that does.
        cwd: absolute; what relative paths, but for those in a file, are relative to.
        uid: whose default directories; that of the start, if privileges were dropped since.
        overlay: what the cluster has at the path that [cluster] config names in the file, if anything.

    Raises:
        UsageError: an option on the command line or in the script is unknown or wrong.
        ConfigError: the same in the file or the environment, or the file cannot be read.
        UntrustedFile: somebody else may change the file.
    """
    if name is not None:
        check_name(name)
    file = find(config_path, environ, cwd)
    path = file.cluster_config if file else None
    files = [file] if file else []
    files += [laid_over(path, text) for text in overlay] if path else []
    layers = [
        Layer(SCRIPT, "{key}, given by the script,", cwd, script or {}, _usage_error),
        *(each for one in files for each in one.layers(name)),
        Layer(ENVIRONMENT, "{env}", cwd, _from_environment(environ), _config_error),
        Layer(COMMAND_LINE, "{flag}", cwd, command_line, _usage_error),
    ]
    values = _defaults(environ, os.geteuid() if uid is None else uid)
    sources = dict.fromkeys(BY_KEY, DEFAULT)
    for layer in layers:
        read = _parse(layer, environ)
        values.update(read)
        sources.update(dict.fromkeys(read, layer.source))
    _fill_in(values, name)
    settings = {key: value for one in files for key, value in one.settings(name).items()}
    return Configuration(Options(values), sources, file and file.path, settings, path)


def defaults(uid: int) -> Options:
    """What is in force for ``uid`` when nothing is configured."""
    values = _defaults({}, uid)
    _fill_in(values, None)
    return Options(values)


def relevant(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ``load`` looks at, for whoever will load again in another environment."""
    wanted = ("HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")
    return {key: value for key, value in environ.items() if key.startswith(PREFIX) or key in wanted}


def _parse(layer: Layer, environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for key, raw in layer.raw.items():
        if raw is None:
            continue
        option = BY_KEY.get(key)
        if option is None:
            raise layer.error(key, f"unknown option {key!r}{nearest(key, BY_KEY)}")
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
    by_variable = {option.env: key for key, option in BY_KEY.items()}
    found = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable not in by_variable:
            near = nearest(variable, [*by_variable, CONFIG_VARIABLE])
            raise ConfigError(f"read the environment: unknown variable {variable}{near}")
        if value:
            found[by_variable[variable]] = value
    return found


def _usage_error(key: str, why: str) -> UsageError:
    return UsageError(why)


def _config_error(key: str, why: str) -> UsageError:
    return ConfigError(why)
