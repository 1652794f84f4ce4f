"""Run a script up to its end, or up to its ``main()``, and find what it has declared."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daemonkit.core.here import here
from daemonkit.core.plain import why_not_run
from daemonkit.core.stop import StopNow
from daemonkit.errors import ScriptError, UsageError

if TYPE_CHECKING:
    from daemonkit.script import Script


class Loader:
    """Loads one script as ``__main__``, as the interpreter would; its ``main()`` ends the loading there."""

    def __init__(self, default: Script) -> None:
        """``default`` is the one that the module-level decorators speak to."""
        self._default = default
        self._chosen: Script | None = None

    def choose(self, script: Script, func: Callable[[], Any] | None) -> None:
        """The script has called ``main``: note it, and leave the script by SystemExit.

        Raises:
            UsageError: ``func`` is no main loop: a call of it would run nothing.
        """
        name = getattr(func, "__name__", repr(func))
        if func is not None and not callable(func):
            raise UsageError(f"main({name}): give it a function, or nothing")
        if reason := why_not_run(func):
            raise UsageError(f"main({name}): {name} {reason}")
        self._chosen = script
        script.main_loop = func
        raise SystemExit(0)

    def load(self, target: str, is_module: bool, args: list[str]) -> Script:
        """Run the script and return its declarations.

        Raises:
            UsageError: a declaration that cannot be meant; the sentence names file and line.
            ScriptError: no such script, not Python, it raised, called sys.exit, or declares nothing.  The
                message is the script's own traceback where there is one.
        """
        module, code = _module(target) if is_module else _file(target)
        sys.modules["__main__"] = module
        sys.argv = [str(module.__file__), *args]
        here.declare_watch = self._default.watch
        try:
            exec(code, module.__dict__)
        except SystemExit as error:
            if self._chosen is None:
                raise ScriptError(f"{target}: called sys.exit({_shown(error.code)}) while it was imported") from None
        except UsageError as error:
            raise UsageError(f"{_place(error, str(module.__file__))}{error}") from None
        except StopNow:
            raise
        except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt and its like too are the script's failure
            raise ScriptError(_traceback(error)) from None
        finally:
            here.declare_watch = None
        script = self._chosen or self._only(module)
        if script.is_empty:
            raise ScriptError(
                f"{target}: declares nothing to do; use @every, @cron or @on, or give main() your own main loop"
            )
        return script

    def _only(self, module: types.ModuleType) -> Script:
        """The script never called ``main``: its one Daemon object if it has one, else the default."""
        from daemonkit.script import Script  # the command uses this file without it

        if self._default.is_empty:
            for value in vars(module).values():
                if isinstance(value, Script) and not value.is_empty:
                    return value
        return self._default


def find(target: str) -> tuple[str, bool]:
    """Turn "x.py" or "-m package.module" into (absolute path or module name, whether it is a module).

    Raises:
        ScriptError: there is no such file, or it is none.
    """
    if target.startswith("-m"):
        name = target.removeprefix("-m").strip()
        if not name or not all(part.isidentifier() for part in name.split(".")):
            raise ScriptError(f"-m {name}: not the name of a module")
        return name, True
    path = os.path.abspath(target)
    if os.path.isdir(path):
        raise ScriptError(f"{target}: is a directory; name the script in it, or use -m for a package")
    if not os.path.exists(path):
        hint = f"; did you mean {target}.py?" if os.path.exists(f"{path}.py") else ""
        raise ScriptError(f"{target}: no such script{hint}")
    if not os.path.isfile(path):
        raise ScriptError(f"{target}: not a regular file")
    if not os.access(path, os.R_OK):
        raise ScriptError(f"{target}: may not be read; check its permissions")
    return path, False


def files_of(target: str, is_module: bool, cwd: str) -> list[str]:
    """The files that will be run for ``target``, found without running any: a package's, then the module's own."""
    if not is_module:
        return [target]
    from importlib.machinery import PathFinder

    files: list[str] = []
    places: list[str] | None = [cwd, *sys.path]
    parts = [*target.split("."), "__main__"]
    for depth in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: depth + 1]), places)
        if spec is None:
            break
        files += [spec.origin] if spec.origin and os.path.isabs(spec.origin) else []
        places = list(spec.submodule_search_locations or ())
    return files


def add_working_directory(cwd: str) -> None:
    """Let modules be found in ``cwd``, as python -m does; not for root where others could plant some."""
    if os.geteuid() == 0:
        from daemonkit.config.trust import check_trusted

        try:
            check_trusted(cwd)
        except OSError:
            return
    sys.path.insert(0, cwd)


def _file(path: str) -> tuple[types.ModuleType, types.CodeType]:
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise ScriptError(f"{path}: {error.strerror}") from None
    if b"\0" in source:
        raise ScriptError(f"{path}: not a Python script (it holds null bytes)")
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.path.insert(0, os.path.dirname(path))
    return module, _compiled(source, path)


def _compiled(source: bytes, path: str) -> types.CodeType:
    try:
        code: types.CodeType = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        import traceback

        raise ScriptError("".join(traceback.format_exception_only(error)).rstrip("\n")) from None
    return code


def _module(name: str) -> tuple[types.ModuleType, types.CodeType]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        raise ScriptError(f"-m {name}: no module named {error.name!r} on the module search path") from None
    except Exception as error:  # noqa: BLE001 - the package's own code was run, see above
        raise ScriptError(_traceback(error)) from None
    code = spec.loader.get_code(spec.name) if spec and hasattr(spec.loader, "get_code") else None  # type: ignore[union-attr]
    if spec is None or code is None:
        raise ScriptError(f"-m {name}: no such module on the module search path, or nothing in it to run")
    module = types.ModuleType("__main__")
    module.__file__ = spec.origin
    module.__spec__ = spec
    module.__package__ = spec.parent
    return module, code


def _traceback(error: BaseException) -> str:
    """The traceback from the script's first frame on: ours above it say nothing to its author."""
    import traceback

    frames = error.__traceback__
    with contextlib.suppress(AttributeError):
        frames = frames.tb_next if frames else None
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip("\n")


def _place(error: BaseException, path: str) -> str:
    """ "file, line n: " of the declaration that raised."""
    place, frame = "", error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == path:
            place = f"{path}, line {frame.tb_lineno}: "
        frame = frame.tb_next
    return place


def _shown(code: object) -> str:
    return "" if code is None else repr(code)
