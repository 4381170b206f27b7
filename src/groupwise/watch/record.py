"""What a step leaves behind: its metrics, the seconds of its phases, and what its sinks are shown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, ClassVar, Protocol, TypeVar

from groupwise.learn.optimizer import refusal
from groupwise.learn.pack import Credit
from groupwise.rewards.base import Outcome
from groupwise.store import events
from groupwise.store.checkpoint import Checkpoint
from groupwise.store.events import EventsFile, RolloutsFile, Sink
from groupwise.store.folder import RunFolder
from groupwise.types import Scored
from groupwise.watch.terminal import Terminal


class Record:
    """One step under way. `metrics` becomes its event; `extras` are columns that rewards add to the rollouts, and
    `outcomes` is what their calls came to."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.metrics: dict[str, Any] = {}
        self.extras: dict[str, list[Any]] = {}
        self.outcomes: list[Outcome] = []

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the seconds of what runs inside to `time/<phase>`."""
        start = time.perf_counter()
        yield
        name = f"time/{phase}"
        self.metrics[name] = self.metrics.get(name, 0.0) + time.perf_counter() - start


class Recorder:
    """Writes what a step leaves behind: events, rollouts, terminal."""

    def __init__(self, sinks: Sequence[Sink], terminal: Terminal, rollouts: RolloutsFile | None) -> None:
        self.sinks, self.terminal, self.rollouts = list(sinks), terminal, rollouts
        self._carried: dict[str, Any] = {}

    @contextmanager
    def step(self, step: int) -> Iterator[Record]:
        """A step's record; its event is written when the step has gone well."""
        record = Record(step)
        record.metrics |= self._carried
        self._carried = {}
        with record.time("step"):
            yield record
        seconds = record.metrics["time/step"]
        if "tokens/sampled" in record.metrics:
            record.metrics["tokens/per_second"] = record.metrics["tokens/sampled"] / seconds
        if self.terminal.lost:
            record.metrics["terminal/lost"] = len(self.terminal.lost)
        # A reward may log a metric under any name, but the step is the step.
        event = {"step": step} | record.metrics | {"step": step}
        for sink in (*self.sinks, self.terminal):
            sink.write(event)

    def groups(self, record: Record, scored: Scored, credit: Credit) -> None:
        """Keep a step's groups for reading, count those that teach nothing, and show one output."""
        record.metrics["frac_advantage_zero"] = frac_zero(credit)
        if self.rollouts is not None:
            self.rollouts.write(record.step, scored, credit, record.extras)
        if scored:
            group, score = scored[0].group, scored[0].scores[0]
            self.terminal.sample(group.completions[0].text, score.reward, group.prompt.asked)

    def carry(self, metrics: Mapping[str, Any]) -> None:
        """Put into the next event what happened between two steps."""
        self._carried |= metrics

    def lines(self) -> dict[str, int]:
        """The lines of each file that a resumed run goes on with: `{"events.jsonl": 12, "rollouts.jsonl": 96}`."""
        files = [one for one in (*self.sinks, self.rollouts) if isinstance(one, EventsFile | RolloutsFile)]
        return {file.path.name: file.lines for file in files}

    def close(self) -> None:
        """Close every file; the terminal stays for the last sentence."""
        for sink in self.sinks:
            sink.close()
        if self.rollouts is not None:
            self.rollouts.close()


def frac_zero(credit: Credit) -> float:
    """The share of groups in which every advantage is 0."""
    taught = [any(any(one) if isinstance(one, Sequence) else one for one in group) for group in credit]
    return 1.0 - sum(taught) / max(1, len(taught))


def warn_of_refused(metrics: Mapping[str, float], watch: Recorder, of: str = "") -> None:
    """Say at once that updates were refused, where any were; `of` says whose."""
    said = refusal(metrics)
    if said:
        watch.terminal.warn(of + said)


class Ended(Protocol):
    """What a run came to, as a frozen dataclass with a field `lost_output`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended it before its last step."""


R = TypeVar("R", bound=Ended)


def with_lost_output(result: R, folder: RunFolder, terminal: Terminal) -> R:
    """`result` with the streams that `terminal` lost, also in its file: the last line may be what could not be written.

    Raises RunFolderError where the file cannot be written.
    """
    if not terminal.lost:
        return result
    result = replace(result, lost_output=tuple(terminal.lost))
    if result.stopped_by is None:
        folder.write_result(asdict(result))
    return result


def warn_of_missing_lines(folder: RunFolder, saved: Checkpoint, watch: Recorder) -> None:
    """Lines that stood in a file when the checkpoint was written, and do not any more."""
    now = watch.lines()
    for name, before in saved.state["lines"].items():
        if now.get(name, before) != before:
            gone = events.missing_steps(folder.path / name, saved.step)
            where = f" (nothing of {gone})" if gone else ""
            watch.terminal.warn(
                f"{name} has {now[name]} lines up to step {saved.step}, and had {before} when that was saved{where}: "
                "lines were deleted or cut since"
            )
