"""One weight per token, which carries the whole normalisation: `loss = (loss_T * weights_T).sum()`.

Computed once over all groups of an optimizer update, before any split, so that micro-batches, packing and ranks cannot
change the gradient. Q counts groups with a trained token, G_q a group's outputs with one, |o_i| an output's trained
tokens. What is not trained weighs 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from groupwise.errors import ObjectiveError
from groupwise.objective.presets import Objective
from groupwise.objective.segments import output_sum


def sequence_mean(trained_T: Tensor, completion_T: Tensor, group_T: Tensor) -> Tensor:
    """`1 / (Q * G_q * |o_i|)`: a mean over tokens, of outputs, of groups (arXiv:2402.03300, equation 3)."""
    share_T = trained_T
    for level_T in (completion_T, group_T, torch.zeros_like(group_T)):
        # Shares now sum to 1 in each unit of the level below, so their sum counts the units that have a trained token.
        share_T = share_T / output_sum(share_T, level_T).clamp(min=1)
    return share_T


def sequence_sum(trained_T: Tensor, completion_T: Tensor, group_T: Tensor) -> Tensor:
    """`1 / (Q * G_q)`: tokens are summed, outputs and groups averaged (RLOO, arXiv:2402.14740)."""
    return sequence_mean(trained_T, completion_T, group_T) * output_sum(trained_T, completion_T)


def token_mean(trained_T: Tensor, completion_T: Tensor, group_T: Tensor) -> Tensor:
    """One over all trained tokens of the update (DAPO, arXiv:2503.14476)."""
    return trained_T / trained_T.sum().clamp(min=1)


WEIGHTS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "token_mean": token_mean,
    "constant_length": sequence_sum,
}


def token_weights(
    objective: Objective,
    *,
    completion_T: Tensor,
    group_S: Tensor | None = None,
    trained_T: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights `[T]` of one whole optimizer update, in `dtype`; counted in float64.

    `completion_T` indexes `group_S`, which names each output's group; without it all outputs are one group and weigh
    alike. `constant_length` gives `1 / (Q * G_q * max_completion_length)` (Dr. GRPO, arXiv:2503.20783) and raises
    ObjectiveError when the objective has no such length.
    """
    if trained_T is None:
        trained_T = torch.ones_like(completion_T, dtype=torch.bool)
    group_T = torch.zeros_like(completion_T) if group_S is None else group_S[completion_T]
    weights_T = WEIGHTS[objective.weights](trained_T.double(), completion_T, group_T)
    return (weights_T / _constant_length(objective)).to(dtype)


def _constant_length(objective: Objective) -> int:
    if objective.weights != "constant_length":
        return 1
    if objective.max_completion_length is None:
        raise ObjectiveError(
            "weights 'constant_length' divide by max_completion_length, which is not set: "
            "dataclasses.replace(objective, max_completion_length=256)."
        )
    return objective.max_completion_length
