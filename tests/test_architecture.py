"""Imports point down, nothing inside imports the package root, and nothing is loaded that is not used."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import daemonkit

ROOT = Path(daemonkit.__file__).parent

# From top to bottom: a module imports only from its own line or from lines below it.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["master"],
    ["launch"],
    ["inquiry", "ending", "report", "loader", "exec", "leftovers", "objects"],
    ["api"],
    ["script", "handover", "control", "service"],
    ["queue", "cluster"],
    ["config", "processes", "ipc"],
    ["core"],
    ["errors"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The one arrow up: a script's main() is the command; it is taken when it is called.
UPWARD = {("api", "cli")}
OPTIONAL = {
    "cronsim": "core/schedule.py",
    "daemon": "core/daemonize.py",
    "setproctitle": "core/title.py",
    "click": "cli/",
    "cloudpickle": "processes/pickled.py",
    "sysv_ipc": "ipc/library.py",
    "redis": "queue/redis.py",
    "kazoo": "cluster/zookeeper.py",
}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@cache
def imports(path: Path) -> set[str]:
    """Dotted names that the file imports, anywhere but under TYPE_CHECKING."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "daemonkit":
                found |= {f"daemonkit.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


@cache
def at_import(path: Path) -> set[str]:
    """Modules that are loaded with the file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = unit(path)
    assert here in LEVEL, f"{here} has no place in the table"
    for name in imports(path):
        if not name.startswith("daemonkit"):
            continue
        assert name != "daemonkit", f"{path} imports the package root"
        there = name.split(".")[1]
        assert LEVEL[there] >= LEVEL[here] or (here, there) in UPWARD, f"{here} imports {there}, which stands above it"


def test_no_two_modules_import_each_other_by_any_way_round() -> None:
    """Imports inside functions and those for the type checker aside."""
    dotted = {".".join(("daemonkit", *path.relative_to(ROOT).with_suffix("").parts)): path for path in modules()}
    dotted = {name.removesuffix(".__init__"): path for name, path in dotted.items()}
    sorter = TopologicalSorter({name: at_import(path) & set(dotted) - {name} for name, path in dotted.items()})
    sorter.prepare()  # CycleError names the circle


@pytest.mark.parametrize(("library", "home"), OPTIONAL.items())
def test_a_library_is_imported_in_its_one_place(library: str, home: str) -> None:
    users = {str(path.relative_to(ROOT)) for path in modules() if library in {n.split(".")[0] for n in imports(path)}}
    assert users
    assert all(user.startswith(home) for user in users), users


def test_every_public_name_can_be_had_and_is_listed() -> None:
    for name in (*daemonkit.__all__, "Background", "Pool", "background", "ipc", "progress"):
        assert getattr(daemonkit, name) is not None
    assert sorted(daemonkit.__all__) == sorted(set(daemonkit.__all__))


def test_no_module_is_longer_than_400_lines() -> None:
    long = {str(path.relative_to(ROOT)): n for path in modules() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_the_daemons_image_loads_nothing_that_a_timer_does_not_need() -> None:
    program = "import sys, daemonkit.master.image; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    unwanted = {"click", "daemon", "cronsim", "sqlite3", "redis", "kazoo", "multiprocessing", "asyncio", "subprocess"}
    unwanted |= {"dataclasses", "inspect", "tomllib", "zoneinfo", "difflib", "random"}
    assert not unwanted & set(loaded)


def test_the_processes_of_tasks_begin_with_nothing_that_only_some_need() -> None:
    program = """
import sys, daemonkit.master.image, daemonkit.master.crew, daemonkit.master.consuming, daemonkit.queue.consumer
from daemonkit import task

@task(queue="mail", max_retries=2)
def send(to, *words, at=0, **more): ...

print(*sys.modules)
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    unwanted = {"click", "sqlite3", "redis", "kazoo", "multiprocessing", "asyncio", "subprocess"}
    unwanted |= {"dataclasses", "inspect", "tomllib", "zoneinfo", "difflib", "random", "hashlib"}
    assert not unwanted & set(loaded)
