"""From rewards to advantages: what one output, or one token of it, did better than its siblings.

Plain numbers in, plain numbers out, in float64. A reward of None means "not scored": it is in no mean and no std, and
its advantage is 0.0. Source: arXiv:2402.03300, sections 4.1.2 (outcome) and 4.1.3 (process)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from groupwise.errors import ObjectiveError, RewardError
from groupwise.objective.presets import Baseline, Objective, Scale, check_choice

Array = NDArray[np.float64]
_EQUAL_WITHIN = 1e-9

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
    compared = batch if baseline == "batch_mean" else group
    if _all_equal(compared):
        return np.zeros_like(group)
    return _CENTRED[baseline](group, batch) / _DIVISOR[scale](group, batch, eps)


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


def group_advantages(rewards: Iterable[Iterable[float | None]], objective: Objective) -> list[list[float]]:
    """One advantage per output of every group of a step, with the objective's baseline and scale (`batch` included)."""
    groups = [_finite(group, f"group {number}, output") for number, group in enumerate(rewards)]
    batch = _scored([value for group in groups for value in group])
    normal = partial(normalise, baseline=objective.baseline, scale=objective.scale, eps=objective.scale_eps)
    return [_put_back(normal(_scored(group), batch), group) for group in groups]


def process_advantages(
    steps: Sequence[Sequence[tuple[int, float | None]]],
    lengths: Sequence[int],
    *,
    scale: Scale = "group",
    eps: float = 1e-4,
) -> list[list[float]]:
    """One advantage per token: the sum of the normalised rewards of the steps that end at it or later (4.1.3).

    `steps` holds, per output of one group, `(end, reward)` pairs: a step covers the tokens before `end` (exclusive)
    after the previous end. `lengths` counts each output's tokens. All step rewards of the group are normalised as one
    set; None is out of the set and adds 0. Raises ObjectiveError for ends that do not rise within the output.
    """
    _check_group_choices("group_mean", scale, eps)
    _check_ends(steps, lengths)
    values = _finite((reward for output in steps for _, reward in output), "step")
    scored = _scored(values)
    rewards = iter(_put_back(normalise(scored, scored, baseline="group_mean", scale=scale, eps=eps), values))
    paired = [[(end, next(rewards)) for end, _ in output] for output in steps]
    return [_sum_ahead(output, length) for output, length in zip(paired, lengths, strict=True)]


def less_kl(rewards: Sequence[float | None], kl: Sequence[float], beta: float) -> list[float | None]:
    """`r_i - beta * kl_i` per output, for a KL penalty in the reward; an output that was not scored stays so."""
    pairs = zip(rewards, kl, strict=True)
    return [None if reward is None else reward - beta * penalty for reward, penalty in pairs]


def _sum_ahead(steps: Iterable[tuple[int, float]], length: int) -> list[float]:
    """`sum over j with end_j > t of reward_j` for t = 0 .. length - 1."""
    earned_at, ahead, backwards = dict(steps), 0.0, []
    for end in range(length, 0, -1):
        ahead += earned_at.get(end, 0.0)
        backwards.append(ahead)
    return backwards[::-1]


def _all_equal(values: Array) -> bool:
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
