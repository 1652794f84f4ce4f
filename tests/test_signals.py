"""core.signals: noted at once, acted on later, raised only when a stop may wait no longer."""

from __future__ import annotations

import gc
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from daemonkit.core.signals import Signals
from daemonkit.core.stop import Stop, StopNow

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in (*CAUGHT, signal.SIGALRM)}
    made = Signals(Stop(graceful_timeout=30, last_resort=lambda: None))
    gc.disable()  # what is raised inside a collector's callback is lost; the daemon's deadline rings again, ours not
    made.wakeup = made.install(CAUGHT)  # type: ignore[attr-defined]
    yield made
    gc.enable()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def kill(number: int) -> None:
    # To this thread: the one that a test runner has beside it has nothing blocked, and the kernel takes any.
    signal.pthread_kill(threading.get_ident(), number)


def test_signals_are_noted_in_their_order_and_equal_ones_merge(signals: Signals) -> None:
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1):
        kill(number)
    assert signals.take() == [signal.SIGUSR1, signal.SIGHUP]
    assert signals.take() == []


def test_a_signal_ends_a_sleep_on_the_wakeup_pipe(signals: Signals) -> None:
    kill(signal.SIGHUP)
    assert select.select([signals.wakeup], [], [], 5)[0]  # type: ignore[attr-defined]


def test_a_full_wakeup_pipe_loses_no_kind_of_signal(signals: Signals) -> None:
    for _ in range(100_000):
        kill(signal.SIGUSR1)
    kill(signal.SIGTERM)
    assert signal.SIGTERM in signals.take()


def test_the_first_term_gives_the_code_in_hand_its_time(signals: Signals) -> None:
    before = time.monotonic()
    with signals.interruptible():
        kill(signal.SIGTERM)
    after = time.monotonic()
    assert signals.stop.signal == signal.SIGTERM
    assert not signals.stop.interrupted
    assert signals.stop.deadline is not None
    assert before + 30 <= signals.stop.deadline <= after + 30


@pytest.mark.parametrize("kinds", [[signal.SIGQUIT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_quit_or_a_second_request_interrupts_at_once(signals: Signals, kinds: list[int]) -> None:
    with pytest.raises(StopNow), signals.interruptible():
        for number in kinds:
            kill(number)
    assert signals.stop.at_once
    assert signals.stop.interrupted


def test_at_the_deadline_the_code_in_hand_is_interrupted(signals: Signals) -> None:
    signals.stop.graceful_timeout = 0.05
    kill(signal.SIGTERM)
    with pytest.raises(StopNow), signals.interruptible():
        select.select([], [], [], 30)


def test_outside_the_users_code_nothing_is_ever_raised(signals: Signals) -> None:
    signals.stop.graceful_timeout = 0
    kill(signal.SIGTERM)
    kill(signal.SIGTERM)
    kill(signal.SIGQUIT)
    assert not signals.stop.interrupted
    with pytest.raises(StopNow), signals.interruptible():
        pass


def test_code_that_swallows_the_interruption_meets_the_last_resort(signals: Signals) -> None:
    class Ended(BaseException):
        """What stands for the end of the process here."""

    def end() -> None:
        raise Ended

    signals.stop._last_resort = end
    with pytest.raises(Ended), signals.interruptible():
        while True:
            try:
                kill(signal.SIGQUIT)
            except StopNow:
                continue


def test_replaced_handlers_are_told_and_can_be_put_back(signals: Signals) -> None:
    assert signals.taken_over() == []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signals.taken_over() == [(signal.SIGHUP, signal.SIG_IGN)]
    signals.restore(signal.SIGHUP)
    assert signals.taken_over() == []


def test_while_all_are_blocked_none_is_lost(signals: Signals) -> None:
    signals.block_all()
    kill(signal.SIGHUP)
    assert signals.take() == []
    signals.unblock_all()
    assert signals.take() == [signal.SIGHUP]
