"""A job's rewards as one: outputs of a step in, scored groups out, and a report of what its rewards say beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from groupwise.rewards.base import Outcome, Reward, RewardContext
from groupwise.rewards.combine import score_groups
from groupwise.rewards.patience import Patience
from groupwise.tokenizer.codec import Codec
from groupwise.types import Group, Scored


class Report(Protocol):
    """Where a step's rewards put what they say beside values: the step's record."""

    step: int
    metrics: dict[str, Any]
    extras: dict[str, list[Any]]
    outcomes: list[Outcome]


class Prompts(Protocol):
    """What is trained on, and how often it was gone through so far."""

    @property
    def epoch(self) -> float:
        """Passes over them."""

    def __len__(self) -> int:
        """How many there are."""


class StepScores(Protocol):
    """Adds `Score.steps` to scored groups."""

    def __call__(self, scored: Scored, context: RewardContext, *, training: bool) -> Scored:
        """The groups with their steps."""


class NoSteps:
    """Stands where steps are not scored."""

    def __call__(self, scored: Scored, context: RewardContext, *, training: bool) -> Scored:
        """The groups as they are."""
        return scored


class SpecialTokens:
    """Says once where outputs hold special tokens that are neither end nor pad, and whether rewards see them."""

    def __init__(self, codec: Codec, warn: Callable[[str], None]) -> None:
        self._codec, self._warn = codec, warn
        self._told = False

    def __call__(self, groups: Sequence[Group]) -> None:
        """Look at the outputs of a step."""
        if self._told:
            return
        special = self._codec.special_token_ids
        outputs = [special.intersection(output.token_ids) for group in groups for output in group.completions]
        if not any(outputs):
            return
        self._told = True
        found = [self._codec.decode([token], skip_special_tokens=False) for token in sorted(set().union(*outputs))]
        names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        seen = (
            "rewards and rollouts.jsonl do not see them (sampling.skip_special_tokens is true)"
            if self._codec.skip_special_tokens
            else "they are part of the text that rewards and rollouts.jsonl see (sampling.skip_special_tokens leaves"
            " them out)"
        )
        self._warn(f"{sum(map(bool, outputs))} of {len(outputs)} outputs hold special tokens ({names}): {seen}")


class Scorer:
    """The job's rewards and their weights, called on the groups of a step, and what scores steps.

    `patience` ends a run whose rewards give nothing, step after step; without one nothing does. `look` is shown the
    outputs first.
    """

    def __init__(
        self, rewards: Sequence[Reward], weights: Sequence[float] | None, total_steps: int,
        warn: Callable[[str], None], steps: StepScores | None = None, *,
        patience: Patience | None = None, look: Callable[[Sequence[Group]], None] = lambda groups: None,
    ) -> None:  # fmt: skip
        self.rewards, self.weights, self.total_steps, self.warn = rewards, weights, total_steps, warn
        self.steps, self._look = steps or NoSteps(), look
        self.patience = patience or Patience()
        self._epoch: Callable[[], float] = float
        self._epochs: int | None = None

    def follow(self, prompts: Prompts, prompts_per_step: int) -> None:
        """Tell rewards how far training is in these prompts."""
        self._epoch = lambda: prompts.epoch
        self._epochs = math.ceil(self.total_steps * prompts_per_step / len(prompts))

    def __call__(
        self, groups: Sequence[Group], report: Report, *, training: bool = False, epoch: float | None = None
    ) -> Scored:
        """One score per output; what the rewards report goes into the report.

        `training`: the groups are trained on, in the step of the report, which began at `epoch`. Raises RewardError.
        """
        self._look(groups)
        done = report.step - 1 if training else report.step
        epoch = self._epoch() if epoch is None else epoch
        context = RewardContext(max(0, done), self.total_steps, warn=self.warn, epoch=epoch, epochs=self._epochs)
        by_output = score_groups(groups, self.rewards, self.weights, context)
        scored = self.steps(by_output, context, training=training)
        report.metrics |= context.metrics
        report.extras |= context.extras
        report.outcomes += context.outcomes
        if training:
            self.patience.count(context.outcomes)
        return scored
