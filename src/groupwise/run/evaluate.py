"""Held-out evaluation: mean reward, accuracy and pass@k with confidence intervals, always from the same draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Protocol

from groupwise.engines.base import Engine
from groupwise.run.record import Record, Watch
from groupwise.run.rollouts import Draw, Scorer
from groupwise.types import Prompt, Scored


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

    def baseline(self, watch: Watch, step: int) -> None:
        """Evaluate before the first step, as an event of its own."""

    def maybe(self, record: Record) -> None:
        """Evaluate where the schedule says so."""


class Evaluation:
    """Samples held-out prompts with settings of its own and scores them with the job's rewards.

    Seeds do not depend on the step, so two evaluations differ by the policy alone. `first` and `last` are what `judge`
    found, `at_step` is the step that `last` was found at.
    """

    def __init__(
        self, prompts: Sequence[Prompt], engine: Engine, scorer: Scorer, draw: Draw, schedule: Schedule,
        threshold: float,
    ) -> None:  # fmt: skip
        self.prompts, self.engine, self.scorer, self.draw = prompts, engine, scorer, draw
        self.schedule, self.threshold = schedule, threshold
        self.first: dict[str, float] | None = None
        self.last: dict[str, float] | None = None
        self.at_step: int | None = None

    def baseline(self, watch: Watch, step: int) -> None:
        """See `Evaluator`."""
        with watch.step(step) as record:
            self.run(record)

    def maybe(self, record: Record) -> None:
        """See `Evaluator`."""
        if self.schedule.due(record.step):
            self.run(record)

    def run(self, record: Record) -> None:
        """Add `eval/*` to the record."""
        # What rewards report here must not overwrite what they reported of the step.
        own = Record(record.step)
        with record.time("eval"):
            scored = self.scorer(self.draw.groups(self.engine, self.prompts, 0), own)
        found = judge(scored, self.threshold)
        record.metrics |= {f"eval/{name}": value for name, value in found.items()}
        self.last, self.at_step = found, record.step
        self.first = self.first or found


class NoEvaluation:
    """Stands where a job names no held-out data."""

    first: dict[str, float] | None = None
    last: dict[str, float] | None = None
    at_step: int | None = None

    def baseline(self, watch: Watch, step: int) -> None:
        """Nothing to evaluate."""

    def maybe(self, record: Record) -> None:
        """Nothing to evaluate."""


def judge(scored: Scored, threshold: float) -> dict[str, float]:
    """`reward`, `accuracy` (each with the half-width of its 95 % interval over prompts), `mean_length`, `unscored`,
    and `pass@k` for k = 1, 2, 4 ..

    An output without a score counts as wrong in accuracy and pass@k, and is left out of the mean reward. What cannot
    be said is absent: the reward where no output was scored, an interval from a single prompt.
    """
    right = [[r is not None and r >= threshold for r in group.rewards] for group in scored]
    rewards = [[r for r in group.rewards if r is not None] for group in scored]
    found = mean_with_interval("reward", [fmean(known) for known in rewards if known])
    found |= mean_with_interval("accuracy", [fmean(group) for group in right])
    found["mean_length"] = fmean([len(c.token_ids) for group in scored for c in group.group.completions])
    found["unscored"] = float(sum(r is None for group in scored for r in group.rewards))
    k, outputs = 1, min(map(len, right))
    while k <= outputs:
        found[f"pass@{k}"] = fmean([pass_at(k, len(group), sum(group)) for group in right])
        k *= 2
    return found


def mean_with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of one value per prompt, and half its 95 % confidence interval by the normal approximation."""
    found = {name: fmean(values)} if values else {}
    if len(values) > 1:
        found[f"{name}_ci95"] = 1.96 * stdev(values) / math.sqrt(len(values))
    return found


def pass_at(k: int, n: int, right: int) -> float:
    """Chance that at least one of `k` outputs is right, unbiased from `n` of which `right` are (arXiv:2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
