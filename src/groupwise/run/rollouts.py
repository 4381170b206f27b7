"""What lies between prompts and scored groups: requests to the engine, completions gathered, rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isclose, nan
from statistics import fmean
from typing import Protocol

from groupwise.averages import mean, std
from groupwise.data.stream import PromptStream
from groupwise.engines.base import Engine, generate
from groupwise.learn.learner import Learner
from groupwise.rewards.base import Reward, RewardContext
from groupwise.rewards.combine import score_groups
from groupwise.rewards.patience import Patience
from groupwise.seeds import group_seed
from groupwise.tokenizer.codec import Codec
from groupwise.types import Group, GroupKey, Prompt, Request, Sampling, Scored
from groupwise.watch.record import Record

RIGHT_STEP = 0.5
"""A step whose reward is at least this counts as right in the metrics: half of 0 and 1, and of a probability."""


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

    def follow(self, prompts: PromptStream, prompts_per_step: int) -> None:
        """Tell rewards how far training is in these prompts."""
        self._epoch = lambda: prompts.epoch
        self._epochs = math.ceil(self.total_steps * prompts_per_step / len(prompts))

    def __call__(
        self, groups: Sequence[Group], record: Record, *, training: bool = False, epoch: float | None = None
    ) -> Scored:
        """One score per output; what the rewards report goes into the record.

        `training`: the groups are trained on, in the step of the record, which began at `epoch`. Raises RewardError.
        """
        self._look(groups)
        done = record.step - 1 if training else record.step
        epoch = self._epoch() if epoch is None else epoch
        context = RewardContext(max(0, done), self.total_steps, warn=self.warn, epoch=epoch, epochs=self._epochs)
        by_output = score_groups(groups, self.rewards, self.weights, context)
        scored = self.steps(by_output, context, training=training)
        record.metrics |= context.metrics
        record.extras |= context.extras
        record.outcomes += context.outcomes
        if training:
            self.patience.count(context.outcomes)
        return scored


@dataclass(frozen=True)
class Draw:
    """How groups are drawn: `outputs` per prompt, with seeds that are a function of what they are for."""

    sampling: Sampling
    outputs: int
    run_seed: int
    purpose: str

    def groups(self, engine: Engine, prompts: Sequence[Prompt], step: int) -> list[Group]:
        """Sample a group per prompt. Slots tell equal prompts of one step apart."""
        keys = [GroupKey(step, slot, prompt.prompt_id) for slot, prompt in enumerate(prompts)]
        requests = [
            Request(
                f"{self.purpose}/{key.step}/{key.slot}", prompt.token_ids, self.outputs, self.sampling,
                group_seed(self.run_seed, self.purpose, key.step, key.slot),
            )
            for key, prompt in zip(keys, prompts, strict=True)
        ]  # fmt: skip
        completions = generate(engine, requests)
        return [Group(*parts) for parts in zip(keys, prompts, completions, strict=True)]


class Rollouts:
    """Gives the loop scored groups, in the order of their prompts."""

    def __init__(
        self, prompts: PromptStream, engine: Engine, scorer: Scorer, draw: Draw, prompts_per_step: int,
        dropped_long: int = 0,
    ) -> None:  # fmt: skip
        self.prompts, self.engine, self.scorer, self.draw = prompts, engine, scorer, draw
        self.prompts_per_step, self.dropped_long = prompts_per_step, dropped_long

    def collect(self, step: int, record: Record) -> Scored:
        """Sample and score a step's groups."""
        epoch = self.prompts.epoch
        with record.time("sample"):
            groups = self.draw.groups(self.engine, self.prompts.take(self.prompts_per_step), step)
        with record.time("reward"):
            scored = self.scorer(groups, record, training=True, epoch=epoch)
        record.metrics |= summary(scored) | step_summary(scored)
        record.metrics |= {"epoch": self.prompts.epoch, "data/dropped_long": float(self.dropped_long)}
        return scored

    def check(self) -> None:
        """Raise what was found in the step, and ends the run now that it is whole."""
        self.scorer.patience.check()

    def load_weights(self, learner: Learner) -> None:
        """Sample from the learner's weights from now on."""
        self.engine.load_weights(learner.weights(), learner.version)


def summary(scored: Scored) -> dict[str, float]:
    """The metrics of a step's groups that need no model: rewards, lengths, tokens."""
    lengths = [len(c.token_ids) for group in scored for c in group.group.completions]
    cut = [c.finish == "length" for group in scored for c in group.group.completions]
    known = [[r for r in group.rewards if r is not None] for group in scored]
    rewards = [r for group in known for r in group]
    return {
        "reward": mean(rewards) if rewards else nan,
        "reward_std": mean([std(group) for group in known]),
        "frac_reward_zero_std": fmean(map(_all_equal, known)),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(cut),
        "tokens/sampled": float(sum(lengths)),
    }


def step_summary(scored: Scored) -> dict[str, float]:
    """The same for steps; nothing where they are not scored."""
    outputs = [score.steps for group in scored for score in group.scores if score.steps]
    if not outputs:
        return {}
    known = [[step.reward for step in steps if step.reward is not None] for steps in outputs]
    rewards = [reward for of_output in known for reward in of_output]
    firsts = [steps[0].reward for steps in outputs if steps[0].reward is not None]
    return {
        "step_reward": mean(rewards) if rewards else nan,
        "steps/per_output": fmean(map(len, outputs)),
        "steps/first_right": fmean(reward >= RIGHT_STEP for reward in firsts) if firsts else nan,
        "steps/unscored": float(sum(not of_output for of_output in known)),
    }


def _all_equal(rewards: Sequence[float]) -> bool:
    """By the rule that makes their advantages exactly 0."""
    return not rewards or isclose(min(rewards), max(rewards), rel_tol=1e-9, abs_tol=1e-9)
