"""Iterative GRPO (arXiv:2402.03300, Algorithm 1). Every variant is other objects behind the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from groupwise.learn.base import Learner
from groupwise.objective import Objective, token_advantages
from groupwise.progress import Progress
from groupwise.reward_models.rounds import Rounds
from groupwise.run.evaluate import Evaluator
from groupwise.run.rollouts import Rollouts
from groupwise.watch.record import Recorder, warn_of_refused


class Checkpoints(Protocol):
    """Saves everything with state where the schedule says so."""

    def maybe(self, step: int) -> None:
        """Save after this step, where it is due."""

    def round_over(self) -> None:
        """Save what a round of the reward model made."""

    def finish(self) -> None:
        """Save the last step, where that has not been done."""


@dataclass(frozen=True)
class Parts:
    """What the loop works with; `parts.py` decides which classes these are."""

    progress: Progress
    rollouts: Rollouts
    objective: Objective
    learner: Learner
    rounds: Rounds
    evaluation: Evaluator
    checkpoints: Checkpoints
    watch: Recorder
    num_iterations: int


def train(parts: Parts) -> None:
    """Run the iterations and steps that are left, or until the run is asked to stop."""
    p = parts
    p.rounds.update(p.checkpoints)  # a first reward model, or the round that an interruption cut short
    for iteration in p.progress.iterations():
        p.learner.refresh(iteration)  # reference <- policy
        for step in p.progress.steps():
            with p.watch.step(step) as record:
                scored = p.rollouts.collect(step, record)  # sample G outputs per question, score them
                with record.time("prepare"):
                    scored = p.learner.subtract_kl(scored, record.metrics)  # in the rewards, where asked for
                    credit = token_advantages(scored, p.objective)  # A_it, within the group
                    batch = p.learner.prepare(scored, credit)  # pack; old and reference log-probs
                with record.time("update"):
                    for done in range(p.num_iterations):  # mu passes over the batch
                        record.metrics |= p.learner.update(batch, done)
                warn_of_refused(record.metrics, p.watch)
                p.rounds.add(scored, record)  # the new training set of the reward model
                p.rollouts.load_weights(p.learner)
                p.evaluation.maybe(record)
                record.metrics |= {"iteration": iteration, "policy_version": p.learner.version}
                p.watch.groups(record, scored, credit)
            p.checkpoints.maybe(step)
            p.rollouts.check()  # whether anything was found that ends the run: a judge that fails,
            p.learner.check()  # updates that are all refused
        p.rounds.update(p.checkpoints)  # the reward model: labelled samples of this iteration, and replay
    p.checkpoints.finish()
