"""Weights: each kind's formula, counted over what is trained, once over the whole update."""

from dataclasses import replace

import pytest
import torch

from groupwise.errors import ConfigError
from groupwise.objective import PRESETS, Objective, token_weights

# Three groups: outputs of 3 and 1 tokens; an output of 2 and one that is not trained; one that is not trained.
COMPLETION_T = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 4])
GROUP_S = torch.tensor([10, 10, 4, 4, 7])
TRAINED_T = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)  # and one token of output 0 is not trained


def weights(kind: str, **other: object) -> list[float]:
    objective = Objective(weights=kind, max_completion_length=8)
    found = token_weights(objective, completion_T=COMPLETION_T, dtype=torch.float64, **other)
    return found.tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sequence_mean", [1 / 8, 0, 1 / 8, 1 / 4, 1 / 4, 1 / 4, 0, 0, 0]),
        ("sequence_sum", [1 / 4, 0, 1 / 4, 1 / 4, 1 / 2, 1 / 2, 0, 0, 0]),
        ("token_mean", [1 / 5, 0, 1 / 5, 1 / 5, 1 / 5, 1 / 5, 0, 0, 0]),
        ("constant_length", [1 / 32, 0, 1 / 32, 1 / 32, 1 / 16, 1 / 16, 0, 0, 0]),
    ],
)
def test_counts_only_what_is_trained(kind: str, expected: list[float]) -> None:
    assert weights(kind, group_S=GROUP_S, trained_T=TRAINED_T) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sequence_mean", [1 / 15] * 3 + [1 / 5] + [1 / 10] * 4 + [1 / 5]),
        ("sequence_sum", [1 / 5] * 9),
        ("token_mean", [1 / 9] * 9),
        ("constant_length", [1 / 40] * 9),
    ],
)
def test_without_groups_all_outputs_weigh_alike(kind: str, expected: list[float]) -> None:
    assert weights(kind) == pytest.approx(expected, abs=1e-15)


def test_every_group_weighs_alike_however_many_outputs_it_has() -> None:
    found = torch.tensor(weights("sequence_mean", group_S=GROUP_S))
    per_group = [found[GROUP_S[COMPLETION_T] == group].sum().item() for group in (10, 4, 7)]
    assert per_group == pytest.approx([1 / 3] * 3)


def test_nothing_trained_weighs_nothing() -> None:
    for kind in ("sequence_mean", "sequence_sum", "token_mean", "constant_length"):
        assert weights(kind, group_S=GROUP_S, trained_T=torch.zeros(9, dtype=torch.bool)) == [0.0] * 9


def test_float32_weights_are_counted_in_float64() -> None:
    for objective in (PRESETS["grpo"], PRESETS["dapo"]):
        single = token_weights(objective, completion_T=COMPLETION_T, group_S=GROUP_S)
        double = token_weights(objective, completion_T=COMPLETION_T, group_S=GROUP_S, dtype=torch.float64)
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        assert torch.equal(single, double.float())


def test_constant_length_needs_its_length() -> None:
    with pytest.raises(ConfigError, match="max_completion_length, which is not set") as caught:
        token_weights(PRESETS["dr_grpo"], completion_T=COMPLETION_T)
    assert isinstance(caught.value, ValueError)
    fixed = replace(PRESETS["dr_grpo"], max_completion_length=3)
    assert token_weights(fixed, completion_T=COMPLETION_T)[0].item() == pytest.approx(1 / 15)
