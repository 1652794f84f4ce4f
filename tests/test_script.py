"""script: what the decorators accept, and the one sentence for what they do not."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from daemonkit.errors import UsageError
from daemonkit.script import Script


def work() -> None:
    """Something to declare."""


def yielding() -> Iterator[None]:
    yield


async def asynchronous() -> None:
    """Something that cannot be declared."""


def wants(argument: int) -> None:
    """Something that is called with nothing."""


def test_declarations_keep_their_order_and_leave_the_function_alone() -> None:
    script = Script()
    assert script.is_empty
    assert script.every(5)(work) is work
    assert script.every("1h30m", name="slow")(work) is work
    assert script.after(2, name="once")(work) is work
    assert script.on("SIGHUP")(work) is work
    assert script.on("start")(work) is work
    assert [job.name for job in script.jobs.values()] == ["work", "slow", "once"]
    assert [job.when for job in script.jobs.values()] == ["every 5s", "every 1h30m", "once after 2s"]
    assert script.handlers == {int(signal.SIGHUP): [work], "start": [work]}
    assert not script.is_empty


def test_several_handlers_for_one_event_run_in_the_order_of_definition() -> None:
    script, order = Script(), list[int]()
    for number in range(3):
        script.on("USR1")(lambda n=number: order.append(n))
    for handler in script.handlers[int(signal.SIGUSR1)]:
        handler()
    assert order == [0, 1, 2]


Declare = Callable[[Script], Any]


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda s: s.every(0)(work), ["@every(0)", "longer than 0"]),
        (lambda s: s.every(-1)(work), ["@every"]),
        (lambda s: s.every(0.0001)(work), ["0.001 s or more"]),
        (lambda s: s.every(float("nan"))(work), ["@every"]),
        (lambda s: s.every(float("inf"))(work), ["@every"]),
        (lambda s: s.every(True)(work), ["@every"]),
        (lambda s: s.every(None)(work), ["@every"]),
        (lambda s: s.every("5 parsecs")(work), ["parsecs", "use ms, s, m, h, d or w"]),
        (lambda s: s.every(1, jitter=-1)(work), ["jitter"]),
        (lambda s: s.every(1, overlap="often")(work), ["overlap='often'", "skip, queue, kill"]),
        (lambda s: s.every(1, max_instances=0)(work), ["max_instances=0", "1 or more"]),
        (lambda s: s.every(1, timeout=5)(work), ["timeout=", "add fork=True"]),
        (lambda s: s.every(1, leader=1)(work), ["leader=1", "True or False"]),
        (lambda s: s.every(1, overlap="kill")(work), ['overlap="kill"', "add fork=True"]),
        (lambda s: s.every(1, max_instances=2)(work), ["max_instances > 1", "add fork=True"]),
        (lambda s: s.every(1, fork=True, timeout=0)(work), ["timeout", "longer than 0"]),
        (lambda s: s.after(0)(work), ["@after(0)"]),
        (lambda s: s.cron("61 * * * *")(work), ["61 * * * *", "minute hour day month weekday"]),
        (lambda s: s.cron("* * * *")(work), ["* * * *"]),
        (lambda s: s.cron("* * * * *", tz="Europe/Berlim")(work), ["Europe/Berlin"]),
        (lambda s: (s.every(1)(work), s.every(2)(work)), ["named 'work' already", "name="]),
        (lambda s: s.on("SIGUSR3")(work), ["SIGUSR3", "did you mean 'SIGUSR"]),
        (lambda s: s.on("strat")(work), ["did you mean 'start'"]),
        (lambda s: s.on("SIGALRM")(work), ["SIGALRM cannot be had"]),
        (lambda s: s.on("SIGCHLD")(work), ["SIGCHLD cannot be had"]),
        (lambda s: s.on("SIGKILL")(work), ["SIGKILL cannot be had"]),
        (lambda s: s.on(9999)(work), ["9999"]),
        (lambda s: s.every(1)(asynchronous), ["asynchronous is async"]),
        (lambda s: s.every(1)(functools.partial(asynchronous)), ["is async"]),
        (lambda s: s.every(1, fork=True)(yielding), ["yielding is a generator"]),
        (lambda s: s.on("start")(yielding), ["yielding is a generator"]),
        (lambda s: s.every(1)(wants), ["wants wants 1 argument"]),
        (lambda s: s.on("stop")("text"), ["above a function"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_one_clear_sentence(declare: Declare, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        declare(Script())
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
