"""Control-C at a moment of our choice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any


class Strike:
    """While it is entered, control-C strikes this thread once, as KeyboardInterrupt, which ends here.

    The interpreter looks for signals behind calls and at the start of functions: those are the moments.
    """

    def __init__(self, moment: int, seen: Callable[[str], object] | None = None, since: str = "") -> None:
        """Strike at that moment, counted from 1; ``since``: from the first call of a function of that name in Python.

        ``seen`` is told the name of each function in C that is called.
        """
        self._left = moment
        self._seen = seen
        self._since = since

    @property
    def has_struck(self) -> bool:
        return self._left <= 0

    def __enter__(self) -> Strike:
        sys.setprofile(self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        sys.setprofile(None)
        return kind is KeyboardInterrupt

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and self._seen:
            self._seen(argument.__name__)
        if self._since and frame.f_code.co_name != self._since:
            return
        self._since = ""
        # What weakref calls, "_remove", can raise nothing; what comes behind us is not meant.
        if event in ("call", "c_return") and frame.f_code.co_name not in ("_remove", "__exit__"):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt


def strikes(seen: Callable[[str], object] | None = None, since: str = "") -> Iterator[Strike]:
    """One for each moment there is in what is done while it is entered; arguments as those of ``Strike``."""
    moment = 0
    while True:
        moment += 1
        strike = Strike(moment, seen, since)
        yield strike
        if not strike.has_struck:
            assert moment > 10, "there is hardly anything to strike"
            return
