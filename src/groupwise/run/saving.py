"""Saving a run and taking it up again: everything with state, so that the next step is the same, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from groupwise.config import CheckpointSection
from groupwise.learn.base import Learner
from groupwise.progress import Progress, unsaved_steps
from groupwise.reward_models.rounds import Rounds
from groupwise.run.evaluate import Evaluator
from groupwise.state import Lazily, State, Stateful
from groupwise.store import checkpoint
from groupwise.store.checkpoint import Checkpoint
from groupwise.store.folder import RunFolder
from groupwise.store.provenance import JOB, Provenance
from groupwise.watch.record import Recorder


class Clock:
    """Seconds of the whole run: this process's and those of the processes before it. `now` tells the time."""

    def __init__(self, before: float = 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        self.before, self.now, self.start = before, now, now()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + self.now() - self.start

    def state(self) -> State:
        """See `Stateful`."""
        return State(values={"seconds": self.seconds})

    def restore(self, state: State) -> None:
        """See `Stateful`."""
        self.before = state.values["seconds"]


class Best:
    """The best evaluation of a run so far, whose weights are kept beside the checkpoints where `kept`."""

    def __init__(self, folder: RunFolder, evaluation: Evaluator, learner: Learner, *, kept: bool) -> None:
        self.folder, self.evaluation, self.learner, self.kept = folder, evaluation, learner, kept
        self.value: float | None = None

    def maybe(self, step: int) -> None:
        """Keep the weights, where this step was evaluated and is better than all before it."""
        evaluation = self.evaluation
        if not self.kept or evaluation.at_step != step or evaluation.last is None:
            return
        value = evaluation.last.get("reward")  # there is none where no output was scored
        if value is not None and (self.value is None or value > self.value):
            self.value = value
            checkpoint.save_best(self.folder.checkpoints, step, value, self.learner.master_weights())

    def state(self) -> State:
        """See `Stateful`."""
        return State(values={"value": self.value})

    def restore(self, state: State) -> None:
        """See `Stateful`."""
        self.value = state.values["value"]


class _Files(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of a checkpoint by file, each read when it is asked for."""

    def __init__(self, saved: Checkpoint) -> None:
        self._saved = saved

    def __getitem__(self, stem: str) -> Mapping[str, Tensor]:
        if stem not in self._saved.aliases:
            raise KeyError(stem)
        return self._saved.tensors(stem)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved.aliases)

    def __len__(self) -> int:
        return len(self._saved.aliases)

    def __contains__(self, stem: object) -> bool:
        return stem in self._saved.aliases


class _Lines(Mapping[str, str]):
    """The files of lines of a checkpoint, each read when it is asked for."""

    def __init__(self, saved: Checkpoint) -> None:
        self._saved = saved

    def __getitem__(self, name: str) -> str:
        return self._saved.text(name)

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._saved.path.glob("*.jsonl"))

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(frozen=True)
class RunState:
    """The parts of a run that a checkpoint must hold, by name, in the order in which they are taken up. Draws and data
    order are functions of seed and position, and therefore in none of them."""

    parts: Mapping[str, Stateful]

    def state(self) -> State:
        """All of them as one: their files side by side, their values by the part's name."""
        states = {name: part.state() for name, part in self.parts.items()}
        tensors = {stem: named for one in states.values() for stem, named in one.tensors.items()}
        lines = Lazily({name: partial(one.lines.__getitem__, name) for one in states.values() for name in one.lines})
        return State(tensors, {name: dict(one.values) for name, one in states.items()}, lines)

    def restore(self, saved: Checkpoint, *, only: Collection[str] | None = None) -> None:
        """Take up the parts (all of them, or `only` some) where `saved` left off. Raises GroupwiseError where it is of
        another model or other data."""
        files, lines = _Files(saved), _Lines(saved)
        for name, part in self.parts.items():
            if only is None or name in only:
                part.restore(State(files, saved.state.get(name, {}), lines, source=str(saved.path)))

    def fork(self, saved: Checkpoint) -> None:
        """Begin a new run from `saved`, with an evaluation and a clock of its own. Other prompts are drawn from their
        beginning. Raises RunFolderError where the checkpoint is of another model."""
        self.restore(saved, only=("learner", "progress"))
        ours = self.parts["rollouts"].state().values
        if saved.state["rollouts"]["fingerprint"] == ours["fingerprint"]:
            self.restore(saved, only=("rollouts", "rounds"))


class Saver:
    """Saves by the job's schedule, and always when the run ends or is asked to stop. What is saved is `run`, whatever
    is in it; of the others it is told when to."""

    def __init__(
        self, folder: RunFolder, schedule: CheckpointSection, run: RunState, watch: Recorder, *, progress: Progress,
        clock: Clock, learner: Learner, rounds: Rounds, best: Best,
    ) -> None:  # fmt: skip
        self.folder, self.schedule, self.run, self.watch = folder, schedule, run, watch
        self.progress, self.clock, self.learner, self.rounds, self.best = progress, clock, learner, rounds, best
        self.saved_step = 0
        self.saved_rounds = dict(rounds.state().values)
        self.saved_seconds = clock.seconds
        self._whole: tuple[int, int, State] | None = None
        self.job = ""
        self.made_by: Provenance | None = None

    def maybe(self, step: int) -> None:
        """See `Checkpoints`."""
        start = time.perf_counter()
        self.best.maybe(step)
        every = self.schedule.every
        if (every > 0 and step % every == 0) or self._long_ago():
            self.save(step)
            self.watch.carry({"time/checkpoint": time.perf_counter() - start})
        self._whole = step, self.learner.updates, self._state()

    def rescue(self) -> None:
        """Save the last whole step before an error ends the run, where its weights are still there.

        They are while the step under way has made no update. All else that a step changes is in a state that was
        taken when the last one was over, so that a resumed run begins the step anew.
        """
        if self._whole is None:
            return
        step, updates, whole = self._whole
        if updates != self.learner.updates:
            return
        now = self._state()
        if self.progress.step != step:
            now, self.progress.step = replace(whole, tensors=now.tensors), step
        if step != self.saved_step or self.saved_rounds != now.values["rounds"]:
            self._write(step, now)

    def finish(self) -> None:
        """See `Checkpoints`."""
        step = self.progress.step
        if step != self.saved_step or self.saved_rounds != self.rounds.state().values:
            self.save(step)
        checkpoint.prune(self.folder.checkpoints, self.schedule.keep)  # a kill may have come before it

    def round_over(self) -> None:
        """See `Saving`: what a round made is not to be made again."""
        if self.schedule.every > 0 or self._long_ago():
            self.save(self.progress.step)

    def resumed(self, saved: Checkpoint) -> None:
        """What `saved` has is saved."""
        self.saved_step, self.saved_rounds = saved.step, saved.state.get("rounds", {})
        self.saved_seconds = self.clock.seconds

    def unsaved(self) -> str | None:
        """What no checkpoint has, the step under way included, in words; None where that is nothing."""
        now = self.clock.seconds
        return unsaved_steps(self.saved_step + 1, self.progress.step, now - self.saved_seconds)

    def _long_ago(self) -> bool:
        """Whether so much time has passed that another checkpoint is due."""
        minutes = self.schedule.minutes
        return 0 < minutes <= (self.clock.seconds - self.saved_seconds) / 60

    def save(self, step: int) -> None:
        """Save now."""
        self._write(step, self._state())

    def _state(self) -> State:
        """What a checkpoint would hold now: of the parts, of what made them, and of the files beside them."""
        state = self.run.state()
        made_by = {"made_by": self.made_by.state()} if self.made_by else {}
        beside = {"step": self.progress.step, "lines": self.watch.lines()}
        return replace(state, values={**state.values, **made_by, **beside})

    def _write(self, step: int, state: State) -> None:
        texts = {JOB: self.job, **state.lines}
        checkpoint.save(self.folder.checkpoints, step, tensors=state.tensors, state=state.values, texts=texts)
        checkpoint.prune(self.folder.checkpoints, self.schedule.keep)
        self.saved_step, self.saved_rounds = step, state.values["rounds"]
        self.saved_seconds = self.clock.seconds
