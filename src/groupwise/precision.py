"""What sums and exponentials are computed in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOG2_E = 1 / math.log(2)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where that is wider: scores and logits in half precision lose too much."""
    return tensor.to(wide_dtype(tensor.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider of `dtype` and float32."""
    return torch.promote_types(dtype, torch.float32)


def exp(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`torch.exp` without gradient. On a CPU by powers of two: the other goes through a library that takes four times
    as long where a number is -inf, as half of those under a causal mask are, and forty times where the result is
    denormal."""
    return torch.mul(x, _LOG2_E, out=out).exp2_() if x.device.type == "cpu" else torch.exp(x, out=out)
