"""What random kills do to a queue: tasks lost, and tasks done twice, on each engine.

Two producers put tasks, a daemon does them in processes of their own and in kept ones, and a hand kills with -9, now
and again, a task's process, a consumer, a kept process, the fork server, the master, a producer in the middle of a put,
and the server itself, which is started again at once (Redis with appendfsync always, beanstalkd with -b and -f 0).
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from harness import Box
from kill_counts import CONCERNS, RAN_OUT, Outcome
from random_kills import ENGINES, Soak, server_of
from rig import as_a_user, goal, table


def main() -> None:
    """One engine after the other; the exit code tells whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of all engines together  [10]")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two kills, on average  [1]")
    parser.add_argument("--rate", type=float, default=80, help="tasks that are put a second  [80]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="this one alone")
    options = parser.parse_args()
    engines = options.engine or ENGINES
    as_a_user()
    outcomes = {}
    for engine in engines:
        with tempfile.TemporaryDirectory(prefix="soak-") as name, server_of(engine, Path(name)) as server:
            box = Box(Path(name))
            try:
                soak = Soak(box, server, rate=options.rate, seed=options.seed)
                outcomes[engine] = soak.run(options.minutes * 60 / len(engines), options.pause)
            finally:
                box.close()
    show(outcomes, options.minutes)
    complaints = [f"{engine}: {line}" for engine, found in outcomes.items() for line in found.complaints]
    for line in complaints:
        print(f"* {line}")
    sys.exit(bool(complaints))


def show(outcomes: dict[str, Outcome], minutes: float) -> None:
    """Who was killed, what came of it, and why tasks were done again."""
    table(
        f"Killed with -9, in {minutes:g} minutes",
        ["", *CONCERNS, "in all"],
        [[engine, *(_kills(found)[kind] for kind in CONCERNS), len(found.kills)] for engine, found in outcomes.items()],
    )
    table(
        "Tasks",
        ["", "put", "accepted", "done", "lost", "done again", "... nobody killed", "left or buried"],
        [
            [engine, len(o.tried), len(o.kept), len(o.marks), len(o.lost), again(o), len(o.unexplained), len(o.left)]
            for engine, o in outcomes.items()
        ],
    )
    table(
        "Tasks that were done again, by who was killed next to the first time",
        ["", *CONCERNS, RAN_OUT, "longest wait, ms"],
        [[engine, *_reasons(found)] for engine, found in outcomes.items()],
    )
    for engine, found in outcomes.items():
        goal(f"{engine}: tasks lost", len(found.lost), 0)
        goal(f"{engine}: done again with nobody killed", len(found.unexplained), 0)


def again(found: Outcome) -> int:
    """How often a task was done that had been done before."""
    return sum(len(marks) - 1 for marks in found.marks.values())


def _kills(found: Outcome) -> collections.Counter[str]:
    return collections.Counter(kill.who for kill in found.kills)


def _reasons(found: Outcome) -> list[object]:
    """By kind, and the longest time between the first time a task was done and the kill: nobody knew so long."""
    repeats = list(found.repeats())
    counts = collections.Counter(repeat.why for repeat in repeats)
    waits = [repeat.wait * 1000 for repeat in repeats]
    return [*(counts[why] for why in (*CONCERNS, RAN_OUT)), max(waits, default=0.0)]


if __name__ == "__main__":
    main()
