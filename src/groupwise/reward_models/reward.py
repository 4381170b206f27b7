"""Reward models as rewards: all outputs of a step in one call, or all their steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groupwise.reward_models.model import RewardModel
from groupwise.reward_models.score import BUDGET, scores_of, sigmoid
from groupwise.reward_models.text import Judged, Output, Steps
from groupwise.rewards.base import RewardContext, Values
from groupwise.rewards.checks import check_number, check_values, show_output
from groupwise.rewards.steps import Cuts
from groupwise.rewards.stepwise import StepValues
from groupwise.types import Group


class _Judge:
    """What both kinds share: names, metrics, and what to say about outputs that cannot be read.

    Per step `<place>/<name>/version` is the version of the weights that scored it, and `<place>/<name>/unread` counts
    outputs that are not scored because they are too long for the model or refused by its tokenizer. `rollouts.jsonl`
    has beside every output `<name>/version` and `<name>/right`, its probability of being right (of steps: the last
    one's).
    """

    place = "rewards"
    own_process = False

    def __init__(self, model: RewardModel, name: str = "", budget: int = BUDGET) -> None:
        """Score with `model` as it is at each call, so that one in training is always met at its latest version."""
        self.model, self.name, self._budget = model, name or name_of(model), budget
        self._told = self._remarked = False

    def _scores(
        self, groups: Sequence[Group], judged: Sequence[Judged], context: RewardContext
    ) -> list[list[float] | None]:
        found, unread = scores_of(self.model, judged, self._budget)
        own, version = f"{self.place}/{self.name}", self.model.version
        if self.model.remark and not self._remarked:
            self._remarked = True
            context.warn(f"reward model `{self.name}`: {self.model.remark}")
        context.metrics |= {f"{own}/version": float(version), f"{own}/unread": float(len(unread))}
        context.extras[f"{self.name}/version"] = [version] * len(judged)
        if not unread:
            return found
        first, why = min(unread.items())
        context.faults.append(why)
        if not self._told:
            self._told = True
            outputs = [(group, index) for group in groups for index in range(len(group.completions))]
            context.warn(
                f"reward model `{self.name}` cannot read an output, which is not scored: {why}\n"
                f"{show_output(*outputs[first])}\nFurther ones are only counted, in {own}/unread."
            )
        return found

    def takes(self, name: str) -> bool:
        """A model reads prompts and outputs, and no other column."""
        return False

    def close(self) -> None:
        """Nothing is held that its owner would not let go of."""


class ModelReward(_Judge):
    """An outcome reward model: the raw logit of each output."""

    def __call__(self, groups: Sequence[Group], context: RewardContext) -> Values:
        """One score per output. Raises RewardError where one is not finite."""
        judged = [
            Output(group.prompt.content, output.text, output.finish == "stop", group.prompt.template_options)
            for group in groups
            for output in group.completions
        ]
        scores = [None if values is None else values[0] for values in self._scores(groups, judged, context)]
        context.extras[f"{self.name}/right"] = [None if score is None else sigmoid(score) for score in scores]
        return check_values(self.name, groups, scores)


class ModelStepReward(_Judge):
    """A process reward model: the probability of each step of being right."""

    place = "step_rewards"

    def __call__(self, groups: Sequence[Group], cuts: Cuts, context: RewardContext) -> StepValues:
        """One score per step. Raises RewardError where one is not finite."""
        judged: list[Judged] = [
            Steps(group.prompt.content, cut.texts, group.prompt.template_options)
            for group, of_group in zip(groups, cuts, strict=True)
            for cut in of_group
        ]
        scores = self._scores(groups, judged, context)
        context.extras[f"{self.name}/right"] = [values[-1] if values else None for values in scores]
        found = iter(scores)
        return [
            [self._values(next(found), len(cut.texts), group, index) for index, cut in enumerate(of_group)]
            for group, of_group in zip(groups, cuts, strict=True)
        ]

    def _values(self, found: list[float] | None, steps: int, group: Group, index: int) -> list[float | None]:
        values: list[Any] = [None] * steps if found is None else found
        return [check_number(self.name, value, group, index, kind="reward model") for value in values]


def name_of(model: RewardModel) -> str:
    """The folder's name, or that of its run where it is `RUN/model`; slashes separate metrics, so there are none."""
    path = Path(model.source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name
