"""Credit of outputs and steps together, for whole steps of training: against a slow reading of the formulas."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import pytest

from groupwise.errors import ObjectiveError, RewardError
from groupwise.objective import PRESETS, Objective, group_advantages, process_advantages, token_advantages

PROCESS = Objective(outcome_weight=0.0, process_weight=1.0, scale_eps=0.0)
OUTPUTS = [[(2, 1.0), (5, 0.0)], [(3, 1.0), (4, 1.0)]]
"""The steps of section 8's example: outputs of 5 and 4 tokens."""


@dataclass
class Group:
    """What credit reads of a group."""

    rewards: Sequence[float | None]
    steps: Sequence[Sequence[tuple[int, float | None]]]
    lengths: Sequence[int]


def example(rewards: Sequence[float | None] = (1.0, 0.0)) -> Group:
    return Group(rewards, OUTPUTS, [5, 4])


def some_groups(seed: int, share_of_none: float = 0.2) -> list[Group]:
    """Groups of 1 to 5 outputs of 0 to 9 tokens with 0 to 4 steps, some outputs and steps not scored."""
    draw = random.Random(seed)

    def reward() -> float | None:
        return None if draw.random() < share_of_none else draw.choice([0.0, 0.5, 1.0])

    groups = []
    for _ in range(draw.randint(1, 4)):
        lengths = [draw.randint(0, 9) for _ in range(draw.randint(1, 5))]
        ends = [sorted(draw.sample(range(1, n + 1), draw.randint(0, min(4, n)))) for n in lengths]
        groups.append(Group([reward() for _ in lengths], [[(end, reward()) for end in own] for own in ends], lengths))
    return groups


def slow_normal(value: float, own: list[float], batch: list[float], objective: Objective) -> float:
    compared = batch if objective.baseline == "batch_mean" else own
    if max(compared) - min(compared) <= 1e-9:
        return 0.0
    if objective.baseline == "leave_one_out":
        centred = value - (sum(own) - value) / (len(own) - 1)
    else:
        centred = value - fmean(compared)
    divisor = {"group": lambda: stdev(own), "batch": lambda: stdev(batch), "none": lambda: 1.0}[objective.scale]()
    return centred / (divisor + (objective.scale_eps if objective.scale != "none" else 0.0))


def slow(groups: list[Group], objective: Objective) -> list[list[list[float]]]:
    """Token by token: what the steps at `t` or later give, and what the output's reward gives."""

    def of_set(steps: Sequence[Sequence[tuple[int, float | None]]], j: int) -> list[float]:
        by_index = objective.step_normalization == "index"
        return [r for own in steps for k, (_, r) in enumerate(own) if r is not None and (k == j or not by_index)]

    def token(group: Group, i: int, t: int) -> float:
        rewards = [r for r in group.rewards if r is not None]
        all_rewards = [r for other in groups for r in other.rewards if r is not None]
        own, found = group.rewards[i], []
        whole = 0.0 if own is None else slow_normal(own, rewards, all_rewards, objective)
        for j, (end, reward) in enumerate(group.steps[i]):
            if reward is not None and end - 1 >= t:
                batch = [r for other in groups for r in of_set(other.steps, j)]
                found.append(slow_normal(reward, of_set(group.steps, j), batch, objective))
        ahead = sum(found) / (len(found) if objective.step_return == "mean" and found else 1)
        return objective.outcome_weight * whole + objective.process_weight * ahead

    return [[[token(group, i, t) for t in range(n)] for i, n in enumerate(group.lengths)] for group in groups]


CHOICES = [
    {},
    {"step_return": "mean"},
    {"step_normalization": "index"},
    {"step_return": "mean", "step_normalization": "index", "scale": "batch"},
    {"baseline": "leave_one_out", "scale": "none"},
    {"baseline": "batch_mean", "scale": "none"},
    {"baseline": "batch_mean", "scale": "batch", "step_normalization": "index"},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.7, 0.3), (1.0, 2.0)])
def test_random_groups_against_the_formulas(choices: dict[str, str], weights: tuple[float, float]) -> None:
    objective = replace(PROCESS, outcome_weight=weights[0], process_weight=weights[1], **choices)  # type: ignore[arg-type]
    unlike = 0
    for seed in range(25):
        groups = some_groups(seed)
        found = token_advantages(groups, objective)
        for group, expected in zip(found, slow(groups, objective), strict=True):
            assert len(group) == len(expected)
            for output, tokens in zip(group, expected, strict=True):
                assert output == pytest.approx(tokens, abs=1e-10)
                unlike += len(set(tokens)) > 1
    assert unlike > 10, "tokens of one output differ"


def test_numbers_of_the_worked_example() -> None:
    [[first, second]] = token_advantages([example()], PROCESS)
    assert first == pytest.approx([-1, -1, -1.5, -1.5, -1.5])
    assert second == pytest.approx([1, 1, 1, 0.5])


def test_the_mean_over_the_following_steps_by_hand() -> None:
    """Normalised: 0.5, -1.5 and 0.5, 0.5."""
    [[first, second]] = token_advantages([example()], replace(PROCESS, step_return="mean"))
    assert first == pytest.approx([-0.5, -0.5, -1.5, -1.5, -1.5])
    assert second == pytest.approx([0.5, 0.5, 0.5, 0.5])


def test_normalised_by_number_of_the_step_by_hand() -> None:
    """First steps 1 and 1 teach nothing; second steps 0 and 1 are +- sqrt(1/2)."""
    half = math.sqrt(0.5)
    found = process_advantages(OUTPUTS, [5, 4], eps=0, step_normalization="index")
    assert found[0] == pytest.approx([-half] * 5)
    assert found[1] == pytest.approx([half] * 4)


def test_combined_by_hand() -> None:
    """Rewards 1 and 0 are +- sqrt(1/2)."""
    half = math.sqrt(0.5)
    [[first, second]] = token_advantages([example()], replace(PROCESS, outcome_weight=2.0, process_weight=0.5))
    assert first == pytest.approx([2 * half + a / 2 for a in (-1, -1, -1.5, -1.5, -1.5)])
    assert second == pytest.approx([-2 * half + a / 2 for a in (1, 1, 1, 0.5)])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_weight_of_0_leaves_exactly_the_other(preset: str) -> None:
    objective = replace(PRESETS[preset], max_completion_length=9)
    alone = replace(objective, outcome_weight=0.0, process_weight=1.0)
    for seed in range(20):
        groups = some_groups(seed)
        assert token_advantages(groups, objective) == group_advantages([g.rewards for g in groups], objective)
        if objective.baseline == "group_mean":
            steps = [process_advantages(g.steps, g.lengths, scale=objective.scale) for g in groups]
            assert token_advantages(groups, alone) == steps


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("choices", CHOICES[:4], ids=str)
def test_one_step_per_output_is_its_outcome_bit_for_bit(preset: str, choices: dict[str, str]) -> None:
    objective = replace(PRESETS[preset], max_completion_length=9, **choices)  # type: ignore[arg-type]
    draw = random.Random(0)
    for _ in range(20):
        groups = []
        for size in (1, 2, 5):
            rewards = [None if draw.random() < 0.2 else draw.gauss(0, 1) for _ in range(size)]
            lengths = [draw.randint(1, 6) for _ in rewards]
            groups.append(Group(rewards, [[(n, r)] for n, r in zip(lengths, rewards, strict=True)], lengths))
        outcome = token_advantages(groups, objective)
        process = token_advantages(groups, replace(objective, outcome_weight=0.0, process_weight=1.0))
        for group, by_outcome, by_step in zip(groups, outcome, process, strict=True):
            spread = [[a] * n for a, n in zip(by_outcome, group.lengths, strict=True)]  # type: ignore[list-item]
            assert by_step == spread


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_adding_to_all_step_rewards_or_scaling_them_changes_nothing(choices: dict[str, str]) -> None:
    objective = replace(PROCESS, **choices)  # type: ignore[arg-type]
    for seed in range(15):
        groups = some_groups(seed)
        factor = 4.0 if objective.scale != "none" else 1.0
        moved = [
            replace(g, steps=[[(end, None if r is None else factor * r + 3) for end, r in own] for own in g.steps])
            for g in groups
        ]
        for before, after in zip(*(token_advantages(one, objective) for one in (groups, moved)), strict=True):
            for a, b in zip(before, after, strict=True):
                assert a == pytest.approx(b, abs=1e-9)


def test_a_step_that_was_not_scored_is_in_no_mean_of_those_ahead() -> None:
    """It is no reward of 0: the mean is over the two that were scored."""
    group = Group([None], [[(1, 1.0), (2, None), (3, 0.0)]], [3])
    found = token_advantages([group], replace(PROCESS, scale="none", step_return="mean"))
    assert found == [[[0.0, -0.5, -0.5]]]


def test_both_weights_0_is_no_objective() -> None:
    with pytest.raises(ObjectiveError, match="both 0"):
        Objective(outcome_weight=0.0)


def test_errors_name_their_place() -> None:
    with pytest.raises(RewardError, match="group 1, output 0, step 1 is nan"):
        token_advantages([example(), Group([1.0], [[(1, 0.0), (2, math.nan)]], [2])], PROCESS)
    with pytest.raises(ObjectiveError, match=r"Output 0 has 2 tokens and step ends \[3\]"):
        token_advantages([Group([1.0], [[(3, 0.0)]], [2])], PROCESS)
