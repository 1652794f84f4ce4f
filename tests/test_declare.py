"""Wrong declarations of workers, programs and forked jobs: one sentence each, when the script is imported."""

from __future__ import annotations

import functools
import signal
from typing import Any

import pytest

from daemonkit.errors import UsageError
from daemonkit.processes.worker import Recycling, Restarts
from daemonkit.script import Script


def crunch(stop: Any) -> None: ...
def indexed(stop: Any, index: int) -> None: ...
def optional(stop: Any, index: int = 0) -> None: ...
def starred(*arguments: Any) -> None: ...
def bare() -> None: ...
def greedy(stop: Any, index: int, more: int) -> None: ...
async def later(stop: Any) -> None: ...
def yielding(stop: Any) -> Any:
    yield


class Callable:
    def __call__(self, stop: Any) -> None: ...


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": -1}, "@worker crunch, count=-1 must be a whole number, from 0 to 10000"),
        ({"count": 10_001}, "count=10001 must be a whole number, from 0 to 10000"),
        ({"count": 1.5}, "count=1.5"),
        ({"count": True}, "count=True"),
        ({"count": "3"}, "count='3'"),
        ({"name": "two words"}, "name='two words' must be a text without spaces"),
        ({"name": "a\nb"}, "name='a\\nb'"),
        ({"name": 7}, "name=7"),
        ({"readiness": "yes"}, "readiness='yes' must be True or False"),
        ({"essential": 1}, "essential=1 must be True or False"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout(0): must be longer than 0"),
        ({"heartbeat_timeout": -1}, "cannot be negative"),
        ({"heartbeat_timeout": "soon"}, "not a duration"),
        ({"heartbeat_timeout": float("nan")}, "must be finite"),
        ({"max_tasks": 0}, "max_tasks=0 must be a whole number, 1 or more"),
        ({"max_tasks": 2.5}, "max_tasks=2.5"),
        ({"max_age": "1 fortnight"}, '"fortnight" is not a unit of time'),
        ({"max_rss": 0}, "max_rss=0 must be a number of bytes"),
        ({"max_rss": "much"}, "max_rss='much' must be a number of bytes, or text such as \"200M\""),
        ({"max_rss": "-5M"}, "max_rss='-5M'"),
        ({"recycle_jitter": 2}, "recycle_jitter=2 must be a number from 0 to 1"),
        ({"recycle_jitter": -0.1}, "recycle_jitter=-0.1"),
        ({"recycle_jitter": float("nan")}, "recycle_jitter=nan"),
        ({"max_restarts": -1}, "max_restarts=-1 must be a whole number, 0 or more"),
        ({"restart_window": 0}, "restart_window(0)"),
        ({"backoff": 0}, "backoff(0)"),
        ({"max_backoff": float("inf")}, "must be finite"),
        ({"stop_schedule": "TERM"}, "not pairs of signal and seconds"),
        ({"stop_schedule": "TERM/x"}, "not a duration"),
        ({"stop_schedule": "KILL/1/TERM/1"}, "nothing can follow KILL"),
        ({"stop_schedule": "TURM/1"}, "'TURM' is not a signal"),
    ],
)
def test_a_wrong_option_of_a_worker_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Script().worker(**options)(crunch)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (
            lambda s: s.worker(heartbeat="1m"),
            "@worker: there is no option 'heartbeat'; did you mean heartbeat_timeout?",
        ),
        (lambda s: s.program("p", ["sleep"], max_restart=1), "program('p'): there is no option 'max_restart'; did you"),
        (lambda s: s.task(max_retires=3), "@task: there is no option 'max_retires'; did you mean max_retries?"),
        (lambda s: s.task(xyz=3), "@task: there is no option 'xyz'; there are: priority, ttr, max_retries"),
    ],
)
def test_an_option_that_does_not_exist_is_wrong_use_and_the_nearest_one_is_named(declare: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        declare(Script())
    assert said in str(caught.value)


@pytest.mark.parametrize("function", [7, None, "crunch", bare, greedy, later, yielding])
def test_a_worker_must_be_a_plain_function_of_one_or_two_arguments(function: Any) -> None:
    with pytest.raises(UsageError, match=r"\(stop"):
        Script().worker(name="it")(function)


class Loose:
    def crunch(self, stop: Any) -> None: ...


@pytest.mark.parametrize("declare", [Script.worker, Script.task])
def test_a_method_without_its_object_is_refused(declare: Any) -> None:
    with pytest.raises(UsageError, match="without its object"):
        declare(Script(), Loose.crunch)


@pytest.mark.parametrize(
    ("function", "wants"),
    [(crunch, False), (indexed, True), (optional, True), (starred, True), (Callable(), False)],
)
def test_the_index_is_for_who_takes_a_second_argument(function: Any, wants: bool) -> None:
    script = Script()
    script.worker(name="it")(function)
    assert script.workers["it"].wants_index is wants


def test_a_worker_is_declared_with_or_without_parentheses() -> None:
    script = Script()
    script.worker(crunch)
    script.worker()(indexed)
    script.worker(count=3, name="three")(crunch)
    script.worker(2, "two")(functools.partial(crunch))
    assert [(each.name, each.processes) for each in script.workers.values()] == [
        ("crunch", 1),
        ("indexed", 1),
        ("three", 3),
        ("two", 2),
    ]
    assert script.needs_children


def test_a_name_twice_is_refused() -> None:
    script = Script()
    script.worker(crunch)
    with pytest.raises(UsageError, match="there is a worker named 'crunch' already; give this one a name="):
        script.program("crunch", ["sleep", "1"])


def test_all_options_arrive() -> None:
    script = Script()
    script.worker(
        count=4,
        readiness=True,
        essential=True,
        heartbeat_timeout="1m",
        max_tasks=100,
        max_age="1h",
        max_rss="200M",
        recycle_jitter=0.5,
        max_restarts=3,
        restart_window="2m",
        backoff="500ms",
        max_backoff=10,
        stop_schedule="INT/5/KILL/1",
    )(crunch)
    made = script.workers["crunch"]
    assert (made.processes, made.readiness, made.essential, made.heartbeat_timeout) == (4, True, True, 60.0)
    assert made.recycling == Recycling(100, 3600.0, 200 * 2**20, 0.5)
    assert made.restarts == Restarts(3, 120.0, 0.5, 10.0)
    assert made.stop_schedule == ((signal.SIGINT, 5.0), (signal.SIGKILL, 1.0))


@pytest.mark.parametrize(
    ("text", "size"), [("200M", 200 * 2**20), ("1G", 2**30), ("64k", 2**16), ("10MB", 10 * 2**20), ("5000", 5000)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    script = Script()
    script.worker(max_rss=text)(crunch)
    assert script.workers["crunch"].recycling.max_rss == size


@pytest.mark.parametrize(
    ("name", "argv", "options", "said"),
    [
        ("p", [], {}, "argv=[] must be a list of texts, the program first"),
        ("p", "sleep 60", {}, "argv='sleep 60'"),
        ("p", None, {}, "argv=None"),
        ("p", 7, {}, "argv=7"),
        ("p", ["sleep", 60], {}, "argv=['sleep', 60]"),
        ("p", ["a\0b"], {}, "must be a list of texts"),
        ("", ["sleep"], {}, "name='' must be a text"),
        (None, ["sleep"], {}, "name=None"),
        ("p", ["sleep"], {"count": -1}, "program('p'), count=-1"),
        ("p", ["sleep"], {"essential": "no"}, "essential='no'"),
        ("p", ["sleep"], {"stop_schedule": "X/1"}, "'X' is not a signal"),
        ("p", ["sleep"], {"max_restarts": None}, "max_restarts=None"),
    ],
)
def test_a_wrong_program_is_one_sentence(name: Any, argv: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Script().program(name, argv, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 5}, "timeout= is for a job with a process of its own; add fork=True"),
        ({"overlap": "kill"}, 'overlap="kill" is for a job with a process of its own'),
        ({"fork": "no"}, "fork='no' must be True or False"),
        ({"max_instances": 2}, "max_instances > 1 is for a job with a process of its own"),
        ({"max_instances": 0, "fork": True}, "max_instances=0 must be a whole number, 1 or more"),
        ({"max_instances": 1.5, "fork": True}, "max_instances=1.5"),
        ({"overlap": "maybe", "fork": True}, "overlap='maybe' is not one of skip, queue, kill"),
        ({"timeout": 0, "fork": True}, "must be longer than 0"),
        ({"timeout": "never", "fork": True}, "not a duration"),
        ({"leader": "yes"}, "leader='yes' must be True or False"),
    ],
)
@pytest.mark.parametrize("kind", ["every", "cron"])
def test_a_wrong_option_of_a_forked_job_is_one_sentence(kind: str, options: dict[str, Any], said: str) -> None:
    script = Script()
    with pytest.raises(UsageError) as caught:
        (script.every(5, **options) if kind == "every" else script.cron("* * * * *", **options))(bare)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_what_runs_in_a_process_of_its_own_needs_children() -> None:
    script = Script()
    script.every(5)(bare)
    assert not script.needs_children
    script.every(5, fork=True, name="forked", timeout="1m", overlap="kill", max_instances=3)(bare)
    assert script.needs_children
    forking = script.jobs["forked"].policy.forking
    assert forking is not None
    assert (forking.timeout, forking.max_instances) == (60.0, 3)
