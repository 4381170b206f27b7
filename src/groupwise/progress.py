"""How far a run is, and how it is asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

from groupwise.errors import Stopped
from groupwise.readable import duration
from groupwise.state import State

STOPPING = "stopping after this {unit}; once more to stop at once"


class Speaks(Protocol):
    """Who tells a person what becomes of a signal."""

    def say(self, message: str) -> None:
        """Show a sentence."""

    def warn(self, message: str) -> None:
        """Show a sentence that wants attention."""


class Progress:
    """Counts steps from 1; `step` is the last one begun. Once `stopped` is set, the step under way is the last."""

    def __init__(self, iterations: int, steps: int, done: int = 0) -> None:
        self.total = iterations * steps
        self.steps_per_iteration = steps
        self.step = done
        self.stopped: signal.Signals | None = None

    def state(self) -> State:
        """See `Stateful`."""
        return State(values={"step": self.step})

    def restore(self, state: State) -> None:
        """See `Stateful`."""
        self.step = state.values["step"]

    def iterations(self) -> Iterator[int]:
        """The outer iterations that are not finished, from 0."""
        while self.step < self.total and not self.stopped:
            yield self.step // self.steps_per_iteration

    def steps(self) -> Iterator[int]:
        """The steps that remain of the iteration under way."""
        end = (self.step // self.steps_per_iteration + 1) * self.steps_per_iteration
        while self.step < end and not self.stopped:
            self.step += 1
            yield self.step


class StopSignals:
    """While active, Ctrl-C, SIGTERM and SIGHUP let the step under way finish; a further Ctrl-C or SIGTERM ends it at
    once. A signal that whoever started us has had ignored, as nohup does, stays ignored.

    `unsaved` tells what ending at once would lose, as in `step 3, about 2 min of work` (None: nothing), `way_on` the
    command that goes on, and `unit` what is counted.
    """

    def __init__(
        self, progress: Progress, terminal: Speaks, unsaved: Callable[[], str | None], way_on: str, unit: str = "step"
    ) -> None:
        self.progress, self.terminal, self.unsaved = progress, terminal, unsaved
        self.way_on, self.unit = way_on, unit
        self._before: dict[signal.Signals, Any] = {}
        self._at_once = False

    def __enter__(self) -> StopSignals:
        # Elsewhere than in the main thread Python takes no handlers: whoever runs us there has their own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: it is not Python's to give back
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._at_once:
            lost = self.unsaved()
            found = f"no {self.unit} is lost" if lost is None else f"lost: {lost}"
            self.terminal.warn(f"stopped at once; {found}; go on with: {self.way_on}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.progress.stopped is None:
            self.progress.stopped = signal.Signals(number)
            # The signal may have come in the middle of a line, or of a lock that the terminal holds.
            threading.Thread(target=self._say, daemon=True).start()
        elif number != signal.SIGHUP:  # a terminal that closes often sends several, and means nothing by it
            self._at_once = True
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)

    def _say(self) -> None:
        lost = self.unsaved()
        self.terminal.say(STOPPING.format(unit=self.unit) + ("" if lost is None else f", which loses {lost}"))


def unsaved_steps(first: int, last: int, seconds: float, unit: str = "step") -> str | None:
    """The work that no checkpoint has, in words; None where `first` is after `last`."""
    if first > last:
        return None
    steps = f"{unit} {first}" if first == last else f"{unit}s {first} to {last}"
    return f"{steps}, about {duration(seconds)} of work"
