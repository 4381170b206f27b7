"""Outcome advantages: numbers from the formula, exact zeros, what is not scored, invariances."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.errors import ConfigError, ObjectiveError, RewardError
from groupwise.objective import PRESETS, Objective, group_advantages, less_kl, outcome_advantages, token_advantages

rewards_of_a_group = st.lists(st.integers(-20, 20), min_size=2, max_size=9).filter(lambda found: len(set(found)) > 1)


def test_numbers_of_the_worked_example() -> None:
    rewards = [1, 0, 0, 0]
    assert outcome_advantages(rewards, eps=0) == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert outcome_advantages(rewards, scale="none") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    left_out = outcome_advantages(rewards, baseline="leave_one_out", scale="none")
    assert left_out == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_eps_is_added_to_the_sample_std() -> None:
    assert outcome_advantages([1, 0, 0, 0]) == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3)
    assert outcome_advantages([2, 0], eps=1.0) == pytest.approx([1 / (math.sqrt(2) + 1), -1 / (math.sqrt(2) + 1)])


@pytest.mark.parametrize("rewards", [[0.3] * 7, np.full(7, 0.3, dtype=np.float32), torch.full((7,), 0.3)])
@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-4])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_equal_rewards_are_exactly_zero(rewards: object, eps: float, baseline: str) -> None:
    assert outcome_advantages(rewards, baseline=baseline, eps=eps) == [0.0] * 7


def test_equality_is_relative_for_large_rewards_and_absolute_for_small_ones() -> None:
    assert outcome_advantages([1e6, 1e6 + 1e-4], eps=0) == [0.0, 0.0]
    assert outcome_advantages([1e6, 1e6 + 1e-2], eps=0) == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    assert outcome_advantages([0.0, 1e-9], eps=0) == [0.0, 0.0]
    assert outcome_advantages([0.0, 2e-9], eps=0)[1] > 0.7


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("rewards", [[5.0], [None, 5.0, None], [None, None], []])
def test_fewer_than_two_scored_outputs_are_exactly_zero(rewards: list[float | None], baseline: str, scale: str) -> None:
    assert outcome_advantages(rewards, baseline=baseline, scale=scale, eps=0) == [0.0] * len(rewards)


def test_an_output_that_was_not_scored_is_in_no_mean_and_no_std() -> None:
    assert outcome_advantages([1, None, 0, None, 0, 0], eps=0) == pytest.approx([1.5, 0, -0.5, 0, -0.5, -0.5])
    found = outcome_advantages([None, 1, 0, 0], baseline="leave_one_out", scale="none")
    assert found == pytest.approx([0, 1, -0.5, -0.5])
    assert found[0] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_an_error_with_its_place(bad: float) -> None:
    with pytest.raises(RewardError, match=r"output 2 is (nan|-?inf)"):
        outcome_advantages([1.0, None, bad])
    with pytest.raises(RewardError, match=r"group 1, output 0 is (nan|-?inf)"):
        group_advantages([[1.0], [bad]], PRESETS["grpo"])


@settings(max_examples=60, deadline=None)
@given(rewards_of_a_group, st.integers(-1000, 1000), st.integers(1, 50))
def test_shifting_and_scaling_rewards_changes_nothing(rewards: list[int], shift: int, factor: int) -> None:
    expected = pytest.approx(outcome_advantages(rewards, eps=0), abs=1e-10)
    assert outcome_advantages([reward + shift for reward in rewards], eps=0) == expected
    assert outcome_advantages([reward * factor / 7 for reward in rewards], eps=0) == expected
    centred = outcome_advantages(rewards, scale="none")
    assert outcome_advantages([reward + shift for reward in rewards], scale="none") == pytest.approx(centred, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(rewards_of_a_group)
def test_leave_one_out_is_the_mean_of_the_others(rewards: list[int]) -> None:
    others = [np.mean(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    found = outcome_advantages(rewards, baseline="leave_one_out", scale="none")
    assert found == pytest.approx(expected, abs=1e-12)
    assert sum(found) == pytest.approx(0, abs=1e-10)


def test_leave_one_out_stays_small_next_to_nearly_equal_rewards() -> None:
    """Dividing by the std of the *others* would give about 1e6 here."""
    found = outcome_advantages([1.0, 0.0, 0.0, 1e-6], baseline="leave_one_out")
    assert max(map(abs, found)) < 3


def test_group_advantages_follow_the_objective() -> None:
    groups = [[1, 0, 0, 0], [None, 2, 4]]
    assert group_advantages(groups, PRESETS["grpo"]) == [outcome_advantages(group) for group in groups]
    rloo = [outcome_advantages(group, baseline="leave_one_out", scale="none") for group in groups]
    assert group_advantages(groups, PRESETS["rloo"]) == rloo
    assert group_advantages([], PRESETS["rloo"]) == []


def test_scale_batch_divides_by_the_std_of_all_scored_rewards() -> None:
    groups = [[1, 0, 0, 0], [None, 2, 4], [7, 7]]
    std = np.std([1, 0, 0, 0, 2, 4, 7, 7], ddof=1)
    found = group_advantages(groups, Objective(scale="batch", scale_eps=0))
    assert found[0] == pytest.approx(np.array([0.75, -0.25, -0.25, -0.25]) / std)
    assert found[1] == pytest.approx(np.array([0, -1, 1]) / std)
    assert found[2] == [0.0, 0.0]


def test_baseline_batch_compares_with_all_scored_rewards() -> None:
    groups = [[1, 1], [None, 4]]
    objective = Objective(baseline="batch_mean", scale="none")
    assert group_advantages(groups, objective) == [[-1, -1], [0, 2]]
    whitened = group_advantages(groups, replace(objective, scale="batch", scale_eps=0))
    std = math.sqrt(3)
    assert whitened[0] == pytest.approx([-1 / std, -1 / std])
    assert whitened[1] == pytest.approx([0, 2 / std])
    assert group_advantages([[0.3, 0.3], [0.3]], objective) == [[0.0, 0.0], [0.0]]


@pytest.mark.parametrize("choice", [{"scale": "batch"}, {"baseline": "batch_mean"}])
def test_one_group_has_no_batch(choice: dict[str, str]) -> None:
    with pytest.raises(ObjectiveError, match="group_advantages"):
        outcome_advantages([1, 0], **choice)


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'leave_one_out'"):
        outcome_advantages([1, 0], baseline="leave_one")
    with pytest.raises(ConfigError, match="scale 'std' is not known"):
        outcome_advantages([1, 0], scale="std")
    with pytest.raises(ConfigError, match="eps must be at least 0, found -1"):
        outcome_advantages([1, 0], eps=-1)


def test_advantages_are_plain_floats() -> None:
    assert {type(value) for value in outcome_advantages(np.array([1, 0, 0]))} == {float}


def test_a_penalty_lowers_rewards_and_leaves_unscored_outputs_alone() -> None:
    assert less_kl([1.0, None, 0.0], [2.0, 5.0, -4.0], beta=0.5) == [0.0, None, 2.0]
    with pytest.raises(ValueError, match="zip"):
        less_kl([1.0], [2.0, 3.0], beta=0.5)


@pytest.mark.parametrize("size", [1e101, 1e200, 1.7e308])
@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_rewards_of_extreme_size_have_the_advantages_of_their_ratios(size: float, scale: str, baseline: str) -> None:
    """Sums and squares of them leave float64; eps is nothing beside them."""
    objective = replace(PRESETS["grpo"], scale=scale, baseline=baseline, scale_eps=0.0)  # type: ignore[arg-type]
    small = [[1.0, -1.0, 0.5, 0.0], [0.25, 1.0, 1.0, None]]
    large = [[None if value is None else value * size for value in group] for group in small]
    for found, expected in zip(group_advantages(large, objective), group_advantages(small, objective), strict=True):
        assert found == pytest.approx(expected)


def test_a_group_of_usual_rewards_beside_one_of_extreme_size_is_as_it_is_alone() -> None:
    alone = outcome_advantages([1.0, 0.0, 0.0])
    assert group_advantages([[1.0, 0.0, 0.0], [1e200, 0.0, 0.0]], PRESETS["grpo"])[0] == alone


def test_an_advantage_that_training_cannot_hold_is_an_error() -> None:
    group = Outcomes([1e200, 0.0])
    objective = replace(PRESETS["grpo"], scale="none")
    with pytest.raises(RewardError, match=r"advantage is 5e\+199, .*scale the rewards"):
        token_advantages([group], objective)
    assert token_advantages([Outcomes([1e30, 0.0])], objective)[0] == pytest.approx([5e29, -5e29])


class Outcomes:
    """A group of which only outputs are scored."""

    def __init__(self, rewards: list[float | None]) -> None:
        self.rewards = rewards
        self.steps: list[list[tuple[int, float | None]]] = [[] for _ in rewards]
        self.lengths = [1] * len(rewards)
