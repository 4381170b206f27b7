"""What sums and exponentials are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where that is wider: scores and logits in half precision lose too much."""
    return tensor.to(wide_dtype(tensor.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider of `dtype` and float32."""
    return torch.promote_types(dtype, torch.float32)
