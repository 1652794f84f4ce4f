"""One hour of ticks of 1 s beside a bare loop: every tick once, each in its own second.  Not part of all.py."""

from __future__ import annotations

import argparse

import timer
from rig import as_a_user, goal


def main() -> None:
    """Let both tick, then look at what they have written down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=3600)
    count = parser.parse_args().ticks
    as_a_user()
    kinds = {kind: timer.KINDS[kind] for kind in ("daemonkit", "bare Python")}
    late = timer.measure(timer.SECOND, count, is_burnt=False, kinds=kinds)
    ours, bare = late["daemonkit"], late["bare Python"]
    goal("ticks left out or made twice", sum(not 0 <= value < 1e6 for value in ours) + abs(len(ours) - count), 0)
    goal("largest lateness / bare loop's", max(ours) / max(bare), 2)


if __name__ == "__main__":
    main()
