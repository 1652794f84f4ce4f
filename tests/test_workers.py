"""What an event leads to in each state of a worker's place; backoff; the stop flag."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from daemonkit.core.board import Board
from daemonkit.core.signals import Signals
from daemonkit.core.stop import Stop
from daemonkit.core.timer import Timer
from daemonkit.master.backoff import Backoff
from daemonkit.master.place import TABLE, Event, Place, State
from daemonkit.master.workers import Workers
from daemonkit.processes import stopflag
from daemonkit.processes.receipt import Receipt
from daemonkit.processes.stopflag import StopFlag, Wear
from daemonkit.processes.wire import Wire, pair
from daemonkit.processes.worker import Note, Recycling, Restarts, Worker

# What each pair leads to; a pair that is not here changes nothing.
TRANSITIONS = {
    (State.IDLE, Event.STOP): State.IDLE,
    (State.WAITING, Event.SERVER): State.WAITING,  # there is none in this test
    (State.WAITING, Event.STOP): State.IDLE,
    (State.STARTING, Event.READY): State.READY,
    (State.STARTING, Event.SETTLED): State.READY,
    (State.STARTING, Event.RECYCLE): State.RECYCLING,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.STARTING, Event.ENDED): State.BACKOFF,
    (State.STARTING, Event.LOST): State.WAITING,
    (State.READY, Event.RECYCLE): State.RECYCLING,
    (State.READY, Event.STOP): State.STOPPING,
    (State.READY, Event.ENDED): State.BACKOFF,
    (State.READY, Event.LOST): State.WAITING,
    (State.RECYCLING, Event.STOP): State.STOPPING,
    (State.RECYCLING, Event.ENDED): State.WAITING,
    (State.RECYCLING, Event.LOST): State.WAITING,
    (State.STOPPING, Event.ENDED): State.IDLE,
    (State.STOPPING, Event.LOST): State.IDLE,
    (State.BACKOFF, Event.RESPAWN): State.WAITING,
    (State.BACKOFF, Event.STOP): State.IDLE,
    (State.FATAL, Event.STOP): State.IDLE,
}
KILLED = Receipt(1, None, signal.SIGKILL, False, 0.0, 0, 0.5)


class Alive:
    """What a place knows of its process, without one."""

    server = child = since = None
    heard, why, words = 0.0, "", ""

    def signal(self, number: int) -> None: ...


def place(state: State, workers: Workers | None = None) -> Place:
    if workers is None:
        signals = Signals(Stop(20.0, lambda: None))
        workers = Workers(Timer(signals, Board()), lambda place: None)
        workers.stop_schedule = ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0))
    made = Place(workers, Worker("crunch", None, ("true",)), 0)
    made.state, made.last = state, KILLED
    made.life = Alive()  # type: ignore[assignment]
    made._backoff.wait(Restarts(), time.monotonic(), 0.0)  # it has ended before: the next time waits
    return made


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_event_in_every_state(state: State, event: Event) -> None:
    made = place(state)
    made.react(event)
    assert made.state is TRANSITIONS.get((state, event), state)
    assert ((state, event) in TABLE) == ((state, event) in TRANSITIONS)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(Event, Event)))
def test_no_two_events_after_each_other_break_a_place(first: Event, second: Event) -> None:
    for state in State:
        made = place(state)
        made.react(first)
        made.react(second)
        made.react(Event.STOP)
        made.react(Event.ENDED)
        assert made.state is State.IDLE


def test_backoff_is_at_once_then_doubles_up_to_its_longest() -> None:
    backoff, policy = Backoff(), Restarts(most=100, window=1000, backoff=1, longest=10)
    waits = [backoff.wait(policy, float(moment), 0.0) for moment in range(8)]
    assert waits[0] == 0.0
    for wait, about in zip(waits[1:], [1, 2, 4, 8, 10, 10, 10], strict=True):
        assert wait is not None
        assert about * 0.8 <= wait <= about * 1.2


def test_backoff_forgets_when_one_has_lived_long() -> None:
    backoff, policy = Backoff(), Restarts(most=100, window=1000, backoff=1, longest=10)
    assert [backoff.wait(policy, moment, 0.0) == 0.0 for moment in (0.0, 1.0, 2.0)] == [True, False, False]
    assert backoff.wait(policy, 13.0, 10.0) == 0.0


def test_backoff_ends_after_too_many_in_the_window_alone() -> None:
    backoff, policy = Backoff(), Restarts(most=2, window=10, backoff=1, longest=10)
    assert None not in [backoff.wait(policy, moment, 0.0) for moment in (0.0, 9.0, 11.0, 20.0)]
    assert backoff.wait(policy, 20.5, 0.0) is None
    assert backoff.count == 3


def test_backoff_has_no_end_of_numbers() -> None:
    backoff, policy = Backoff(), Restarts(most=10**9, window=1, backoff=1, longest=30)
    assert all((backoff.wait(policy, moment * 100.0, 0.0) or 0) <= 36 for moment in range(5000))


# --- the flag ---


@pytest.fixture
def notes() -> Iterator[tuple[Wire, Wire]]:
    before = signal.getsignal(signal.SIGTERM)
    ours, theirs = pair()
    ours.setblocking(False)
    wires = Wire(ours), Wire(theirs)
    yield wires
    for wire in wires:
        wire.close()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, before)


def heard(wire: Wire) -> list[Note]:
    found = []
    while (message := wire.receive()) is not None:
        found.append(Note(message.kind))
    return found


def flag(notes: tuple[Wire, Wire], **options: object) -> StopFlag:
    made = StopFlag(notes[1], 1, Worker("crunch", print, **options))  # type: ignore[arg-type]
    for fd in (made._wakeup, made._writer):
        os.set_inheritable(fd, False)
    return made


def test_the_first_look_says_ready_once(notes: tuple[Wire, Wire]) -> None:
    stop = flag(notes)
    assert not stop.is_set()
    assert not stop.is_set()
    stop.ready()
    assert heard(notes[0]) == [Note.READY]


def test_with_readiness_only_ready_says_so(notes: tuple[Wire, Wire]) -> None:
    stop = flag(notes, readiness=True)
    stop.is_set()
    assert heard(notes[0]) == []
    stop.ready()
    stop.ready()
    assert heard(notes[0]) == [Note.READY]


def test_term_sets_the_flag_and_ends_a_wait_without_end(notes: tuple[Wire, Wire]) -> None:
    stop = flag(notes)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert stop.wait()
    assert stop.is_set()
    timer.join()


def test_a_wait_ends_when_its_time_is_up(notes: tuple[Wire, Wire]) -> None:
    began = time.monotonic()
    assert not flag(notes).wait(0.2)
    assert time.monotonic() - began >= 0.2
    assert not flag(notes).wait(0)


def test_beats_are_told_seldom_also_in_a_wait(notes: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: on a busy machine time may pass between two looks."""
    now = 0.0

    def sleep(timeout: float) -> None:
        nonlocal now
        now += timeout

    monkeypatch.setattr(stopflag, "time", SimpleNamespace(monotonic=lambda: now))
    stop = flag(notes, heartbeat_timeout=1)
    monkeypatch.setattr(stop, "_sleep", sleep)
    for _ in range(1024):
        sleep(1 / 1024)
        stop.is_set()
    assert heard(notes[0]).count(Note.BEAT) == 4
    assert not stop.wait(1.25)
    assert heard(notes[0]).count(Note.BEAT) == 5
    assert now == 2.25


def test_beats_do_not_hold_up_a_worker_whose_master_does_not_listen(notes: tuple[Wire, Wire]) -> None:
    stop = flag(notes, heartbeat_timeout=1e-6)
    for _ in range(5000):
        stop.heartbeat()
    assert Note.BEAT in heard(notes[0])


def test_so_many_looks_and_then_it_is_worn(notes: tuple[Wire, Wire]) -> None:
    stop = flag(notes, recycling=Recycling(max_tasks=3, jitter=0))
    assert [stop.is_set() for _ in range(5)] == [False, False, False, True, True]
    assert heard(notes[0]) == [Note.READY, Note.RECYCLE]


def test_jitter_lengthens_each_limit_by_up_to_its_share() -> None:
    def tasks_of(wear: Wear) -> int:
        while wear.why(0.0) is None:
            wear.looks += 1
        return wear.looks - 1

    wears = [Wear(Recycling(1000, 1000.0, jitter=0.5)) for _ in range(50)]
    ages, tasks = [round(wear.left()) for wear in wears], [tasks_of(wear) for wear in wears]
    for numbers in (ages, tasks):
        assert all(1000 <= number <= 1500 for number in numbers)
        assert len(set(numbers)) > 10
