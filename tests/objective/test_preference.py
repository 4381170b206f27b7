"""The losses of reward models, by their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from groupwise.objective.preference import label_losses, preference_losses


def test_cross_entropy_by_hand() -> None:
    x = torch.tensor([0.0, 2.0, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.0, 0.25], dtype=torch.float64)
    p = [1 / (1 + math.exp(-v)) for v in x.tolist()]
    expected = [-b * math.log(a) - (1 - b) * math.log(1 - a) for a, b in zip(p, y.tolist(), strict=True)]
    losses = label_losses(x, y)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    losses.sum().backward()
    assert x.grad.tolist() == pytest.approx([a - b for a, b in zip(p, y.tolist(), strict=True)], rel=1e-12)


def test_it_is_the_cross_entropy_of_two_labels_where_logits_are_log_odds() -> None:
    two = torch.tensor([[0.3, 1.1], [2.0, -0.5]], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(two, torch.tensor([1, 0]), reduction="none")
    found = label_losses(two[:, 1] - two[:, 0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_bradley_terry_by_hand() -> None:
    chosen = torch.tensor([1.0, -2.0, 60.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 1.0, -60.0], dtype=torch.float64, requires_grad=True)
    losses = preference_losses(chosen, rejected)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log1p(math.exp(3.0)), 0.0], abs=1e-12)
    losses.sum().backward()
    expected = [-1 / (1 + math.exp(0.5)), -1 / (1 + math.exp(-3.0)), 0.0]
    assert chosen.grad.tolist() == pytest.approx(expected, abs=1e-12)
    assert rejected.grad.tolist() == pytest.approx([-g for g in expected], abs=1e-12)


def test_extremes_are_finite() -> None:
    x = torch.tensor([1e4, -1e4])
    assert label_losses(x, torch.tensor([0.0, 1.0])).tolist() == [1e4, 1e4]
    assert label_losses(x, torch.tensor([1.0, 0.0])).tolist() == [0.0, 0.0]
