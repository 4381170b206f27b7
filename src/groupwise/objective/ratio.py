"""The importance ratio: how much likelier the policy now is than the policy that sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from groupwise.objective.segments import output_mean, output_sum

RATIOS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio_T, completion_T, trained_T: log_ratio_T,
    "sequence_mean": output_mean,
    "sequence_product": lambda log_ratio_T, completion_T, trained_T: output_sum(log_ratio_T, completion_T),
}


def policy_ratio(
    kind: str, logprobs_T: Tensor, old_logprobs_T: Tensor, completion_T: Tensor, trained_T: Tensor
) -> Tensor:
    """Per token `sg[rho] * pi / sg[pi]` (sg = stop gradient), rho the ratio of the token or of its whole output.

    The value is rho and the gradient with respect to the token's own log-prob is rho too, so a sequence ratio takes
    per-token advantages without counting an output once per token (GSPO, arXiv:2507.18071, "GSPO-token").
    """
    log_ratio_T = (logprobs_T - old_logprobs_T).detach()
    level_T = RATIOS[kind](log_ratio_T, completion_T, trained_T)
    return bounded_exp(level_T) * (logprobs_T - logprobs_T.detach()).exp()


def bounded_exp(log_T: Tensor) -> Tensor:
    """`exp`, held below the root of the largest number: an infinite ratio would turn a clipped token's 0 into NaN."""
    return log_T.clamp(max=math.log(torch.finfo(log_T.dtype).max) / 2).exp()
