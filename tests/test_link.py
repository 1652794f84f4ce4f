"""When a consumer asks its broker for more."""

from __future__ import annotations

from daemonkit.queue.broker import Exchange
from daemonkit.queue.link import next_look


def test_a_moment_that_is_far_off_is_asked_for_again_as_the_clock_by_which_it_comes_may_be_set() -> None:
    assert next_look(Exchange([], [], 10_000.0), 1, 5.0) == 65.0
    assert next_look(Exchange([], [], 10.0), 1, 5.0) == 15.0
