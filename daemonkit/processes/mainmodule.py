"""The main script in another interpreter: under a name of its own, so that its ``if __name__ == "__main__"`` is false.

Pickle knows functions and classes of a script as ``__main__.NAME``; here that name is given its meaning again.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any, Final, NamedTuple

ALIAS: Final = "__mp_main__"  # multiprocessing's word for it


class Main(NamedTuple):
    """Where the main script is."""

    name: str | None  # of ``python -m``
    path: str | None


_main = Main(None, None)
_is_loading = False


def find() -> Main | None:
    """Where our own main script is; None if another process could not read it (a REPL, ``python -c``)."""
    if _main != Main(None, None):  # we are such another process
        return _main
    module = sys.modules.get("__main__")
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return Main(spec.name, None)
    path = getattr(module, "__file__", None)
    if path is None or not os.path.isfile(path):
        return None
    return Main(None, os.path.abspath(path))


def accept_alias() -> None:
    """Let what comes back from such an interpreter be ours."""
    sys.modules.setdefault(ALIAS, sys.modules["__main__"])


def expect(main: Main | None) -> None:
    """This interpreter's ``load`` is to mean ``main``; until then it has an empty main module."""
    global _main
    _main = main or Main(None, None)
    sys.modules["__main__"] = ModuleType("__main__")


def load() -> bool:
    """Run the main script, if there is one and that has not been done; tell whether it was done now.

    Raises:
        BaseException: what the script raises.
    """
    global _is_loading
    if _main == Main(None, None) or ALIAS in sys.modules:
        return False
    module = ModuleType(ALIAS)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = sys.modules[ALIAS] = module
    _is_loading = True
    try:
        exec(_code(module), module.__dict__)
    except BaseException:
        sys.modules["__main__"] = before
        del sys.modules[ALIAS]
        raise
    finally:
        _is_loading = False
    return True


def check() -> None:
    """Refuse to start what would run the main script, while that is being run for the same purpose: without end.

    Raises:
        UsageError: says what to do.
    """
    if _is_loading:
        from daemonkit.errors import UsageError  # not before: what it imports would cost every fork of a server

        raise UsageError(
            f"{_main.name or _main.path} was imported again for a call of its functions, and its first lines make such "
            'a call: put what the script does below if __name__ == "__main__":'
        )


def _code(module: ModuleType) -> Any:
    if _main.name is not None:
        from importlib.util import find_spec

        spec = find_spec(_main.name)
        loader = spec and spec.loader
        if spec is None or not hasattr(loader, "get_code"):
            raise ImportError(f"import the main module again: python -m {_main.name} is not found", name=_main.name)
        module.__file__, module.__package__ = spec.origin, spec.parent
        return loader.get_code(_main.name)  # type: ignore[union-attr]
    assert _main.path is not None
    module.__file__ = _main.path
    with open(_main.path, "rb") as file:
        return compile(file.read(), _main.path, "exec", dont_inherit=True)
