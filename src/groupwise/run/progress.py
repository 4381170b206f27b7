"""How far a run is, and how it is asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from groupwise.errors import Stopped
from groupwise.watch.terminal import Terminal
from groupwise.watch.words import duration

STOPPING = "stopping after this step; once more to stop at once"


class Progress:
    """Counts steps from 1; `step` is the last one begun. Once `stopped` is set, the step under way is the last."""

    def __init__(self, iterations: int, steps: int, done: int = 0) -> None:
        self.total = iterations * steps
        self.steps_per_iteration = steps
        self.step = done
        self.stopped: signal.Signals | None = None

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

    `unsaved` tells what ending at once would lose, as in `step 3, about 2 min of work`; None: nothing.
    """

    def __init__(
        self, progress: Progress, terminal: Terminal, unsaved: Callable[[], str | None], run: str | Path
    ) -> None:
        self.progress, self.terminal, self.unsaved, self.run = progress, terminal, unsaved, run
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
            found = "no step is lost" if lost is None else f"lost: {lost}"
            self.terminal.warn(f"stopped at once; {found}; go on with: groupwise resume {self.run}")

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
        self.terminal.say(STOPPING + ("" if lost is None else f", which loses {lost}"))


def unsaved_steps(first: int, last: int, seconds: float) -> str | None:
    """The work that no checkpoint has, in words; None where `first` is after `last`."""
    if first > last:
        return None
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"{steps}, about {duration(seconds)} of work"
