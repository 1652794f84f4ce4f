"""What came of tasks while a hand killed whoever had to do with them: what is lost, what was done again, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

DYING: Final = 0.3  # seconds after a kill in which those who end with the killed one may still be at work


@dataclass
class Outcome:
    """What came of a soak."""

    tried: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)  # a producer was told so
    marks: dict[int, list[int]] = field(default_factory=dict)  # when each was done, in nanoseconds
    kills: list[tuple[int, str]] = field(default_factory=list)  # when, and who
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

    def repeats(self) -> Iterator[tuple[int, str | None, float]]:
        """Of each time that a task was done again: its number, who was killed in between, and how long after it."""
        for number, marks in self.marks.items():
            for before, after in zip(sorted(marks), sorted(marks)[1:], strict=False):
                between = [kill for kill in self.kills if before - DYING * 1e9 <= kill[0] <= after]
                when, who = min(between, key=lambda kill: abs(kill[0] - before), default=(before, None))
                yield number, who, max(when - before, 0) / 1e9

    @property
    def unexplained(self) -> list[int]:
        """Done again though nobody was killed in between."""
        return [number for number, kill, _ in self.repeats() if kill is None]

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
