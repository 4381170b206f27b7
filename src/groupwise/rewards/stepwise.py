"""Process supervision: outputs are cut into steps, and each step is scored.

What scores steps is a `StepReward`: a user's function or a reward model; both end in `Score.steps`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from groupwise.errors import RewardError
from groupwise.rewards.adapters import MODEL, FunctionCalls, ModelOptions, load_stepwise, open_reward_model
from groupwise.rewards.base import RewardContext
from groupwise.rewards.checks import check_number, shorten, show_output
from groupwise.rewards.combine import check_weights, publish, run_all, unique_names, weighted_sum
from groupwise.rewards.steps import Cut, Cuts, Segmenter
from groupwise.types import Group, Score, ScoredGroup, Step

PATIENCE = 10
"""After so many batches in a row without a single boundary the segmenter is taken to be wrong."""

StepValues = list[list[list[float | None]]]
"""Per group, per output, per step: a reward, or None where the step was not scored."""


class StepReward(Protocol):
    """Scores the steps of outputs."""

    name: str

    def __call__(self, groups: Sequence[Group], cuts: Cuts, context: RewardContext) -> StepValues:
        """One value per step. Raises RewardError where values cannot be used."""

    def close(self) -> None:
        """Give back what the reward holds (a worker process)."""


class FunctionStepReward:
    """A user's function over steps."""

    def __init__(self, calls: FunctionCalls) -> None:
        """Raises RewardError where the function does not take steps."""
        self.name, self.own_process, self._calls = calls.name, calls.own_process, calls
        if not calls.takes("steps"):
            raise RewardError(
                f"{calls.kind} `{calls.name}` does not take `steps`: it is handed the texts of each output's steps "
                "under that name and returns a list of numbers per output, one for each step"
            )

    def __call__(self, groups: Sequence[Group], cuts: Cuts, context: RewardContext) -> StepValues:
        """See `StepReward`. An output that the function gave None for has None at every step."""
        texts = [cut.texts for of_group in cuts for cut in of_group]
        answers = iter(self._calls.values(groups, context, texts))
        return [
            [self._values(next(answers), cut, group, index) for index, cut in enumerate(of_group)]
            for group, of_group in zip(groups, cuts, strict=True)
        ]

    def _values(self, answer: Any, cut: Cut, group: Group, index: int) -> list[float | None]:
        if answer is None:
            return [None] * len(cut.ends)
        if not isinstance(answer, list):
            kind, shown = answer
            raise RewardError(
                f"{self._calls.kind} `{self.name}` returned {shown}, which is of type {kind} and not a list with one "
                f"number for each step, for\n{show_output(group, index)}"
            )
        if len(answer) != len(cut.ends):
            raise RewardError(
                f"{self._calls.kind} `{self.name}` returned {len(answer)} values for the {len(cut.ends)} steps of an "
                "output; it must give exactly one per step, in their order (None where it does not score)\n"
                f"{show_output(group, index)}"
            )
        values = []
        for number, value in enumerate(answer):
            step = f"step {number + 1} of {len(answer)}: {shorten(cut.texts[number])}"
            values.append(check_number(self.name, value, group, index, kind=self._calls.kind, step=step))
        return values

    def close(self) -> None:
        """End the worker process, if there is one."""
        self._calls.close()


def load_step_reward(
    spec: str | Callable[..., Any], *, models: ModelOptions = ModelOptions(), **limits: Any  # noqa: B008 - frozen
) -> StepReward:  # fmt: skip
    """What scores steps by the name `spec`: a reward model (`model:DIR`), or a function as `load_stepwise` takes it.

    `limits` are those of functions. Raises RewardError, or ModelError for a model, where it cannot be loaded.
    """
    if isinstance(spec, str) and spec.startswith(MODEL):
        from groupwise.rewards.model import ModelStepReward

        return ModelStepReward(open_reward_model(spec, "process", models))
    calls = load_stepwise(spec, place="step_rewards", kind="step reward function", **limits)
    try:
        return FunctionStepReward(calls)
    except RewardError:
        calls.close()  # its process has been started
        raise


class StepScorer:
    """Cuts outputs into steps and gives each the weighted sum of its rewards."""

    def __init__(self, segmenter: Segmenter, rewards: Sequence[StepReward], weights: Sequence[float] | None) -> None:
        self._segmenter, self._rewards = segmenter, rewards
        self._weights = check_weights(weights, len(rewards), "step reward")
        self._uncut = 0

    def __call__(self, scored: Sequence[ScoredGroup], context: RewardContext, *, training: bool) -> list[ScoredGroup]:
        """The groups with `Score.steps` filled in.

        Metrics: `step_rewards/<name>/mean` and `/std` over the steps that were scored. Raises RewardError on unusable
        values, and where no output of a training batch had any boundary, for so many batches in a row.
        """
        groups = [group.group for group in scored]
        cuts = self._segmenter(groups, context)
        if training:
            self._count_uncut(groups, cuts, context)
        values = []
        names = unique_names([reward.name for reward in self._rewards])
        called = run_all(self._rewards, context, lambda reward, report: reward(groups, cuts, report))
        for name, reward, (found, report) in zip(names, self._rewards, called, strict=True):
            flat = [value for of_group in found for of_output in of_group for value in of_output]
            publish(name, reward.name, flat, report, context, "step_rewards")
            values.append(found)
        return [
            replace(group, scores=tuple(self._scores(group.scores, cuts[g], [found[g] for found in values])))
            for g, group in enumerate(scored)
        ]

    def _scores(
        self, scores: Sequence[Score], cuts: Sequence[Cut], values: Sequence[Sequence[Sequence[float | None]]]
    ) -> Iterator[Score]:
        """The scores of a group with steps; `values` per reward, output and step."""
        for i, (score, cut) in enumerate(zip(scores, cuts, strict=True)):
            by_step = zip(*(found[i] for found in values), strict=True)
            rewards = [None if cut.failed else weighted_sum(parts, self._weights) for parts in by_step]
            yield replace(score, steps=tuple(map(Step, cut.ends, rewards, cut.texts)))

    def _count_uncut(self, groups: Sequence[Group], cuts: Cuts, context: RewardContext) -> None:
        """Warn where nothing was found in a whole batch, and end what goes on so."""
        uncut = [cut for of_group in cuts for cut in of_group if not cut.failed]
        if not uncut or any(cut.found for cut in uncut):
            self._uncut = 0
            return
        self._uncut += 1
        longest = max(
            ((group, i) for group in groups for i in range(len(group.completions))),
            key=lambda one: len(one[0].completions[one[1]].text),
        )
        found = f"the segmenter found no boundary in any output, so each is one step\n{show_output(*longest)}"
        if self._uncut >= PATIENCE:
            raise RewardError(
                f"For {self._uncut} batches in a row {found}\nSet `process.segmenter` to what this model's steps end "
                "with, or score outputs (reward.functions)."
            )
        if self._uncut == 1:
            context.warn(f"{found}\nAfter {PATIENCE} batches in a row this is an error. See [process].")
