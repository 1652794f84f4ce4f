"""The documentation says what the program is: tables, manual page, commands, options and signals."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from harness import Box
from test_architecture import LAYERS

import daemonkit
from daemonkit.cli import ALIASES, COMMANDS, group
from daemonkit.config.file import CONFIG_VARIABLE
from daemonkit.config.options import OPTIONS
from daemonkit.core.signals import RESERVED
from daemonkit.master.master import DEFAULT_SIGNALS

ROOT = Path(__file__).parent.parent
README, CHANGES = ROOT / "README.rst", ROOT / "CHANGELOG.rst"
GUIDE, ARCHITECTURE, PAGE = (ROOT / "docs" / name for name in ("guide.rst", "architecture.rst", "daemonkit.1"))
TEXTS = [README, CHANGES, GUIDE, ARCHITECTURE]

needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff (Debian: groff-base)")
needs_man = pytest.mark.skipif(shutil.which("man") is None, reason="needs man (Debian: man-db)")
needs_docutils = pytest.mark.skipif(importlib.util.find_spec("docutils") is None, reason="needs docutils")


def generator() -> ModuleType:
    """docs/man.py as a module."""
    spec = importlib.util.spec_from_file_location("man", ROOT / "docs" / "man.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def man() -> ModuleType:
    return generator()


def blocks(path: Path, language: str) -> list[str]:
    """The text of each code block of that language."""
    found = re.findall(
        rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", path.read_text() + "\n", flags=re.MULTILINE
    )
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n" for block in found]


def typed(path: Path) -> list[str]:
    """What follows the prompts in a text's console blocks."""
    return [line[2:] for block in blocks(path, "console") for line in block.splitlines() if line.startswith("$ ")]


def command_lines() -> list[tuple[str, str]]:
    """All that is typed anywhere in the documentation, help texts too."""
    found = [(path.name, line) for path in (README, GUIDE) for line in typed(path)]
    examples = [
        (name, line.strip())
        for name in COMMANDS
        for line in (command(name).help or "").splitlines()
        if line.startswith("  ") and line.strip().startswith("daemonkit ")
    ]
    return found + examples


def command(name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


def marked(path: Path, name: str) -> str:
    """What stands between two marks."""
    return path.read_text().partition(f".. begin {name}\n")[2].partition(f".. end {name}\n")[0]


def signals_of(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z]{2,4}[12]?\b", text))


# --- what is generated ---


def test_the_manual_page_is_what_its_generator_prints(man: ModuleType) -> None:
    assert PAGE.read_text() == man.man(), "run: python docs/man.py > docs/daemonkit.1"


def test_the_tables_are_what_their_generator_makes(man: ModuleType) -> None:
    for path in man.TABLED:
        text = path.read_text()
        assert text == man.renewed(text), f"{path}: run: python docs/man.py tables"
    everything = "".join(path.read_text() for path in man.TABLED)
    assert all(f".. begin {name}\n" in everything for name in man.TABLES)


def test_a_changed_table_would_be_noticed(man: ModuleType) -> None:
    assert man.renewed(".. begin signals\nold\n.. end signals\nrest\n") == (
        f".. begin signals\n\n{man.signals_table()}\n.. end signals\nrest\n"
    )


def test_the_generator_prints_the_page_when_it_is_called() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "man.py")], capture_output=True, text=True, check=True)
    assert done.stdout == PAGE.read_text()


@needs_groff
def test_groff_has_no_warning_for_the_manual_page() -> None:
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", str(PAGE)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "NAME" in done.stdout


@needs_groff
@needs_man
def test_man_shows_the_manual_page_without_a_warning() -> None:
    environ = {**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""}
    command_line = ["man", "--warnings", "-l", str(PAGE)]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True, env=environ)
    if "minimized" in done.stdout + done.stderr:
        pytest.skip("man is a stub on a minimized system")
    assert done.stderr == ""
    assert "daemonkit start [OPTION]..." in re.sub(".\b", "", done.stdout)


@needs_docutils
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_docutils_has_no_complaint(path: Path) -> None:
    command_line = [sys.executable, "-m", "docutils", "--report=1", "--halt=5", str(path), os.devnull]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert done.stderr == ""


# --- what must be mentioned ---


def test_every_command_is_in_the_manual_page_and_in_guide_and_readme() -> None:
    page, guide, readme = PAGE.read_text(), GUIDE.read_text(), README.read_text()
    for name in COMMANDS:
        assert f'.SS "{name}' in page
        assert re.search(rf"\b{name}\b", guide), f"the guide does not mention {name}"
        assert f"``{name}``" in readme
    for alias in ALIASES:
        assert alias in page
        assert f"``{alias}``" in readme


def test_every_option_of_every_command_is_in_the_manual_page(man: ModuleType) -> None:
    page = PAGE.read_text()
    for name in COMMANDS:
        for flag in man.flags(command(name)):
            assert man.verbatim(flag) in page, f"{name} {flag}"


def test_every_option_of_the_configuration_is_in_guide_and_manual_page(man: ModuleType) -> None:
    guide, page = marked(GUIDE, "options"), PAGE.read_text()
    for option in OPTIONS:
        assert f"``{option.key}``" in guide
        assert option.env in page


def test_options_without_effect_are_options(man: ModuleType) -> None:
    assert {option.key for option in OPTIONS} >= man.WITHOUT_EFFECT


@pytest.mark.parametrize("path", [README, GUIDE, PAGE], ids=lambda path: path.name)
def test_no_text_names_an_option_that_does_not_exist(path: Path, man: ModuleType) -> None:
    known = {flag for name in COMMANDS for flag in man.flags(command(name))} | {"--help", "--version"}
    known |= {"--region", "--now"}  # of the examples' own script, of systemctl
    text = path.read_text().replace(r"\-", "-")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known


@pytest.mark.parametrize("path", [README, GUIDE, PAGE], ids=lambda path: path.name)
def test_no_text_names_an_environment_variable_that_does_not_exist(path: Path) -> None:
    known = {option.env for option in OPTIONS} | {CONFIG_VARIABLE, "DAEMONKIT_KEY", "DAEMONKIT_", "DAEMONKIT_COMPLETE"}
    assert set(re.findall(r"DAEMONKIT_[A-Z_]*", path.read_text())) <= known


@pytest.mark.parametrize("path", [README, GUIDE], ids=lambda path: path.name)
def test_the_signals_table_has_the_signals_of_the_code(path: Path, man: ModuleType) -> None:
    caught = {*DEFAULT_SIGNALS, *RESERVED} - {signal.SIGKILL, signal.SIGSTOP}
    assert {name for names, _ in man.SIGNALS for name in signals_of(names)} == {
        number.name.removeprefix("SIG") for number in map(signal.Signals, caught)
    }
    assert all(names in marked(path, "signals") for names, _ in man.SIGNALS)


def test_every_public_name_is_in_the_readme() -> None:
    text = README.read_text()
    hidden = {"DaemonkitError", "UsageError"}  # told in errors.py
    assert [name for name in daemonkit.__all__ if name not in hidden and name not in text] == []


def test_the_changelog_has_an_entry_for_this_version() -> None:
    assert f"\n{daemonkit.__version__}\n-" in CHANGES.read_text()


def test_the_import_table_is_the_one_that_is_enforced() -> None:
    table = marked(ARCHITECTURE, "imports").partition("::\n")[2]
    assert [line.split() for line in table.splitlines() if line.strip()] == LAYERS


def test_the_links_between_the_texts_lead_somewhere() -> None:
    for path in TEXTS:
        for target in re.findall(r"`[^`]*<([^>`]+)>`_", path.read_text()):
            assert "://" in target or (path.parent / target).is_file(), f"{path.name}: {target}"


# --- what can be run ---


@pytest.mark.parametrize(("where", "line"), command_lines())
def test_a_typed_command_line_is_one_that_the_command_takes(where: str, line: str) -> None:
    words = shlex.split(line.partition(">")[0], comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "daemonkit":
        name = ALIASES.get(words[1], words[1])
        assert name in COMMANDS, f"{where}: {line}"
        command(name).make_context(name, words[2:])  # a UsageError if it is wrong


def python_blocks() -> Iterator[tuple[str, int, str]]:
    for path in (README, GUIDE):
        for number, block in enumerate(blocks(path, "python")):
            yield path.name, number, block


@pytest.mark.parametrize(("where", "number", "block"), list(python_blocks()))
def test_a_block_of_python_is_python_that_daemonkit_takes(where: str, number: int, block: str, box: Box) -> None:
    compile(block, f"{where}, block {number}", "exec", dont_inherit=True)
    if "PidFile" in block or not re.search(r"@\w+\(|@worker\b|\b(main|program)\(", block):
        return  # a program of its own, not a daemon's script
    script = box.path / "block.py"
    script.write_text(block)
    done = box.call("check", script)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_script_becomes_the_daemon_that_the_readme_shows(box: Box) -> None:
    script = box.path / "heartbeat.py"
    script.write_text(blocks(README, "python")[0])
    done = box.call("start", script)
    pid = box.pid("heartbeat")
    assert done.stdout == f"heartbeat is running, pid {pid}\n"
    shown = box.call("status", "heartbeat").stdout
    readme = blocks(README, "console")[1]
    heading = " ".join(shown.splitlines()[4].split())
    assert heading.startswith("JOB WHEN")
    assert heading in " ".join(readme.split())
    assert box.call("trigger", "heartbeat", "beat").returncode == 0
    assert "INFO heartbeat: load (" in box.call("logs", "heartbeat").stdout
    assert box.call("kill", "heartbeat").stdout == f"heartbeat was stopped, pid {pid}\n"
    gone = box.call("status", "heartbeat")
    assert (gone.stdout, gone.returncode) == ("heartbeat: not running\n", 3)


def test_the_toml_of_the_guide_is_a_configuration_that_is_taken(box: Box) -> None:
    script = box.script("@every(5)\ndef beat(): ...", name="heartbeat.py")
    found = blocks(GUIDE, "toml")
    assert found
    for block in found:
        file = box.path / "guide.toml"
        file.write_text(block)
        done = box.call("check", "--config", file, script)
        assert done.returncode == 0, done.stderr
