"""Process advantages: numbers from the formula, a slow reading of it on random steps, and its properties."""

import math
import random

import numpy as np
import pytest

from groupwise.errors import ObjectiveError, RewardError
from groupwise.objective import outcome_advantages, process_advantages

Steps = list[list[tuple[int, float | None]]]


def random_steps(seed: int, share_of_none: float = 0.0) -> tuple[Steps, list[int]]:
    """Outputs of 0 to 9 tokens with any rising ends, some before the output's last token."""
    rng = random.Random(seed)
    lengths = [rng.randint(0, 9) for _ in range(rng.randint(1, 6))]
    steps: Steps = []
    for length in lengths:
        ends = sorted(rng.sample(range(1, length + 1), rng.randint(0, min(4, length))))
        steps.append([(end, None if rng.random() < share_of_none else rng.choice([0, 1, 0.5])) for end in ends])
    return steps, lengths


def slow(steps: Steps, lengths: list[int], divide: bool) -> list[list[float]]:
    """`A_it = sum over j with index(j) >= t of rt_ij`, where index(j) = end - 1 is the step's last token."""
    known = [reward for output in steps for _, reward in output if reward is not None]
    if len(set(known)) < 2:
        return [[0.0] * length for length in lengths]
    mean = sum(known) / len(known)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) if divide else 1.0
    return [
        [sum((r - mean) / std for end, r in output if r is not None and end - 1 >= t) for t in range(length)]
        for output, length in zip(steps, lengths, strict=True)
    ]


def test_numbers_of_the_worked_example() -> None:
    found = process_advantages([[(2, 1), (5, 0)], [(3, 1), (4, 1)]], [5, 4], eps=0)
    assert found[0] == pytest.approx([-1, -1, -1.5, -1.5, -1.5])
    assert found[1] == pytest.approx([1, 1, 1, 0.5])


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("share_of_none", [0.0, 0.3])
def test_random_steps_against_the_formula(scale: str, share_of_none: float) -> None:
    for seed in range(60):
        steps, lengths = random_steps(seed, share_of_none)
        found = process_advantages(steps, lengths, scale=scale, eps=0)
        assert [len(output) for output in found] == lengths
        for output, expected in zip(found, slow(steps, lengths, divide=scale == "group"), strict=True):
            assert output == pytest.approx(expected, abs=1e-12)


def test_advantages_of_first_tokens_sum_to_zero() -> None:
    seen = 0
    for seed in range(60):
        steps, lengths = random_steps(seed)
        found = process_advantages(steps, lengths)
        assert sum(output[0] for output in found if output) == pytest.approx(0, abs=1e-10)
        seen += any(output and output[0] for output in found)
    assert seen > 30


@pytest.mark.parametrize("scale", ["group", "none"])
def test_one_step_per_output_is_outcome_supervision_bit_for_bit(scale: str) -> None:
    rng = np.random.default_rng(0)
    for outputs in range(1, 9):
        rewards = [float(reward) if rng.random() < 0.8 else None for reward in rng.standard_normal(outputs)]
        lengths = rng.integers(1, 6, outputs).tolist()
        steps: Steps = [[(length, reward)] for length, reward in zip(lengths, rewards, strict=True)]
        expected = outcome_advantages(rewards, scale=scale)
        spread = [[advantage] * length for advantage, length in zip(expected, lengths, strict=True)]
        assert process_advantages(steps, lengths, scale=scale) == spread


def test_tokens_after_the_last_step_have_none_ahead() -> None:
    found = process_advantages([[(1, 1)], [(2, 0)]], [3, 2], scale="none")
    assert found == [[0.5, 0.0, 0.0], [-0.5, -0.5]]


def test_a_step_that_was_not_scored_is_out_of_the_set_and_adds_nothing() -> None:
    with_none = process_advantages([[(1, 1), (2, None), (3, 0)], [(2, None)], []], [3, 2, 2], scale="none")
    assert with_none == [[0.0, -0.5, -0.5], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "steps",
    [
        [[(2, 0.3), (3, 0.3)], [(3, 0.3)]],
        [[(3, 1.0)], []],
        [[(3, None)], [(1, 0.7)]],
        [[], []],
    ],
)
def test_equal_or_fewer_than_two_step_rewards_are_exactly_zero(steps: Steps) -> None:
    assert process_advantages(steps, [3, 3], eps=0) == [[0.0] * 3, [0.0] * 3]


def test_a_lone_output_keeps_the_advantages_of_differing_steps() -> None:
    assert process_advantages([[(1, 1), (2, 0)]], [2], scale="none") == [[0.0, -0.5]]


@pytest.mark.parametrize("ends", [[0, 2], [2, 2], [3, 1], [1, 6], [-1]])
def test_ends_that_do_not_rise_within_the_output_are_refused(ends: list[int]) -> None:
    with pytest.raises(ObjectiveError, match=r"Output 1 has 5 tokens and step ends \["):
        process_advantages([[(1, 0.0)], [(end, 1.0) for end in ends]], [5, 5])


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="steps speak of 1 outputs, lengths of 2"):
        process_advantages([[(1, 0.0)]], [1, 1])


def test_a_step_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(RewardError, match="output 1, step 0 is nan"):
        process_advantages([[(1, 0.0)], [(1, math.nan)]], [1, 1])


def test_batch_scale_is_refused_for_one_group() -> None:
    with pytest.raises(ObjectiveError, match="no batch"):
        process_advantages([[(1, 0.0)]], [1], scale="batch")
