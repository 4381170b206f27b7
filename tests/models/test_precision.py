"""Exponentials on a CPU go by powers of two: the same numbers, whatever the argument."""

from __future__ import annotations

import math

import pytest
import torch

from groupwise.precision import exp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_those_of_torch(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-60, 20, 501), torch.tensor([0.0, -87.0, -1e4, -math.inf, math.nan])]).to(dtype)
    torch.testing.assert_close(exp(x), torch.exp(x), rtol=1e-5, atol=1e-37, equal_nan=True)
    within = x.clone()
    assert exp(within, out=within) is within
    assert torch.equal(within.nan_to_num(), exp(x).nan_to_num())
