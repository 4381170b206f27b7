"""How far a run is, and how it is asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = "stopping after this step; once more to stop at once, back to the last checkpoint"


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
    """While active, Ctrl-C and SIGTERM let the step under way finish; a second one ends it at once."""

    def __init__(self, progress: Progress, say: Callable[[str], None]) -> None:
        self.progress, self.say = progress, say
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Elsewhere than in the main thread Python takes no handlers: whoever runs us there has their own.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.progress.stopped:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.progress.stopped = signal.Signals(number)
        # The signal may have come in the middle of a line, or of a lock that the terminal holds.
        threading.Thread(target=self.say, args=(STOPPING,), daemon=True).start()
