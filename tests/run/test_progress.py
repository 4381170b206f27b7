"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from groupwise.run.progress import STOPPING, Progress, StopSignals


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_said(number: signal.Signals) -> None:
    progress, said = Progress(1, 3), list[str]()
    with StopSignals(progress, said.append):
        os.kill(os.getpid(), number)
        wait_for(lambda: said)
    assert progress.stopped == number
    assert said == [STOPPING]


def test_a_signal_that_comes_while_the_terminal_is_busy_waits_for_it() -> None:
    """The terminal's lock is held by the very thread that the signal interrupts."""
    progress, lock, said = Progress(1, 3), threading.Lock(), list[str]()

    def say(message: str) -> None:
        with lock:
            said.append(message)

    with StopSignals(progress, say):
        with lock:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: progress.stopped)
        wait_for(lambda: said)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_second_signal_stops_at_once(number: signal.Signals, error: type[BaseException]) -> None:
    progress = Progress(1, 3)
    with StopSignals(progress, lambda message: None):
        os.kill(os.getpid(), number)
        wait_for(lambda: progress.stopped)
        with pytest.raises(error) as caught:
            signal.raise_signal(number)
    assert number == signal.SIGINT or caught.value.args == (143,)


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals(Progress(1, 3), lambda message: None):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_signals_stay_with_whoever_runs_us() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with StopSignals(Progress(1, 3), lambda message: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_steps_are_counted_through_the_iterations() -> None:
    progress = Progress(2, 3)
    assert [(i, list(progress.steps())) for i in progress.iterations()] == [(0, [1, 2, 3]), (1, [4, 5, 6])]
    later = Progress(2, 3, done=2)
    assert [(i, list(later.steps())) for i in later.iterations()] == [(0, [3]), (1, [4, 5, 6])]
