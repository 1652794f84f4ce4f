"""Options: where they come from, which wins, and what is said of a wrong one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemonkit.config import Configuration, load
from daemonkit.config import file as config_file
from daemonkit.config.options import OPTIONS, Options, check_name, name_of, parse_stop_schedule
from daemonkit.errors import ConfigError, UntrustedFile, UsageError

SAMPLE = Path(__file__).parent.parent / "etc" / "daemonkit.toml"
NOBODY = 65534


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a configuration, on a host without one."""
    monkeypatch.setattr(config_file, "SYSTEM_FILE", str(tmp_path / "system" / "daemonkit.toml"))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def read(here: Path, text: str | None = None, name: str | None = "web", **given: Any) -> Configuration:
    """Load with ``text`` as the working directory's etc/daemonkit.toml."""
    if text is not None:
        write(here / "etc" / "daemonkit.toml", text)
    given = {"command_line": {}, "environ": {}, "cwd": str(here), "uid": 0, **given}
    return load(name, **given)


def refusal(here: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(here, text)
    return str(caught.value).removeprefix(f"read {here}/etc/daemonkit.toml")


SOURCES: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("script", {"script": {"graceful_timeout": 1}}),
    ("[daemon]", {"text": "[daemon]\ngraceful_timeout = 2"}),
    ("[daemon.web]", {"text": "[daemon]\ngraceful_timeout = 2\n[daemon.web]\ngraceful_timeout = 3"}),
    ("environment", {"environ": {"DAEMONKIT_GRACEFUL_TIMEOUT": "4s"}}),
    ("command line", {"command_line": {"graceful_timeout": "5s"}}),
]


@pytest.mark.parametrize("count", range(1, len(SOURCES) + 1))
def test_each_source_beats_those_before_it_and_is_named(here: Path, count: int) -> None:
    given: dict[str, Any] = {}
    for _, more in SOURCES[:count]:
        given.update(more)
    found = read(here, **given)
    assert found.options.graceful_timeout == [20, 1, 2, 3, 4, 5][count - 1]
    assert found.sources["graceful_timeout"].endswith(SOURCES[count - 1][0])
    assert found.sources["ready_timeout"] == "default"


def test_flags_not_given_and_empty_variables_do_not_count(here: Path) -> None:
    found = read(here, command_line={"log": None}, environ={"DAEMONKIT_LOG": ""})
    assert found.sources["log"] == "default"


def test_another_daemons_table_is_not_ours(here: Path) -> None:
    assert read(here, "[daemon.mail]\numask = '077'").options.umask == 0o022


def test_a_number_in_a_script_is_a_mode_but_in_a_file_it_must_be_quoted(here: Path) -> None:
    assert read(here, script={"umask": 0o027}).options.umask == 0o027
    assert 'umask = 22: write it in quotes, as in "022"' in refusal(here, "[daemon]\numask = 22")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[daemon]\n\nready_timeout = true", ":3: [daemon] ready_timeout = True: not a duration"),
        ("[daemon]\nready_timeout = '5 parsecs'", ':2: [daemon] ready_timeout = "5 parsecs": "parsecs" is not a unit'),
        ("[daemon]\nready_timeout = 0", ":2: [daemon] ready_timeout = 0: must be longer than 0"),
        ("[daemon]\nready_timeout = nan", ":2: [daemon] ready_timeout = nan: "),
        ("[daemon]\nready_timeout = []", ":2: [daemon] ready_timeout = []: not a duration"),
        ("[daemon]\nlog = 5", ":2: [daemon] log = 5: not a text"),
        ("[daemon]\nlog = ''", ':2: [daemon] log = "": empty'),
        ('[daemon]\nlog = "a\\u0000b"', "holds a NUL character"),
        ("[daemon]\nlog = 2020-01-01", "not a text"),
        ("[daemon]\nconcurrency = 0", ":2: [daemon] concurrency = 0: must be 1 or more"),
        ("[daemon]\nconcurrency = 1.5", ":2: [daemon] concurrency = 1.5: not a whole number"),
        ("[daemon]\numask = '089'", ':2: [daemon] umask = "089": not an octal number'),
        ("[daemon]\numask = '7777'", "must be between 000 and 777"),
        ("[daemon]\nlog_level = 'WARN'", "not one of DEBUG, INFO, WARNING, ERROR, CRITICAL; did you mean WARNING?"),
        ("[daemon]\nuser = -1", ":2: [daemon] user = -1: not a text"),
        ("[daemon]\nstop_schedule = 'TERM'", ":2: [daemon] stop_schedule = \"TERM\": not pairs"),
        ("[daemon]\nname = 'x'", ":2: [daemon] name: only --name can name a daemon"),
        ("[daemon]\nready_timout = 1", ":2: [daemon] has the unknown key 'ready_timout'; did you mean ready_timeout?"),
        ("[daemon.mail]\nrun-dir = '.'", ":2: [daemon.mail] has the unknown key 'run-dir'; did you mean run_dir?"),
        ("[daemon.a.b]\nlog = 'x'", "quote a name that holds a dot: [daemon.\"a.b\"]"),
        ("[daemon.'a b']\nlog = 'x'", "name a daemon 'a b'"),
        ("[demon]\nlog = 'x'", ":1: unknown table or key 'demon'; did you mean daemon?"),
        ("[zzz]", ":1: unknown table or key 'zzz'; use [daemon] or [settings]"),
        ("[queue.mail]\nttr = 1", "[queue] means nothing to this version of daemonkit; remove it"),
        ("[cluster]\nconfg = '/x'", ":2: [cluster] has the unknown key 'confg'; did you mean config?"),
        ("[cluster]\nconfig = 'x'", ":2: [cluster] config = 'x': a path in the cluster begins with /"),
        ("[cluster]\nconfig = 5", ":2: [cluster] config = 5: a path in the cluster begins with /"),
        ("log = 'x'", ":1: log stands outside any table; put it under [daemon]"),
        ("daemon = 5", ":1: daemon must be a table: write [daemon]"),
        ("[[daemon]]\nlog = 'x'", ":1: daemon must be a table: write [daemon]"),
        ("settings = 5", ":1: settings must be a table: write [settings]"),
        ("[daemon\n", ": not TOML: "),
        ("[daemon]\nlog = 'a'\nlog = 'b'\n", "not TOML: Cannot overwrite a value (at line 3"),
        ("[settings]\na = " + "[" * 5000, ": nested too deep"),
        ("[settings]\na = " + "[" * 150 + "]" * 150, ": nested deeper than 100 levels"),
        ("[settings]\n" + "a." * 5000 + "b = 1", ": nested deeper than 100 levels"),
        ("[settings]\na = " + "1" * 5000, ": not TOML: Exceeds the limit"),
        ("[settings]\na = [0x" + "f" * 5000 + "]", ": a number in it has more than 64 bits"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_file_line_key_and_reason(here: Path, text: str, message: str) -> None:
    said = refusal(here, text)
    assert message in said
    assert "\n" not in said


def test_a_wrong_value_is_refused_even_where_a_stronger_source_wins(here: Path) -> None:
    with pytest.raises(ConfigError, match="umask"):
        read(here, "[daemon]\numask = 'x'", command_line={"umask": "022"})


def test_an_unknown_variable_is_refused_with_the_nearest(here: Path) -> None:
    with pytest.raises(ConfigError, match="unknown variable DAEMONKIT_RUNDIR; did you mean DAEMONKIT_RUN_DIR"):
        read(here, environ={"DAEMONKIT_RUNDIR": "/x"})


def test_a_wrong_variable_or_flag_is_called_by_its_own_name(here: Path) -> None:
    with pytest.raises(ConfigError, match=r'^DAEMONKIT_UMASK = "x": not an octal number'):
        read(here, environ={"DAEMONKIT_UMASK": "x"})
    with pytest.raises(UsageError, match=r'^--umask = "x": not an octal number') as caught:
        read(here, command_line={"umask": "x"})
    assert not isinstance(caught.value, ConfigError)
    with pytest.raises(UsageError, match=r"^unknown option 'umsk'; did you mean umask\?"):
        read(here, script={"umsk": "x"})


def test_the_first_file_of_the_search_order_is_read_alone(here: Path) -> None:
    system = write(here / "system" / "daemonkit.toml", "[daemon]\nuser = 'system'")
    assert read(here).config_path == str(system)
    local = write(here / "etc" / "daemonkit.toml", "[daemon]\nuser = 'local'")
    assert read(here).options.user == "local"
    write(here / "variable.toml", "[daemon]\nuser = 'variable'")
    environ = {"DAEMONKIT_CONFIG": "variable.toml"}
    assert read(here, environ=environ).options.user == "variable"
    write(here / "flag.toml", "[daemon]\numask = '077'")
    found = read(here, environ=environ, config_path="flag.toml")
    assert (found.options.user, found.options.umask, found.config_path) == (None, 0o077, str(here / "flag.toml"))
    assert local.exists()


def test_a_named_file_must_be_there_and_be_a_file(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.toml: no such file; create it, or name another with --config"):
        read(here, config_path="absent.toml")
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        read(here, environ={"DAEMONKIT_CONFIG": "absent.toml"})
    os.mkfifo(here / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        read(here, config_path="fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        read(here, config_path=".")


def test_a_file_that_is_not_text_or_far_too_long_is_refused(here: Path) -> None:
    (here / "bytes.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2"):
        read(here, config_path="bytes.toml")
    (here / "long.toml").write_bytes(b"\n" * (config_file.MAX_FILE + 1))
    with pytest.raises(ConfigError, match="hardly a configuration"):
        read(here, config_path="long.toml")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_planted_configuration_is_refused_not_skipped(here: Path) -> None:
    path = write(here / "etc" / "daemonkit.toml", "[daemon]\nuser = 'root'")
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(UntrustedFile, match=r"etc/daemonkit.toml belongs to"):
        read(here)


def test_relative_paths_follow_the_file_or_the_working_directory(here: Path) -> None:
    found = read(here, "[daemon]\nrun_dir = '../run'", command_line={"log": "a/../x.log"})
    assert (found.options.run_dir, found.options.log) == (f"{here}/run", f"{here}/x.log")
    assert read(here, environ={"DAEMONKIT_RUN_DIR": "r", "HOME": "/h"}).options.run_dir == f"{here}/r"
    assert read(here, "[daemon]\nlog = '~/x.log'", environ={"HOME": "/h"}).options.log == "/h/x.log"


def test_name_and_run_directory_are_filled_in(here: Path) -> None:
    options = read(here, "[daemon]\nlog = '/NAME/NAME.out.log'\nrun_dir = '/r'").options
    assert options.log == "/NAME/web.out.log"
    assert (options.broker, options.coordinator) == ("sqlite:/r/queue.db", "local:/r/cluster")
    assert options.name == "web"
    assert read(here, name=None).options.name is None


def test_default_directories_are_roots_or_the_users_own(here: Path) -> None:
    def places(uid: int, **environ: str) -> tuple[str, str]:
        options = read(here, uid=uid, environ=environ).options
        return options.run_dir, options.log

    assert places(0, XDG_RUNTIME_DIR="/x") == ("/run/daemonkit", "/var/log/daemonkit/web.log")
    assert places(7, HOME="/h") == ("/tmp/daemonkit-7", "/h/.local/state/daemonkit/web.log")
    assert places(7, HOME="/h", XDG_RUNTIME_DIR="/x", XDG_STATE_HOME="/s") == ("/x/daemonkit", "/s/daemonkit/web.log")
    assert places(7, HOME="/h", XDG_RUNTIME_DIR="x")[0] == "/tmp/daemonkit-7"


def test_settings_are_the_scripts_own_and_survive_json(here: Path) -> None:
    shared = "[settings]\na = 1\nb = 2\n[settings.mail]\na = 9\n"
    own = "[settings.web]\nb = 3\nday = 2020-01-02\n[settings.web.deep]\nc = [1]\n"
    settings = read(here, shared + own).settings
    assert settings == {"a": 1, "b": 3, "day": "2020-01-02", "deep": {"c": [1]}}
    assert json.loads(json.dumps(settings)) == settings


def test_a_stop_schedule_that_is_a_list_is_refused_by_its_place(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[daemon\] stop_schedule"):
        read(here, "[daemon]\nstop_schedule = ['TERM', 30]")


def test_loading_again_with_the_parsed_values_changes_nothing(here: Path) -> None:
    first = read(here, command_line={"umask": "077", "run_dir": "r"}).options
    again = {option.key: getattr(first, option.key) for option in OPTIONS}
    assert read(here, command_line=again).options == first


def test_options_are_frozen(here: Path) -> None:
    options = read(here).options
    with pytest.raises(AttributeError, match="frozen"):
        options.umask = 0
    with pytest.raises(AttributeError, match="umsk"):
        options.umsk = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("heartbeat.py", "heartbeat"),
        ("/srv/app/web-1.2.py", "web-1.2"),
        ("bin/tool", "tool"),
        ("app/__main__.py", "app"),
        ("-m pkg.mod", "mod"),
        ("-m pkg.__main__", "pkg"),
        ("-m pkg", "pkg"),
    ],
)
def test_a_script_names_its_daemon(script: str, name: str) -> None:
    assert name_of(script) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "_x", "a b", "é", "a\n", "x.pid", "x.sock", "a" * 65])
def test_what_cannot_name_files_cannot_name_a_daemon(name: str) -> None:
    with pytest.raises(UsageError, match="choose another --name"):
        check_name(name)


@given(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"))
def test_every_other_name_is_taken(name: str) -> None:
    if not name.endswith((".pid", ".sock")):
        assert check_name(name) == name


def test_stop_schedules_are_pairs_of_signal_and_wait() -> None:
    assert parse_stop_schedule("TERM/30/KILL/5") == ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0))
    assert parse_stop_schedule("sigint/1m") == ((signal.SIGINT, 60.0),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("TERM/30/KILL", "not pairs"),
        ("TREM/30", "'TREM' is not a signal; did you mean TERM"),
        ("_DFL/3", "is not a signal"),
        ("15/30", "'15' is not a signal"),
        ("CHLD/3", "CHLD does not end a daemon"),
        ("KILL/5/TERM/5", "nothing can follow KILL"),
        ("TERM/0", "must be longer than 0"),
        ("TERM/", "not a duration"),
        ("TERM/-3", "cannot be negative"),
    ],
)
def test_a_wrong_stop_schedule_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_stop_schedule(text)


@given(st.text())
def test_any_text_is_a_schedule_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_stop_schedule(text)


@given(
    st.dictionaries(st.sampled_from(["log", "umask", "concurrency", "stop_schedule", "x"]), st.text() | st.integers())
)
def test_any_mapping_is_loaded_or_a_usage_error(given: dict[str, Any]) -> None:
    try:
        load("web", command_line=given, environ={}, cwd="/proc", uid=0)
    except UsageError as error:
        assert type(error) is UsageError  # noqa: PT017 - nothing is expected to raise


def sample() -> str:
    """The sample file as the fields make it."""
    parts = ["# daemonkit: every option with its default.  [daemon] is for all daemons, [daemon.NAME] for one."]
    parts += [
        "# Relative paths start at this file's directory.  Command line and DAEMONKIT_KEY are stronger.\n\n[daemon]"
    ]
    for option in OPTIONS:
        if option.key == "name":
            continue
        unit = f"  ({option.unit})" if option.unit else ""
        value = json.dumps(option.default) if option.default is not None else ""
        parts.append(f"# {option.doc}{unit}\n# {option.key} = {value or '...'}")
    parts.append(
        "# A path in the cluster: what stands there is laid over this file, and each change of it is a reload.\n"
        "# [cluster]\n# config = ..."
    )
    parts.append("# For the scripts themselves, any keys: [settings] for all, [settings.NAME] for one.\n[settings]\n")
    return "\n\n".join(parts).replace("for one.\n\n# Rel", "for one.\n# Rel")


def test_the_sample_file_is_in_step_with_the_fields() -> None:
    assert SAMPLE.read_text() == sample()


def test_the_sample_file_taken_literally_says_the_defaults(here: Path) -> None:
    lines = SAMPLE.read_text().splitlines()
    told = [line[2:] if " = " in line and not line.endswith("...") else line for line in lines]
    assert sum(line.startswith("#") for line in told) < sum(line.startswith("#") for line in lines)
    assert read(here, "\n".join(told)).options == read(here, "").options


def test_each_field_makes_flag_variable_and_help() -> None:
    for option in OPTIONS:
        assert getattr(Options, option.key) is option
        assert option.flag == "--" + option.key.replace("_", "-")
        assert option.env == "DAEMONKIT_" + option.key.upper()
        assert option.doc.endswith(".")
        assert option.metavar.isupper()


def test_the_start_without_a_file_imports_no_parser() -> None:
    heavy = ("dataclasses", "inspect", "tomllib", "difflib", "pwd", "click", "json", "daemonkit.config.trust")
    code = (
        "import sys; from daemonkit.config import load; pwd = 'pwd' in sys.modules;"
        "load('x', command_line={}, environ={'HOME': '/'}, cwd='/proc');"
        f"print([m for m in {heavy} if m in sys.modules and not (m == 'pwd' and pwd)])"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert ran.stdout.strip() == "[]"
