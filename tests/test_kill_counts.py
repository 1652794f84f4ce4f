"""Whether a soak can tell a task that was done again because somebody was killed from one that was not."""

from __future__ import annotations

import pytest
from kill_counts import DYING, RAN_OUT, TTR, Kill, Mark, Outcome

WORDS = "ERROR daemonkit.queue: task 8-ab (put as 7-ab) of kept is no longer ours: its ttr was up, or ...\n"


def outcome(*kills: Kill, words: str = "", attempts: tuple[int, int] = (1, 2)) -> Outcome:
    """Task 1, done after 10 s, and again a second later."""
    found = Outcome(tried={1}, kept={1}, kills=list(kills))
    found.marks[1] = [Mark(ns(10), "kept", "7-ab", attempts[0]), Mark(ns(11), "kept", "7-ab", attempts[1])]
    found.read_log(words)
    return found


def ns(seconds: float) -> int:
    return int(seconds * 1e9)


def why(found: Outcome) -> str | None:
    (repeat,) = found.repeats()
    return repeat.why


def test_who_was_killed_after_a_task_was_done_could_not_tell() -> None:
    found = outcome(Kill(ns(10.5), "kept process", ns(10.6)))
    (repeat,) = found.repeats()
    assert (repeat.why, round(repeat.wait, 3)) == ("kept process", 0.5)
    assert not found.complaints


def test_those_who_end_with_the_killed_one_may_be_at_work_for_as_long_as_that_takes() -> None:
    assert why(outcome(Kill(ns(9), "master", ns(10.5)))) == "master"
    assert why(outcome(Kill(ns(9), "master", ns(10 - DYING * 2)))) is None


def test_after_the_death_of_a_server_those_explain_it_who_have_heard_that_their_task_is_anothers() -> None:
    kill = Kill(ns(8), "server", ns(9))
    assert why(outcome(kill, words=WORDS)) == "server"
    assert why(outcome(kill)) is None
    assert why(outcome(kill, words=WORDS, attempts=(1, 1))) is None
    assert why(outcome(Kill(ns(8 - TTR), "server", ns(9 - TTR)), words=WORDS)) == RAN_OUT


def test_a_time_that_was_up_is_known_by_the_words_of_who_had_it_and_by_the_next_attempt() -> None:
    assert why(outcome(words=WORDS)) == RAN_OUT
    for found in (outcome(), outcome(words=WORDS, attempts=(1, 1))):
        assert why(found) is None
        assert found.complaints == ["done again though nobody was killed in between: 1, such as [1]"]


@pytest.mark.parametrize("who", ["producer", "task", "consumer", "fork server"])
def test_a_kill_of_who_has_nothing_to_do_with_it_explains_nothing(who: str) -> None:
    assert why(outcome(Kill(ns(10.5), who, ns(10.6)))) is None


@pytest.mark.parametrize("who", ["kept process", "server"])
def test_a_kill_before_or_after_has_nothing_to_do_with_it(who: str) -> None:
    assert why(outcome(Kill(ns(1), who, ns(2)), Kill(ns(12), who, ns(13)))) is None
