"""How the ratio meets the advantage: the loss of a token before weights and KL, and where a bound cut its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from groupwise.objective.presets import Objective


class SurrogateLoss(NamedTuple):
    """Loss per token; and whether the lower or the upper bound took the token's gradient away (or capped it)."""

    loss_T: Tensor
    clipped_low_T: Tensor
    clipped_high_T: Tensor


def clip(ratio_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor, objective: Objective) -> SurrogateLoss:
    """`-min(rho * A, clip(rho, 1 - epsilon, 1 + epsilon_high) * A)` (arXiv:2402.03300, equation 3; DAPO's clip-higher).

    With `dual_clip` c (arXiv:1912.09729), a token with A < 0 loses at most `c * |A|`; it then counts as clipped high.
    """
    low, high = 1 - objective.epsilon, 1 + objective.epsilon_high
    loss_T = -torch.minimum(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    clipped_low_T = (ratio_T < low) & (advantages_T < 0)
    clipped_high_T = (ratio_T > high) & (advantages_T > 0)
    if objective.dual_clip is not None:
        loss_T = torch.minimum(loss_T, objective.dual_clip * advantages_T.abs())  # can bind only where A < 0
        clipped_high_T = clipped_high_T | ((ratio_T > objective.dual_clip) & (advantages_T < 0))
    return SurrogateLoss(loss_T, clipped_low_T, clipped_high_T)


def cispo(ratio_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor, objective: Objective) -> SurrogateLoss:
    """`-sg[min(rho, epsilon_high)] * A * logprob`: a capped weight, a gradient for every token (arXiv:2506.13585)."""
    weight_T = ratio_T.detach().clamp(max=objective.epsilon_high)
    capped_T = (ratio_T > objective.epsilon_high) & (advantages_T != 0)
    return SurrogateLoss(-weight_T * advantages_T * logprobs_T, torch.zeros_like(capped_T), capped_T)


def sapo(ratio_T: Tensor, logprobs_T: Tensor, advantages_T: Tensor, objective: Objective) -> SurrogateLoss:
    """`-4/tau * sigmoid(tau * (rho - 1)) * A`: a gate that fades instead of cutting (arXiv:2511.20347)."""
    tau_T = torch.full_like(ratio_T, objective.sapo_temperature_neg)
    tau_T = tau_T.masked_fill(advantages_T > 0, objective.sapo_temperature_pos)
    loss_T = -4 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1)) * advantages_T
    never_T = torch.zeros_like(advantages_T, dtype=torch.bool)
    return SurrogateLoss(loss_T, never_T, never_T)


SURROGATES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Objective], SurrogateLoss]] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
}
