"""Process supervision: outputs are cut into steps, and each step is scored.

What scores steps is a `StepReward`: a user's function or a reward model; both end in `Score.steps`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from groupwise.errors import RewardError
from groupwise.rewards.base import Outcome, RewardContext
from groupwise.rewards.checks import check_number, shorten, show_output
from groupwise.rewards.combine import check_weights, publish, run_all, unique_names, weighted_sum
from groupwise.rewards.functions.calls import FunctionCalls
from groupwise.rewards.functions.load import load_stepwise
from groupwise.rewards.patience import Patience
from groupwise.rewards.steps import Cut, Cuts, Segmenter
from groupwise.types import Group, Score, ScoredGroup, Step

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

    def takes(self, name: str) -> bool:
        """Whether a call hands this to the function."""
        return self._calls.takes(name)

    def close(self) -> None:
        """End the worker process, if there is one."""
        self._calls.close()


def load_step_reward(spec: str | Callable[..., Any], **limits: Any) -> StepReward:
    """What scores steps by the name `spec`, a function as `load_stepwise` takes it, with its `limits`.

    Raises RewardError where it cannot be loaded.
    """
    calls = load_stepwise(spec, place="step_rewards", kind="step reward function", **limits)
    try:
        return FunctionStepReward(calls)
    except RewardError:
        calls.close()  # its process has been started
        raise


class StepScorer:
    """Cuts outputs into steps and gives each the weighted sum of its rewards."""

    def __init__(
        self, segmenter: Segmenter, rewards: Sequence[StepReward], weights: Sequence[float] | None,
        patience: Patience | None = None,
    ) -> None:  # fmt: skip
        self._segmenter, self._rewards, self._patience = segmenter, rewards, patience or Patience()
        self._weights = check_weights(weights, len(rewards), "step reward")

    def __call__(self, scored: Sequence[ScoredGroup], context: RewardContext, *, training: bool) -> list[ScoredGroup]:
        """The groups with `Score.steps` filled in.

        Metrics: `step_rewards/<name>/mean` and `/std` over the steps that were scored. Raises RewardError on unusable
        values.
        """
        groups = [group.group for group in scored]
        finding = replace(context, faults=[])
        cuts = self._segmenter(groups, finding)
        if training:
            self._look_for_boundaries(groups, cuts, finding)
        values = []
        names = unique_names([reward.name for reward in self._rewards])
        called = run_all(self._rewards, context, lambda reward, report: reward(groups, cuts, report))
        for name, reward, (found, report) in zip(names, self._rewards, called, strict=True):
            flat = [value for of_group in found for of_output in of_group for value in of_output]
            publish(name, reward.name, flat, report, context, "step_rewards")
            values.append(found)
            if flat:
                some, fault = any(value is not None for value in flat), next(iter(report.faults), "")
                context.outcomes.append(Outcome(f"step_rewards/{name}", f"Step reward `{name}`", some, fault))
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

    def _look_for_boundaries(self, groups: Sequence[Group], cuts: Cuts, context: RewardContext) -> None:
        """Tell of a step in which the segmenter failed everywhere, or found nothing at all, which goes on so only where
        there were boundaries before: outputs of one step are then what the policy has learned."""
        every = [cut for of_group in cuts for cut in of_group]
        if not every:
            return
        uncut = [cut for cut in every if not cut.failed]
        name, fault = self._segmenter.name, next(iter(context.faults), "")
        context.outcomes.append(Outcome(f"segmenter/{name}", f"Segmenter `{name}`", bool(uncut), fault))
        if not uncut:
            return
        longest = max(
            ((group, i) for group in groups for i in range(len(group.completions))),
            key=lambda one: len(one[0].completions[one[1]].text),
        )
        found = any(cut.found for cut in uncut)
        said = f"the segmenter found no boundary in any output, so each is one step\n{show_output(*longest)}"
        self._patience.boundaries(found, said, context.warn)
