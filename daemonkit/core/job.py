"""A timer job: what to call, when, and what has come of it so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from daemonkit.core.schedule import Schedule


class Forking(NamedTuple):
    """What is asked of a job that runs in a process of its own."""

    timeout: float | None = None  # seconds
    max_instances: int = 1


class Policy(NamedTuple):
    """How a job meets lateness, and where it runs.  Times in nanoseconds."""

    jitter: int = 0
    coalesce: bool = True
    misfire_grace_time: int | None = None
    overlap: str = "skip"
    leader: bool = False  # only while the daemon leads
    forking: Forking | None = None  # None: in the daemon's own thread


class Record:
    """Counts and times of a job's runs.  Times in nanoseconds, ``last_started`` since the epoch."""

    __slots__ = (
        "failures",
        "last_duration",
        "last_error",
        "last_started",
        "lateness",
        "max_lateness",
        "missed",
        "receipt",
        "runs",
    )

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.runs = self.failures = self.missed = 0
        self.last_started = self.last_duration = self.lateness = self.max_lateness = 0
        self.last_error: str | None = None
        self.receipt: str | None = None  # how the last process of a job that has one of its own ended

    def dump(self) -> list[Any]:
        """The values, for another image of this process."""
        return [getattr(self, name) for name in self.__slots__]

    def load(self, values: list[Any]) -> None:
        """Take over what ``dump`` gave."""
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)


class Job:
    """One function on one schedule."""

    __slots__ = (
        "func",
        "gate",
        "launch",
        "name",
        "paused",
        "planned",
        "policy",
        "record",
        "schedule",
        "ticket",
        "when",
    )

    def __init__(
        self, name: str, func: Callable[[], object], schedule: Schedule, policy: Policy, when: str = ""
    ) -> None:
        """Describe the job; ``Timer.begin`` puts it to work.  ``when`` is the schedule in words."""
        self.name = name
        self.func = func
        self.schedule = schedule
        self.when = when
        self.policy = policy
        self.record = Record()
        self.planned: int | None = None  # the due time on the grid, without jitter; None: never again
        self.paused = False
        self.ticket = 0  # the one heap entry of this job that counts
        self.gate: Callable[[], bool] | None = None  # whether it may run at all now
        self.launch: Callable[[Job, int], bool] | None = None  # starts it elsewhere, and keeps its record
