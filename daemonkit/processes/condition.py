"""A condition variable that control-C cannot leave locked."""

from __future__ import annotations

import operator
import threading
from typing import Any


class Condition(threading.Condition):
    """The standard library's, but for the way into and out of a ``with``: the lock's own, which is in C.

    There the interpreter looks for signals only when it is in, and not when it is out.  The standard library's is in
    Python: struck behind the taking of the lock, or before its release, that is held for ever.
    """

    __enter__: Any = property(operator.attrgetter("_lock.__enter__"))
    __exit__: Any = property(operator.attrgetter("_lock.__exit__"))
