"""From rewards to advantages: what one output, or one token of it, did better than its siblings.

Plain numbers in, plain numbers out, in float64. A reward of None means "not scored": it is in no mean and no std, and
its advantage is 0.0. Source: arXiv:2402.03300, sections 4.1.2 (outcome) and 4.1.3 (process)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groupwise.averages import scale_of
from groupwise.errors import ObjectiveError, RewardError
from groupwise.objective.presets import Baseline, Objective, Scale, StepNormalization, StepReturn, check_choice

Array = NDArray[np.float64]
Steps = Sequence[tuple[int, float | None]]
"""One output's steps as `(end, reward)`: a step covers the tokens before `end` (exclusive) after the previous end."""
Advantage = float | list[float]
"""One output's advantage: the same for all its tokens, or one per token."""
_EQUAL_WITHIN = 1e-9
LARGEST = float(np.finfo(np.float32).max)
"""The largest advantage that training can compute with."""

_CENTRED: Mapping[str, Callable[[Array, Array], Array]] = {
    "group_mean": lambda group, batch: group - group.mean(),
    # r_i minus the mean of the others is (r_i - mean) * n / (n - 1).
    "leave_one_out": lambda group, batch: (group - group.mean()) * (group.size / (group.size - 1)),
    "batch_mean": lambda group, batch: group - batch.mean(),
}
_DIVISOR: Mapping[str, Callable[[Array, Array, float], float]] = {
    "group": lambda group, batch, eps: float(group.std(ddof=1)) + eps,
    "batch": lambda group, batch, eps: float(batch.std(ddof=1)) + eps,
    "none": lambda group, batch, eps: 1.0,
}


def normalise(group: Array, batch: Array, *, baseline: Baseline, scale: Scale, eps: float) -> Array:
    """Centre and scale the scored values of one group; the only place that does, for outcomes and steps alike.

    `batch` holds the scored values of all groups of the step. The std is the sample's (n - 1). Fewer than two values,
    or values that are all equal, give exactly 0.0: decided by comparing, for float noise over a small eps is large.
    """
    # Rewards of extreme size are divided by it, so that their sums and squares stay finite; others are as they are.
    counted = (group, batch) if "batch" in (scale, baseline.removesuffix("_mean")) else (group,)
    size = scale_of(*(float(np.abs(values).max(initial=0.0)) for values in counted))
    group, batch = group / size, batch / size
    compared = batch if baseline == "batch_mean" else group
    if _all_equal(compared):
        return np.zeros_like(group)
    advantages = _CENTRED[baseline](group, batch) / _DIVISOR[scale](group, batch, eps / size)
    with np.errstate(over="ignore"):  # infinite ones are an error of `token_advantages`
        return advantages * size if scale == "none" else advantages


def outcome_advantages(
    rewards: Iterable[float | None],
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "group",
    eps: float = 1e-4,
) -> list[float]:
    """One advantage per output of one group: `(r_i - mean(r)) / (std(r) + eps)` (arXiv:2402.03300, 4.1.2).

    `rewards` is a list or array, None where an output was not scored. `baseline` is `group_mean` or `leave_one_out`,
    `scale` is `group` or `none`. Raises RewardError for NaN or infinity.
    """
    _check_group_choices(baseline, scale, eps)
    values = _finite(rewards, "output")
    scored = _scored(values)
    return _put_back(normalise(scored, scored, baseline=baseline, scale=scale, eps=eps), values)


class Earned(Protocol):
    """What credit reads of a group: per output its reward, its steps and its number of tokens."""

    @property
    def rewards(self) -> Sequence[float | None]:
        """One per output; None where it was not scored."""

    @property
    def steps(self) -> Sequence[Steps]:
        """One list per output; an empty one where it was not cut into steps."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each output."""


def group_advantages(rewards: Iterable[Iterable[float | None]], objective: Objective) -> list[list[float]]:
    """One advantage per output of every group of a step, with the objective's baseline and scale (`batch` included)."""
    groups = [_finite(group, f"group {number}, output") for number, group in enumerate(rewards)]
    batch = _scored([value for group in groups for value in group])
    normal = _normal(objective)
    return [_put_back(normal(_scored(group), batch), group) for group in groups]


def token_advantages(groups: Sequence[Earned], objective: Objective) -> list[list[Advantage]]:
    """`outcome_weight * A_outcome + process_weight * A_process` per group and output, each normalised over its own set.

    One number per output where steps do not count (`process_weight` 0), else one per token. A weight of 0 leaves what
    the other gives alone. Raises RewardError for NaN or infinity and for advantages beyond float32, ObjectiveError for
    ends that do not rise.
    """
    advantages = _token_advantages(groups, objective)
    for number, group in enumerate(advantages):
        for of_output in group:
            largest = max(map(abs, of_output), default=0.0) if isinstance(of_output, list) else abs(of_output)
            if not largest <= LARGEST:
                raise RewardError(
                    f"The rewards of group {number} are so large that an advantage is {largest:.3g}, and training "
                    f"computes with numbers up to {LARGEST:.3g}: scale the rewards, or divide by their standard "
                    'deviation (objective.scale = "group").'
                )
    return advantages


def _token_advantages(groups: Sequence[Earned], objective: Objective) -> list[list[Advantage]]:
    by_output, by_step = objective.outcome_weight, objective.process_weight
    outcome = group_advantages([group.rewards for group in groups] if by_output else [], objective)
    if not by_step:
        return [[by_output * advantage for advantage in group] for group in outcome]
    steps, lengths = [group.steps for group in groups], [group.lengths for group in groups]
    for group in groups:
        _check_ends(group.steps, group.lengths)
    process = _over_tokens(_normalised_steps(steps, objective), lengths, objective.step_return)
    spread = [[[by_step * a for a in output] for output in group] for group in process]
    if not by_output:
        return [list(group) for group in spread]
    pairs = [zip(of_group, of_steps, strict=True) for of_group, of_steps in zip(outcome, spread, strict=True)]
    return [[[by_output * whole + a for a in tokens] for whole, tokens in group] for group in pairs]


def process_advantages(
    steps: Sequence[Steps],
    lengths: Sequence[int],
    *,
    scale: Scale = "group",
    eps: float = 1e-4,
    step_return: StepReturn = "sum",
    step_normalization: StepNormalization = "group",
) -> list[list[float]]:
    """One advantage per token: the sum of the normalised rewards of the steps that end at it or later (4.1.3).

    `steps` holds, per output of one group, `(end, reward)` pairs: a step covers the tokens before `end` (exclusive)
    after the previous end. `lengths` counts each output's tokens. All step rewards of the group are normalised as one
    set, or with `step_normalization="index"` those of the first steps, of the second steps and so on; None is out of
    the set and adds 0. `step_return="mean"` divides the sum by how many scored steps it is over. Raises RewardError
    for NaN or infinity, ObjectiveError for ends that do not rise within the output.
    """
    _check_group_choices("group_mean", scale, eps)
    _check_ends(steps, lengths)
    objective = Objective(
        scale=scale, scale_eps=eps, process_weight=1.0, step_return=step_return, step_normalization=step_normalization
    )
    return _over_tokens(_normalised_steps([steps], objective), [lengths], step_return)[0]


def _normal(objective: Objective) -> Callable[[Array, Array], Array]:
    return partial(normalise, baseline=objective.baseline, scale=objective.scale, eps=objective.scale_eps)


def _normalised_steps(groups: Sequence[Sequence[Steps]], objective: Objective) -> list[list[list[tuple[int, float]]]]:
    """Per group and output `(end, normalised reward)` of the steps that were scored."""
    normal, by_index = _normal(objective), objective.step_normalization == "index"
    rewards = {
        (g, i, j): reward
        for g, group in enumerate(groups)
        for i, output in enumerate(group)
        for j, reward in enumerate(_finite((reward for _, reward in output), f"group {g}, output {i}, step"))
        if reward is not None
    }
    batches: dict[int, dict[int, list[tuple[int, int, int]]]] = {}
    for place in rewards:  # the sets that are normalised: by number of the step where asked for, and by group
        batches.setdefault(place[2] if by_index else 0, {}).setdefault(place[0], []).append(place)
    found: dict[tuple[int, int, int], float] = {}
    for sets in batches.values():
        batch = np.array([rewards[place] for places in sets.values() for place in places])
        for places in sets.values():
            values = normal(np.array([rewards[place] for place in places]), batch)
            found |= dict(zip(places, values.tolist(), strict=True))
    return [
        [
            [(end, found[g, i, j]) for j, (end, _) in enumerate(output) if (g, i, j) in found]
            for i, output in enumerate(group)
        ]
        for g, group in enumerate(groups)
    ]


def _over_tokens(
    groups: Sequence[Sequence[Sequence[tuple[int, float]]]], lengths: Sequence[Sequence[int]], step_return: StepReturn
) -> list[list[list[float]]]:
    return [
        [_ahead(output, length, step_return) for output, length in zip(group, of_group, strict=True)]
        for group, of_group in zip(groups, lengths, strict=True)
    ]


def less_kl(rewards: Sequence[float | None], kl: Sequence[float], beta: float) -> list[float | None]:
    """`r_i - beta * kl_i` per output, for a KL penalty in the reward; an output that was not scored stays so."""
    pairs = zip(rewards, kl, strict=True)
    return [None if reward is None else reward - beta * penalty for reward, penalty in pairs]


def _ahead(steps: Iterable[tuple[int, float]], length: int, step_return: StepReturn) -> list[float]:
    """The sum or mean over the steps with `end > t`, for t = 0 .. length - 1; 0 where there is none."""
    earned_at = dict(steps)
    total, count, backwards = 0.0, 0, []
    for end in range(length, 0, -1):
        if end in earned_at:
            total, count = total + earned_at[end], count + 1
        backwards.append(total / count if step_return == "mean" and count else total)
    return backwards[::-1]


def _all_equal(values: Array) -> bool:
    """Of values that are not of extreme size."""
    return values.size == 0 or float(np.ptp(values)) <= _EQUAL_WITHIN * max(1.0, float(np.abs(values).max()))


def _finite(rewards: Iterable[float | None], what: str) -> list[float | None]:
    values = [None if reward is None else float(reward) for reward in rewards]
    for number, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise RewardError(f"The reward of {what} {number} is {value}; a reward is a finite number, or None.")
    return values


def _scored(values: Iterable[float | None]) -> Array:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _put_back(advantages: Array, values: Sequence[float | None]) -> list[float]:
    found = iter(advantages.tolist())
    return [0.0 if value is None else next(found) for value in values]


def _check_group_choices(baseline: str, scale: str, eps: float) -> None:
    if "batch" in (scale, baseline.removesuffix("_mean")):
        raise ObjectiveError("One group has no batch to compare with: use group_advantages(rewards, objective).")
    check_choice("baseline", baseline, ("group_mean", "leave_one_out"))
    check_choice("scale", scale, ("group", "none"))
    if not eps >= 0:
        raise ObjectiveError(f"eps must be at least 0, found {eps}.")


def _check_ends(steps: Sequence[Sequence[tuple[int, float | None]]], lengths: Sequence[int]) -> None:
    if len(steps) != len(lengths):
        raise ObjectiveError(f"steps speak of {len(steps)} outputs, lengths of {len(lengths)}.")
    for number, (output, length) in enumerate(zip(steps, lengths, strict=True)):
        ends = [0, *(end for end, _ in output)]
        if ends != sorted(set(ends)) or ends[-1] > length:
            raise ObjectiveError(
                f"Output {number} has {length} tokens and step ends {ends[1:]}: ends are exclusive, rise strictly, "
                "and lie between 1 and the number of tokens."
            )
