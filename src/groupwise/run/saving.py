"""Saving a run and taking it up again: everything with state, so that the next step is the same, bit for bit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from groupwise.config import CheckpointSection
from groupwise.data.stream import PromptStream
from groupwise.learn import checkpoint
from groupwise.learn.checkpoint import Checkpoint
from groupwise.learn.learner import Learner
from groupwise.learn.reference import NoReference, Reference
from groupwise.run.evaluate import Evaluator
from groupwise.run.folder import RunFolder
from groupwise.run.progress import Progress
from groupwise.run.record import Watch


class Clock:
    """Seconds of the whole run: this process's and those of the processes before it."""

    def __init__(self, before: float = 0.0, start: float | None = None) -> None:
        self.before, self.start = before, time.perf_counter() if start is None else start

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + time.perf_counter() - self.start


@dataclass
class Stateful:
    """The parts of a run that a checkpoint must hold. Draws and data order are functions of seed and position."""

    progress: Progress
    prompts: PromptStream
    learner: Learner
    reference: Reference | NoReference
    evaluation: Evaluator
    clock: Clock
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
            "evaluation": {"first": self.evaluation.first, "last": self.evaluation.last},
            "seconds": self.clock.seconds,
            "best": self.best,
        }
        return {**files, **({"reference": reference} if reference else {})}, state

    def restore(self, saved: Checkpoint) -> None:
        """Take up where `saved` left off."""
        state = saved.state
        stems = ["model", "optimizer"] + (["reference"] if self.reference.state_dict() else [])
        tensors = {stem: saved.tensors(stem) for stem in stems}
        self.learner.load_state_dict(tensors, state["learner"])
        self.reference.load_state_dict(tensors.get("reference", {}), state["reference_iteration"])
        self.prompts.load_state_dict(state["prompts"])
        self.progress.step = state["step"]
        self.evaluation.first, self.evaluation.last = state["evaluation"]["first"], state["evaluation"]["last"]
        self.clock.before, self.best = state["seconds"], state["best"]


class Saver:
    """Saves by the job's schedule, and always when the run ends or is asked to stop."""

    def __init__(
        self, folder: RunFolder, schedule: CheckpointSection, stateful: Stateful, watch: Watch
    ) -> None:
        self.folder, self.schedule, self.stateful, self.watch = folder, schedule, stateful, watch

    def maybe(self, step: int) -> None:
        """See `Checkpoints`."""
        start = time.perf_counter()
        evaluation = self.stateful.evaluation
        if evaluation.at_step == step and evaluation.last is not None and self.schedule.best:
            self._best(step, evaluation.last["reward"])
        every = self.schedule.every
        if self.stateful.progress.ending or (every > 0 and step % every == 0):
            tensors, state = self.stateful.tensors()
            checkpoint.save(self.folder.checkpoints, step, tensors=tensors, state=state)
            checkpoint.prune(self.folder.checkpoints, self.schedule.keep)
        self.watch.carry({"time/checkpoint": time.perf_counter() - start})

    def _best(self, step: int, value: float) -> None:
        if self.stateful.best is None or value > self.stateful.best:
            self.stateful.best = value
            checkpoint.save_best(self.folder.checkpoints, step, value, self.stateful.learner.masters())
