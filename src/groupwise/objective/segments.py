"""Sums over the tokens of an output, on a flat stream without padding."""

from __future__ import annotations

import torch
from torch import Tensor


def output_sum(values_T: Tensor, completion_T: Tensor) -> Tensor:
    """Per token, the sum of `values_T` over all tokens with the same `completion_T`.

    Any numbering and any order of outputs will do, so a micro-batch may keep the numbers of the whole batch.
    """
    # An output's place is where its number first stands among the sorted ones: as many places as tokens, most of them
    # empty. So no shape depends on how many outputs there are; to know that, the host would wait for the device.
    index_T = torch.searchsorted(completion_T.sort().values, completion_T.contiguous())
    return torch.zeros_like(values_T).index_add(0, index_T, values_T)[index_T]


def output_mean(values_T: Tensor, completion_T: Tensor, trained_T: Tensor) -> Tensor:
    """Per token, the mean over its output's trained tokens of `values_T`, which is 0 on all others."""
    counts_T = output_sum(trained_T.to(values_T.dtype), completion_T)
    return output_sum(values_T, completion_T) / counts_T.clamp(min=1)
