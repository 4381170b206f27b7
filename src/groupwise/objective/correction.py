"""Importance weights for a sampler that is not quite the old policy: another engine, other kernels, older weights.

Truncated (TIS) or masked (MIS), per token or per output. They multiply the surrogate, never the KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from groupwise.objective.presets import Objective
from groupwise.objective.ratio import bounded_exp
from groupwise.objective.segments import output_sum


def _truncate(weight_T: Tensor, floor: float, cap: float) -> Tensor:
    return weight_T.clamp(floor, cap)


def _mask(weight_T: Tensor, floor: float, cap: float) -> Tensor:
    return torch.where((weight_T >= floor) & (weight_T <= cap), weight_T, 0.0)


def _per_token(log_weight_T: Tensor, completion_T: Tensor) -> Tensor:
    return log_weight_T


CORRECTIONS: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, float, float], Tensor]]] = {
    "token_truncate": (_per_token, _truncate),
    "token_mask": (_per_token, _mask),
    "sequence_truncate": (output_sum, _truncate),
    "sequence_mask": (output_sum, _mask),
}


def sampler_correction(
    objective: Objective, old_logprobs_T: Tensor, sampled_logprobs_T: Tensor, completion_T: Tensor
) -> Tensor:
    """Detached `exp(old - sampled)` per token, or of its whole output, within the objective's bounds.

    Both log-probs are at the sampler's temperature, and equal (such as 0) on tokens that are not trained.
    """
    level, bound = CORRECTIONS[objective.importance_sampling]
    log_weight_T = (old_logprobs_T - sampled_logprobs_T).detach()
    weight_T = bounded_exp(level(log_weight_T, completion_T))
    return bound(weight_T, objective.importance_sampling_floor, objective.importance_sampling_cap)
