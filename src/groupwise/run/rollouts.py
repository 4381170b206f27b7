"""What lies between prompts and scored groups: requests to the engine, completions gathered, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose, nan
from statistics import fmean

from groupwise.averages import mean, std
from groupwise.data.stream import PromptStream
from groupwise.engines.mailbox import Mailbox, Sampler, generate
from groupwise.learn.base import Learner
from groupwise.rewards.scorer import Scorer
from groupwise.seeds import group_seed
from groupwise.state import State
from groupwise.types import Group, GroupKey, Prompt, Request, Sampling, Scored
from groupwise.watch.record import Record

RIGHT_STEP = 0.5
"""A step whose reward is at least this counts as right in the metrics: half of 0 and 1, and of a probability."""


@dataclass(frozen=True)
class GroupSampler:
    """How groups are drawn: `outputs` per prompt, with seeds that are a function of what they are for."""

    sampling: Sampling
    outputs: int
    run_seed: int
    purpose: str

    def sample(self, sampler: Sampler, prompts: Sequence[Prompt], step: int) -> list[Group]:
        """Sample a group per prompt. Slots tell equal prompts of one step apart."""
        keys = [GroupKey(step, slot, prompt.prompt_id) for slot, prompt in enumerate(prompts)]
        requests = [
            Request(
                f"{self.purpose}/{key.step}/{key.slot}", prompt.token_ids, self.outputs, self.sampling,
                group_seed(self.run_seed, self.purpose, key.step, key.slot),
            )
            for key, prompt in zip(keys, prompts, strict=True)
        ]  # fmt: skip
        completions = generate(sampler, requests)
        return [Group(*parts) for parts in zip(keys, prompts, completions, strict=True)]


class Rollouts:
    """Gives the loop scored groups, in the order of their prompts."""

    def __init__(
        self, prompts: PromptStream, mailbox: Mailbox, scorer: Scorer, draw: GroupSampler, prompts_per_step: int,
        dropped_long: int = 0,
    ) -> None:  # fmt: skip
        self.prompts, self.mailbox, self.scorer, self.draw = prompts, mailbox, scorer, draw
        self.prompts_per_step, self.dropped_long = prompts_per_step, dropped_long
        self.trained = prompts.position

    def collect(self, step: int, record: Record) -> Scored:
        """Sample and score a step's groups."""
        epoch = self.prompts.epoch
        with record.time("sample"):
            groups = self.draw.sample(self.mailbox, self.prompts.take(self.prompts_per_step), step)
        with record.time("reward"):
            scored = self.scorer(groups, record, training=True, epoch=epoch)
        record.metrics |= summary(scored) | step_summary(scored)
        record.metrics |= {"epoch": self.prompts.epoch, "data/dropped_long": float(self.dropped_long)}
        return scored

    def check(self) -> None:
        """Raise what was found in the step, and ends the run now that it is whole."""
        self.scorer.patience.check()

    def state(self) -> State:
        """See `Stateful`. The position in the data counts what was trained on, not what was taken."""
        return State(values=self.prompts.state_dict() | {"position": self.trained})

    def restore(self, state: State) -> None:
        """See `Stateful`. Raises DataError where that was of other prompts."""
        self.prompts.load_state_dict(dict(state.values))
        self.trained = self.prompts.position

    def load_weights(self, learner: Learner) -> None:
        """Sample from the learner's weights from now on: what was collected has been trained on."""
        self.trained = self.prompts.position
        self.mailbox.load_weights(learner.weights(), learner.version)


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
