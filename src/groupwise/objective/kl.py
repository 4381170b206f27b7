"""The price of leaving the reference policy. Names after John Schulman's note "Approximating KL Divergence".

What counts for a loss is its gradient, not its value. In expectation over the policy's own tokens, that of `k2` and
`k3_unbiased` is the gradient of the reverse divergence KL(pi || ref), that of `k3` of the forward one, KL(ref || pi),
and that of `k1` is zero, which is why `k1` is no loss and exists only as a penalty in the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from groupwise.objective.ratio import bounded_exp


def k2(logprobs_T: Tensor, ref_logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """Half the squared log-ratio."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """`ref/pi - log(ref/pi) - 1`: never negative, 0 when equal (arXiv:2402.03300, equation 4)."""
    log_ratio_T = ref_logprobs_T - logprobs_T
    return torch.expm1(log_ratio_T) - log_ratio_T


def k3_unbiased(logprobs_T: Tensor, ref_logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """`rho * k3` with the token ratio, unclipped and differentiable: exact also when old and current policy differ."""
    ratio_T = bounded_exp(logprobs_T - old_logprobs_T)
    return ratio_T * k3(logprobs_T, ref_logprobs_T, old_logprobs_T)


KLS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"k2": k2, "k3": k3, "k3_unbiased": k3_unbiased}


def k1_per_output(
    old_logprobs_T: Tensor,
    ref_logprobs_T: Tensor,
    completion_T: Tensor,
    *,
    outputs: int,
    trained_T: Tensor | None = None,
) -> Tensor:
    """`sum_t (old - ref)` of each of `outputs` outputs, over trained tokens, detached: the penalty in the reward."""
    k1_T = (old_logprobs_T - ref_logprobs_T).detach()
    if trained_T is not None:
        k1_T = torch.where(trained_T, k1_T, 0.0)
    return k1_T.new_zeros(outputs).index_add(0, completion_T, k1_T)
