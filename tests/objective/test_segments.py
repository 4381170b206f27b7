"""Sums over outputs: the same bits however outputs are numbered, and no shape that a device would have to tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groupwise.objective import PRESETS, policy_loss
from groupwise.objective.segments import output_mean, output_sum


def one_by_one(values_T: Tensor, completion_T: Tensor) -> Tensor:
    """The sums in plain words: each output's tokens added up from first to last."""
    sums: dict[int, Tensor] = {}
    for name, value in zip(completion_T.tolist(), values_T, strict=True):
        sums[name] = sums.get(name, torch.zeros((), dtype=values_T.dtype)) + value
    return torch.stack([sums[name] for name in completion_T.tolist()])


def test_sums_and_means_by_hand() -> None:
    values_T = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    completion_T = torch.tensor([7, -3, 7, 1000, -3])
    assert output_sum(values_T, completion_T).tolist() == [5.0, 18.0, 5.0, 8.0, 18.0]
    trained_T = torch.tensor([True, True, False, False, True])
    found = output_mean(torch.where(trained_T, values_T, 0.0), completion_T, trained_T)
    assert found.tolist() == [1.0, 9.0, 1.0, 0.0, 9.0]
    assert output_sum(values_T[:0], completion_T[:0]).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_not_a_bit_depends_on_the_numbering(dtype: torch.dtype, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values_T = torch.randn(500, generator=random, dtype=dtype)
    completion_T = torch.randint(0, 30, (500,), generator=random)
    expected = one_by_one(values_T, completion_T)
    names = torch.randperm(10_000, generator=random)[:30] - 5_000
    for numbered_T in (completion_T, names[completion_T], torch.stack([completion_T, completion_T], 1)[:, 0]):
        assert torch.equal(output_sum(values_T, numbered_T), expected)


@pytest.mark.parametrize("name", PRESETS)
def test_no_shape_depends_on_what_is_in_a_tensor(name: str) -> None:
    """Tensors without contents have no answer to that; on a device, asking would make the host wait."""

    def empty(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(length, dtype=dtype, device="meta")

    objective = replace(PRESETS[name], max_completion_length=9)
    logprobs_T = empty(6).requires_grad_()
    loss = policy_loss(
        objective, logprobs_T=logprobs_T, old_logprobs_T=empty(6), ref_logprobs_T=empty(6), advantages_T=empty(6),
        completion_T=empty(6, torch.long), group_S=empty(3, torch.long), trained_T=empty(6, torch.bool),
    )  # fmt: skip
    loss.backward()
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.shape == (6,)
