"""What came of tasks while a hand killed whoever had to do with them: what is lost, what was done again, and why.

A task is done again if nobody could tell the broker that it was done: its process, or one above that, was killed before
or ended with the killed one; or the server was, and gave out again what it had given out.  On a busy machine either
takes its time: how long those who end with a killed one live is measured, and what goes on after the death of a server
is known by the words of the consumer that did it, when it hears that the task is no longer its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

TTR: Final = 5.0  # seconds, of all tasks
DYING: Final = 0.1  # seconds in which one may be at work that was forked when those below the killed one were listed
RAN_OUT: Final = "its ttr was up"
QUEUES: Final = ("forked", "kept")
CONCERNS: Final = {  # whose tasks are done again when one of these is killed
    "task": ("forked",),
    "consumer": ("forked",),
    "fork server": ("forked",),
    "kept process": ("kept",),
    "master": QUEUES,
    "server": QUEUES,
    "producer": (),
}
_LOST: Final = re.compile(r"task (\S+)(?: \(put as (\S+)\))? of \S+ is no longer ours")


@dataclass
class Kill:
    """Moments in nanoseconds."""

    at: int
    who: str
    gone: int  # those who end with it, too


class Mark(NamedTuple):
    """A task was done."""

    moment: int  # nanoseconds
    queue: str
    id: str
    attempt: int  # a reservation that nobody has ended is one more


class Repeat(NamedTuple):
    """A task was done again."""

    number: int
    why: str | None  # who was killed, or that its time was up
    wait: float  # seconds from the first time to the kill


@dataclass
class Outcome:
    """What came of a soak."""

    tried: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)  # a producer was told so
    marks: dict[int, list[Mark]] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    forsaken: set[str] = field(default_factory=set)  # ids of tasks that a consumer was told to be no longer its own
    left: dict[str, str] = field(default_factory=dict)  # what is still at the broker, by queue
    faults: list[str] = field(default_factory=list)  # sentences

    @property
    def lost(self) -> set[int]:
        """Accepted, and never done."""
        return self.kept - self.marks.keys()

    @property
    def invented(self) -> set[int]:
        """Done, and never put."""
        return self.marks.keys() - self.tried

    def read_log(self, text: str) -> None:
        """Take in what consumers have said of tasks."""
        for found in _LOST.finditer(text):
            self.forsaken.add(found[2] or found[1])

    def repeats(self) -> Iterator[Repeat]:
        """Each time that a task was done again."""
        for number, marks in self.marks.items():
            for before, after in zip(sorted(marks), sorted(marks)[1:], strict=False):
                yield self._repeat(number, before, after)

    def _repeat(self, number: int, before: Mark, after: Mark) -> Repeat:
        is_forsaken = before.id in self.forsaken and before.attempt != after.attempt
        between = []
        for kill in self.kills:
            more = TTR if kill.who == "server" and is_forsaken else DYING
            is_between = kill.at <= after.moment and before.moment <= kill.gone + more * 1e9
            if is_between and before.queue in CONCERNS[kill.who]:
                between.append(kill)
        if between:
            kill = min(between, key=lambda kill: abs(kill.at - before.moment))
            return Repeat(number, kill.who, max(kill.at - before.moment, 0) / 1e9)
        return Repeat(number, RAN_OUT if is_forsaken else None, 0.0)

    @property
    def unexplained(self) -> list[int]:
        """Done again though nobody was killed who had to do with it, and its time was not up."""
        return [repeat.number for repeat in self.repeats() if repeat.why is None]

    @property
    def complaints(self) -> list[str]:
        """What must not be, in sentences."""
        found = list(self.faults)
        for what, numbers in (
            ("accepted and never done", self.lost),
            ("done and never put", self.invented),
            ("done again though nobody was killed in between", self.unexplained),
        ):
            if numbers:
                found.append(f"{what}: {len(numbers)}, such as {sorted(numbers)[:5]}")
        return found + [f"left in {queue}: {what}" for queue, what in self.left.items()]
