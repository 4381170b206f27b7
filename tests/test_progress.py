"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from groupwise.progress import STOPPING, Progress, StopSignals, unsaved_steps


class Heard:
    """A terminal that remembers sentences."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.lock = threading.Lock()

    def say(self, message: str) -> None:
        with self.lock:
            self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


def taking(progress: Progress, heard: Any = None, unsaved: str | None = None) -> StopSignals:
    return StopSignals(progress, heard or Heard(), lambda: unsaved, "groupwise resume runs/x")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_ignored() -> Iterator[None]:
    """Whatever started the tests may have had a signal ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(n, signal.default_int_handler if n == signal.SIGINT else signal.SIG_DFL) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_remembered_and_said_with_what_another_would_lose(number: signal.Signals) -> None:
    progress, heard = Progress(1, 3), Heard()
    with taking(progress, heard, "step 3, about 2 min 0 s of work"):
        os.kill(os.getpid(), number)
        wait_for(lambda: heard.said)
    assert progress.stopped == number
    assert heard.said == [f"{STOPPING.format(unit='step')}, which loses step 3, about 2 min 0 s of work"]
    assert heard.warned == []


def test_a_signal_that_comes_while_the_terminal_is_busy_waits_for_it() -> None:
    """The terminal's lock is held by the very thread that the signal interrupts."""
    progress, heard = Progress(1, 3), Heard()
    with taking(progress, heard):
        with heard.lock:
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: progress.stopped)
        wait_for(lambda: heard.said)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_second_signal_stops_at_once_and_says_what_is_lost(
    number: signal.Signals, error: type[BaseException]
) -> None:
    progress, heard = Progress(1, 3), Heard()
    with pytest.raises(error) as caught, taking(progress, heard, "steps 3 to 4, about 1.0 s of work"):  # noqa: PT012
        os.kill(os.getpid(), number)
        wait_for(lambda: progress.stopped)
        signal.raise_signal(number)
    assert number == signal.SIGINT or caught.value.args == (143,)
    lost = "lost: steps 3 to 4, about 1.0 s of work"
    assert heard.warned == [f"stopped at once; {lost}; go on with: groupwise resume runs/x"]


def test_a_terminal_that_closes_sends_several_signals_and_means_one() -> None:
    progress = Progress(1, 3)
    with taking(progress):
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert progress.stopped == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals) -> None:
    """As nohup has SIGHUP ignored, and a shell Ctrl-C for what runs in its background."""
    signal.signal(number, signal.SIG_IGN)
    progress = Progress(1, 3)
    with taking(progress):
        signal.raise_signal(number)
        assert progress.stopped is None
    assert signal.getsignal(number) is signal.SIG_IGN


def test_handlers_are_given_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with taking(Progress(1, 3)):
        assert all(signal.getsignal(number) != old for number, old in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_is_not_saved_is_told_in_steps_and_time() -> None:
    assert unsaved_steps(4, 3, 100.0) is None
    assert unsaved_steps(4, 4, 100.0) == "step 4, about 1 min 40 s of work"
    assert unsaved_steps(4, 6, 4000.0) == "steps 4 to 6, about 1 h 6 min of work"


def test_in_another_thread_signals_stay_with_whoever_runs_us() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with taking(Progress(1, 3)):
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
