"""What the children of a fork server had to import is imported once, in the server, and there for those to come."""

from __future__ import annotations

import sys
from typing import Final

from daemonkit.processes import mainmodule

_HARMLESS: Final = sys.stdlib_module_names | {__name__.partition(".")[0]}
_loaded: frozenset[str] = frozenset()  # in the server, and so in a child when it begins


def note() -> None:
    """Here, in the server: what is loaded now, children have."""
    global _loaded
    _loaded = frozenset(sys.modules)


def fresh() -> list[str]:
    """Here, in a child: what has been loaded since; nothing if there is no server."""
    if not _loaded or len(sys.modules) == len(_loaded):
        return []
    return [name for name in sys.modules if name not in _loaded]


def harmless(names: list[str]) -> list[str]:
    """Those that are Python's own or ours: nothing of the user's runs when they are imported (law 3)."""
    return [name for name in names if name.partition(".")[0] in _HARMLESS]


def load(names: list[str]) -> None:
    """Import them here, in the server; what cannot be imported is left to the children, who tell why."""
    for name in names:
        try:
            if name == mainmodule.ALIAS:
                mainmodule.load()
            else:
                __import__(name)
        except BaseException:  # noqa: BLE001 - as above
            continue


def pack(names: list[str]) -> bytes:
    """As one message carries them."""
    return "\0".join(names).encode(errors="replace")


def unpack(payload: bytes) -> list[str]:
    """The names again; garbage makes names that nothing has."""
    return payload.decode(errors="replace").split("\0")
