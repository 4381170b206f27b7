"""Held-out evaluation: mean reward, accuracy and pass@k with confidence intervals, always from the same draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from groupwise.averages import mean, std
from groupwise.engines.mailbox import Sampler
from groupwise.errors import RewardError
from groupwise.rewards.scorer import Scorer
from groupwise.run.rollouts import RIGHT_STEP, GroupSampler
from groupwise.state import State
from groupwise.types import Prompt, Scored
from groupwise.watch.record import Record, Recorder

ABOVE = "above_threshold"
"""The share of outputs whose reward reaches the threshold, where that is not what makes one right."""


@dataclass(frozen=True)
class Schedule:
    """When to evaluate: every so many steps (0: never between), and after the last."""

    every: int
    total_steps: int

    def due(self, step: int) -> bool:
        """Whether this step ends with an evaluation."""
        return step == self.total_steps or (self.every > 0 and step % self.every == 0)


class Evaluator(Protocol):
    """What the loop asks of an evaluation."""

    first: dict[str, float] | None
    last: dict[str, float] | None
    at_step: int | None

    def baseline(self, watch: Recorder, step: int) -> None:
        """Evaluate before the first step, as an event of its own."""

    def maybe(self, record: Record) -> None:
        """Evaluate where the schedule says so."""

    def state(self) -> State:
        """See `Stateful`."""

    def restore(self, state: State) -> None:
        """See `Stateful`."""


class _Found:
    """What evaluations found so far: it goes on in a resumed run."""

    first: dict[str, float] | None = None
    last: dict[str, float] | None = None
    at_step: int | None = None

    def state(self) -> State:
        """See `Stateful`."""
        return State(values={"first": self.first, "last": self.last, "at_step": self.at_step})

    def restore(self, state: State) -> None:
        """See `Stateful`."""
        self.first, self.last, self.at_step = (state.values[name] for name in ("first", "last", "at_step"))


class Evaluation(_Found):
    """Samples held-out prompts with settings of its own and scores them with the job's rewards.

    Seeds do not depend on the step, so two evaluations differ by the policy alone. `first` and `last` are what `judge`
    found, `at_step` is the step that `last` was found at. `verified`: what scores says what is right, whatever its
    values are.
    """

    def __init__(
        self, prompts: Sequence[Prompt], sampler: Sampler, scorer: Scorer, draw: GroupSampler, schedule: Schedule,
        threshold: float, *, verified: bool = False,
    ) -> None:  # fmt: skip
        self.prompts, self.sampler, self.scorer, self.draw = prompts, sampler, scorer, draw
        self.schedule, self.threshold, self.verified = schedule, threshold, verified

    def baseline(self, watch: Recorder, step: int) -> None:
        """See `Evaluator`. Raises RewardError where a reward failed on every output."""
        watch.terminal.say(f"answering {len(self.prompts)} held-out prompts before the first step")
        with watch.step(step) as record:
            self.run(record)

    def maybe(self, record: Record) -> None:
        """See `Evaluator`. Where a reward failed on every output, the last evaluation ends the run with an error."""
        if not self.schedule.due(record.step):
            return
        error = self._evaluate(record)
        if error is not None and record.step == self.schedule.total_steps:
            self.scorer.patience.end(error)
        elif error is not None:
            self.scorer.warn(str(error))

    def run(self, record: Record) -> None:
        """Add `eval/*` to the record. Raises RewardError where a reward failed on every output."""
        error = self._evaluate(record)
        if error is not None:
            raise error

    def _evaluate(self, record: Record) -> RewardError | None:
        # What rewards report here must not overwrite what they reported of the step.
        own = Record(record.step)
        with record.time("eval"):
            scored = self.scorer(self.draw.sample(self.sampler, self.prompts, 0), own)
        # What was called graded once stays so: an accuracy that comes and goes with the values is none.
        graded = any(ABOVE in found for found in (self.first, self.last) if found)
        found = judge(scored, self.threshold, verified=self.verified, graded=graded)
        record.metrics |= {f"eval/{name}": value for name, value in found.items()}
        self.last, self.at_step = found, record.step
        self.first = self.first or found
        failed = next((one for one in own.outcomes if one.fault and not one.scored), None)
        if failed is None:
            return None
        return RewardError(
            f"{failed.who} failed on every held-out output, so that nothing tells how good the policy is. The first "
            f"failure was\n{failed.fault}"
        )


class NoEvaluation(_Found):
    """Stands where a job names no held-out data."""

    def baseline(self, watch: Recorder, step: int) -> None:
        """Nothing to evaluate."""

    def maybe(self, record: Record) -> None:
        """Nothing to evaluate."""


def judge(scored: Scored, threshold: float, *, verified: bool = False, graded: bool = False) -> dict[str, float]:
    """`reward` and `accuracy` (each with the half-width of its 95 % interval over prompts), `mean_length`, `unscored`,
    and `pass@k` for k = 1, 2, 4 ..

    Right is what a verifier (`verified`) gives at least `threshold`, or what the only reward gives where all its values
    are 0 or 1 (and it is not known to be `graded`). Other rewards have no accuracy and no pass@k: the share of outputs
    whose reward reaches the threshold is `above_threshold`, and of several rewards `rewards/<name>` is the mean of
    each. An output without a score counts as wrong, and is left out of the mean reward. What cannot be said is absent:
    the reward and the accuracy where no output was scored, an interval from a single prompt. Where steps are scored,
    `step_accuracy`, `first_step_accuracy` and `right_by_luck` are shares of right steps, of right first steps, and of
    right outputs that have a wrong step.
    """
    reached = [[r is not None and r >= threshold for r in group.rewards] for group in scored]
    rewards = [[r for r in group.rewards if r is not None] for group in scored]
    names = list(dict.fromkeys(name for group in scored for score in group.scores for name in score.parts))
    tells = verified or (len(names) < 2 and not graded and all(r in (0, 1) for group in rewards for r in group))
    found = mean_with_interval("reward", [mean(known) for known in rewards if known])
    if any(rewards):
        found |= mean_with_interval("accuracy" if tells else ABOVE, [fmean(group) for group in reached])
    found |= _means(scored, names if len(names) > 1 else [])
    found["mean_length"] = fmean([len(c.token_ids) for group in scored for c in group.group.completions])
    found["unscored"] = float(sum(r is None for group in scored for r in group.rewards))
    found |= _judge_steps(scored, reached if tells else [])
    k, outputs = 1, min(map(len, reached)) if tells and any(rewards) else 0
    while k <= outputs:
        found[f"pass@{k}"] = fmean([pass_at(k, len(group), sum(group)) for group in reached])
        k *= 2
    return found


def _means(scored: Scored, names: Sequence[str]) -> dict[str, float]:
    """The mean of each reward, before its weight, over the outputs that it scored."""
    columns = {name: [score.parts.get(name) for group in scored for score in group.scores] for name in names}
    known = {name: [value for value in column if value is not None] for name, column in columns.items()}
    return {f"rewards/{name}": mean(values) for name, values in known.items() if values}


def _judge_steps(scored: Scored, right: Sequence[Sequence[bool]]) -> dict[str, float]:
    """A step without a score counts as wrong, as an output does. `right`: which outputs are; empty where none tells."""
    cut = [[[(s.reward or 0.0) >= RIGHT_STEP for s in score.steps] for score in group.scores] for group in scored]
    steps = [[step for output in group for step in output] for group in cut]
    if not any(steps):
        return {}
    found = mean_with_interval("step_accuracy", [fmean(group) for group in steps if group])
    found["first_step_accuracy"] = fmean([output[0] for group in cut for output in group if output])
    pairs = [zip(*group, strict=True) for group in zip(right, cut, strict=True)] if right else []
    whole = [all(output) for group in pairs for is_right, output in group if is_right]
    return found | ({"right_by_luck": 1.0 - fmean(whole)} if whole else {})


def mean_with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of one value per prompt, and half its 95 % confidence interval by the normal approximation."""
    found = {name: mean(values)} if values else {}
    if len(values) > 1:
        found[f"{name}_ci95"] = 1.96 * std(values) / math.sqrt(len(values))
    return found


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that at least one of `k` outputs is right, unbiased from `n` of which `right` are (arXiv:2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
