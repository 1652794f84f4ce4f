"""What may be put: said before anything is sent, and the same on every engine."""

from __future__ import annotations

import re
from typing import Final

from daemonkit.errors import UsageError
from daemonkit.queue.broker import MOST_PRIORITY, NAME_LENGTH, NewTask

LONGEST: Final = 2**32 - 1  # seconds, as beanstalkd has it
_NAME: Final = re.compile(r"[A-Za-z0-9+/;.$_()][A-Za-z0-9+/;.$_()-]*", re.ASCII)  # beanstalkd's protocol, "Tubes"


def check_queue(name: object) -> str:
    """Return ``name`` if it can name a queue.

    Raises:
        UsageError: it cannot, on some engine.
    """
    if not is_queue(name):
        raise UsageError(
            f"queue {name!r}: a name is up to {NAME_LENGTH} letters, digits and any of -+/;.$_(), the first no '-'"
        )
    assert isinstance(name, str)
    return name


def is_queue(name: object) -> bool:
    """Whether ``name`` can name a queue, on every engine."""
    return isinstance(name, str) and len(name) <= NAME_LENGTH and _NAME.fullmatch(name) is not None


def check_seconds(value: object, what: str) -> float:
    """Return ``value`` if it is a time.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST:
        raise UsageError(f"{what}={value!r} must be a number of seconds, from 0 to {LONGEST}")
    return value


def check_task(queue: str, task: NewTask) -> None:
    """See that every engine could take ``task``.

    Raises:
        UsageError: one could not.
    """
    check_queue(queue)
    check_priority(task.priority)
    check_seconds(task.delay, "delay")
    if not check_seconds(task.ttr, "ttr"):
        raise UsageError("ttr=0 must be more than 0: a task would be given back before it is begun")
    if not isinstance(task.body, bytes):
        raise UsageError(f"put into {queue}: a body is bytes, not {type(task.body).__name__}")
    if task.key is not None and not _is_key(task.key):
        raise UsageError(f"put into {queue}: key={task.key!r} must be a text of up to {NAME_LENGTH} characters")


def _is_key(key: object) -> bool:
    return isinstance(key, str) and 0 < len(key) <= NAME_LENGTH and key.isprintable()


def check_priority(value: object) -> int:
    """Return ``value`` if it is a priority.

    Raises:
        UsageError: it is not.
    """
    if type(value) is not int or not 0 <= value <= MOST_PRIORITY:
        raise UsageError(f"priority={value!r} must be a whole number from 0, the most urgent, to {MOST_PRIORITY}")
    return value
