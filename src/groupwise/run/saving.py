"""Saving a run and taking it up again: everything with state, so that the next step is the same, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from groupwise.config import CheckpointSection
from groupwise.data.stream import PromptStream
from groupwise.errors import RunFolderError
from groupwise.learn.learner import Learner
from groupwise.learn.reference import NoReference, Reference
from groupwise.progress import Progress, unsaved_steps
from groupwise.reward_models.rounds import Rounds
from groupwise.rewards.patience import Patience
from groupwise.run.evaluate import Evaluator
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


@dataclass
class Stateful:
    """The parts of a run that a checkpoint must hold. Draws and data order are functions of seed and position."""

    progress: Progress
    prompts: PromptStream
    learner: Learner
    reference: Reference | NoReference
    evaluation: Evaluator
    clock: Clock
    rounds: Rounds
    patience: Patience = field(default_factory=Patience)
    best: float | None = None

    def tensors(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors by file, and what goes into `state.json`."""
        files, counters = self.learner.state_dict()
        reference = self.reference.state_dict()
        state = {
            "step": self.progress.step,
            "prompts": self.prompts.state_dict(),
            "learner": counters,
            "reference_iteration": self.reference.iteration,
            "evaluation": {name: getattr(self.evaluation, name) for name in ("first", "last", "at_step")},
            "seconds": self.clock.seconds,
            "best": self.best,
            "rounds": self.rounds.state(),
            "patience": self.patience.state(),
        }
        return {**files, **({"reference": reference} if reference else {}), **self.rounds.tensors()}, state

    def restore(self, saved: Checkpoint) -> None:
        """Take up where `saved` left off. Raises RunFolderError or DataError where it is of another model or data."""
        state = saved.state
        self.restore_policy(saved)
        self.prompts.load_state_dict(state["prompts"])
        for name, value in state["evaluation"].items():
            setattr(self.evaluation, name, value)
        self.clock.before, self.best = state["seconds"], state["best"]
        self.patience.load(state["patience"])
        self._restore_rounds(saved)

    def fork(self, saved: Checkpoint) -> None:
        """Begin a new run from `saved`, with an evaluation and a clock of its own.

        Other prompts are drawn from their beginning. Raises RunFolderError where the checkpoint is of another model.
        """
        self.restore_policy(saved)
        if saved.state["prompts"]["fingerprint"] == self.prompts.state_dict()["fingerprint"]:
            self.prompts.load_state_dict(saved.state["prompts"])
            self._restore_rounds(saved)

    def _restore_rounds(self, saved: Checkpoint) -> None:
        """A checkpoint without a reward model leaves one that is trained now as it is."""
        if found := saved.state.get("rounds"):
            self.rounds.load(saved.tensors, found, saved.text)
        else:
            self.rounds.start_at(self.progress.step)

    def restore_policy(self, saved: Checkpoint) -> None:
        """Weights, optimizer and reference. A reference where there was none becomes the policy as it is now."""
        state, model = saved.state, saved.tensors("model")
        check_shapes(self.learner.master_weights(), model, saved)
        self.learner.load_state_dict({"model": model, "optimizer": saved.tensors("optimizer")}, state["learner"])
        if "reference" in saved.aliases:
            self.reference.load_state_dict(saved.tensors("reference"), state["reference_iteration"])
        self.progress.step = state["step"]


def check_shapes(own: Mapping[str, Tensor], found: Mapping[str, Tensor], saved: Checkpoint) -> None:
    """Raise RunFolderError unless a checkpoint's weights are of this model."""
    for name in sorted(own.keys() | found.keys()):
        ours, theirs = (str(list(side[name].shape)) if name in side else "absent" for side in (own, found))
        if ours != theirs:
            raise RunFolderError(
                f"Checkpoint {saved.path} is of another model: its {name} is {theirs}, that of this job's model is "
                f"{ours}. Put model.path back to what it was."
            )


class Saver:
    """Saves by the job's schedule, and always when the run ends or is asked to stop."""

    def __init__(self, folder: RunFolder, schedule: CheckpointSection, stateful: Stateful, watch: Recorder) -> None:
        self.folder, self.schedule, self.stateful, self.watch = folder, schedule, stateful, watch
        self.saved_step = 0
        self.saved_rounds = stateful.rounds.state()
        self.saved_seconds = stateful.clock.seconds
        self._whole: dict[str, Any] | None = None
        self.job = ""
        self.made_by: Provenance | None = None

    def maybe(self, step: int) -> None:
        """See `Checkpoints`."""
        start = time.perf_counter()
        self._best(step)
        every = self.schedule.every
        if (every > 0 and step % every == 0) or self._long_ago():
            self.save(step)
            self.watch.carry({"time/checkpoint": time.perf_counter() - start})
        self._whole = self._state()

    def rescue(self) -> None:
        """Save the last whole step before an error ends the run, where its weights are still there.

        They are while the step under way has made no update. All else that a step changes is in a state that was
        taken when the last one was over, so that a resumed run begins the step anew.
        """
        whole, progress = self._whole, self.stateful.progress
        now = self._state()
        if whole is None or whole["learner"]["update"] != now["learner"]["update"]:
            return
        if progress.step != whole["step"]:
            now, progress.step = whole, whole["step"]
        if progress.step != self.saved_step or self.saved_rounds != now["rounds"]:
            self._write(progress.step, now)

    def finish(self) -> None:
        """See `Checkpoints`."""
        step = self.stateful.progress.step
        if step != self.saved_step or self.saved_rounds != self.stateful.rounds.state():
            self.save(step)
        checkpoint.prune(self.folder.checkpoints, self.schedule.keep)  # a kill may have come before it

    def round_over(self) -> None:
        """See `Saving`: what a round made is not to be made again."""
        if self.schedule.every > 0 or self._long_ago():
            self.save(self.stateful.progress.step)

    def resumed(self, saved: Checkpoint) -> None:
        """What `saved` has is saved."""
        self.saved_step, self.saved_rounds = saved.step, saved.state.get("rounds", {})
        self.saved_seconds = self.stateful.clock.seconds

    def unsaved(self) -> str | None:
        """What no checkpoint has, the step under way included, in words; None where that is nothing."""
        now = self.stateful.clock.seconds
        return unsaved_steps(self.saved_step + 1, self.stateful.progress.step, now - self.saved_seconds)

    def _long_ago(self) -> bool:
        """Whether so much time has passed that another checkpoint is due."""
        minutes = self.schedule.minutes
        return 0 < minutes <= (self.stateful.clock.seconds - self.saved_seconds) / 60

    def save(self, step: int) -> None:
        """Save now."""
        self._write(step, self._state())

    def _state(self) -> dict[str, Any]:
        """What `state.json` would hold now: of the parts, of what made them, and of the files beside them."""
        made_by = {"made_by": self.made_by.state()} if self.made_by else {}
        return {**self.stateful.tensors()[1], **made_by, "lines": self.watch.lines()}

    def _write(self, step: int, state: dict[str, Any]) -> None:
        tensors, texts = self.stateful.tensors()[0], {JOB: self.job, **self.stateful.rounds.texts()}
        checkpoint.save(self.folder.checkpoints, step, tensors=tensors, state=state, texts=texts)
        checkpoint.prune(self.folder.checkpoints, self.schedule.keep)
        self.saved_step, self.saved_rounds = step, state["rounds"]
        self.saved_seconds = self.stateful.clock.seconds

    def _best(self, step: int) -> None:
        evaluation = self.stateful.evaluation
        if not self.schedule.best or evaluation.at_step != step or evaluation.last is None:
            return
        value = evaluation.last.get("reward")  # there is none where no output was scored
        if value is not None and (self.stateful.best is None or value > self.stateful.best):
            self.stateful.best = value
            checkpoint.save_best(self.folder.checkpoints, step, value, self.stateful.learner.master_weights())
