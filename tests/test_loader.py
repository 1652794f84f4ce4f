"""loader: a script is run as the interpreter would run it, up to its main()."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemonkit import loader
from daemonkit.api import Daemon
from daemonkit.errors import ScriptError, UsageError
from daemonkit.script import Script


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading replaces __main__, sys.argv and the head of sys.path."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


def load(path: Path, text: str, default: Script | None = None, *args: str) -> Script:
    path.write_text(textwrap.dedent(text))
    return loader.Loader(default or Daemon()).load(str(path), False, list(args))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "beat.py"


def test_the_script_runs_as_main_with_its_arguments_and_its_directory_first(path: Path) -> None:
    (path.parent / "neighbour.py").write_text("X = 7\n")
    script = load(
        path,
        """
        import sys
        import neighbour
        from daemonkit.script import Script
        seen = (__name__, __file__, sys.argv, neighbour.X)
        daemon = Script("west")
        daemon.every(5)(lambda: seen)
        """,
        None,
        "--region",
        "west",
    )
    assert script.name == "west"
    seen = next(iter(script.jobs.values())).func()
    assert seen == ("__main__", str(path), [str(path), "--region", "west"], 7)


def test_the_one_daemon_object_of_the_script_is_found(path: Path) -> None:
    script = load(path, "from daemonkit.api import Daemon\nd = Daemon('east')\nd.after(1)(print)\n")
    assert script.name == "east"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1/0\n", ["Traceback", "1/0", "ZeroDivisionError"]),
        ("def f(:\n", ["SyntaxError", "line 1"]),
        ("import sys\nsys.exit('enough')\n", ["called sys.exit('enough')"]),
        ("import nothing_of_the_kind\n", ["ModuleNotFoundError", "nothing_of_the_kind"]),
        ("X = 1\n", ["declares nothing to do", "@every"]),
        ("", ["declares nothing to do"]),
    ],
)
def test_what_went_wrong_is_told_in_the_scripts_own_terms(path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ScriptError) as caught:
        load(path, text)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "loader.py" not in str(caught.value)


def test_a_wrong_declaration_names_file_and_line(path: Path) -> None:
    with pytest.raises(UsageError, match=r"beat\.py, line 3: @every\(0\)"):
        load(path, "from daemonkit.script import Script\nd = Script()\n@d.every(0)\ndef f(): pass\n")


def test_binary_files_and_directories_are_no_scripts(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="is a directory"):
        loader.find(str(tmp_path))
    with pytest.raises(ScriptError, match="no such script"):
        loader.find(str(tmp_path / "none.py"))
    binary = tmp_path / "binary.py"
    binary.write_bytes(b"\x7fELF\0\0")
    with pytest.raises(ScriptError, match="not a Python script"):
        loader.Loader(Daemon()).load(str(binary), False, [])


def test_a_forgotten_ending_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "beat.py").write_text("")
    with pytest.raises(ScriptError, match=r"did you mean .*beat\.py"):
        loader.find(str(tmp_path / "beat"))


def test_a_module_is_found_on_the_path_and_a_package_by_its_main(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    main = "from . import part\nfrom daemonkit.script import Script\nd = Script(part.N)\nd.every(1)(print)\n"
    (package / "__main__.py").write_text(main)
    (package / "part.py").write_text("N = 'inner'\n")
    sys.path.insert(0, str(tmp_path))
    assert loader.find("-m pack") == ("pack", True)
    assert loader.Loader(Daemon()).load("pack", True, []).name == "inner"
    with pytest.raises(ScriptError, match="no such module on the module search path"):
        loader.Loader(Daemon()).load("nopack", True, [])
    with pytest.raises(ScriptError, match="not the name of a module"):
        loader.find("-m no-such/module")


async def _coroutine() -> None: ...
def _generator() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("func", "said"),
    [(_coroutine, "_coroutine is async"), (_generator, "_generator is a generator"), (7, "give it a function")],
)
def test_a_main_loop_of_which_a_call_would_run_nothing_is_refused(func: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        loader.Loader(Daemon()).choose(Script(), func)
