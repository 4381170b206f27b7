"""The loss of tokens, and of a whole batch. Minimising it maximises the objective (arXiv:2402.03300, equation 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from groupwise.errors import ObjectiveError
from groupwise.objective.correction import sampler_correction
from groupwise.objective.kl import KLS
from groupwise.objective.presets import Objective, objective_named
from groupwise.objective.ratio import policy_ratio
from groupwise.objective.surrogate import SURROGATES
from groupwise.objective.weights import token_weights


@dataclass(frozen=True, slots=True, eq=False)
class TokenLosses:
    """Per token: `loss_T`, with gradient and before weights; the rest is detached, for metrics over trained tokens.

    `kl_T` is None when the loss has no KL term, `correction_T` when nothing was corrected.
    """

    loss_T: Tensor
    ratio_T: Tensor
    clipped_low_T: Tensor
    clipped_high_T: Tensor
    kl_T: Tensor | None
    correction_T: Tensor | None


def token_losses(
    objective: Objective,
    *,
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    completion_T: Tensor,
    ref_logprobs_T: Tensor | None = None,
    trained_T: Tensor | None = None,
    sampled_logprobs_T: Tensor | None = None,
) -> TokenLosses:
    """Surrogate times sampler correction, plus `beta` times KL, for `[T]` output tokens.

    Gradients flow to `logprobs_T` alone. Tokens with `trained_T` False may hold anything, even NaN; their loss is 0.
    A micro-batch may hold any outputs, each whole. Raises ObjectiveError for shapes that differ or a missing reference.
    """
    trained_T = torch.ones_like(completion_T, dtype=torch.bool) if trained_T is None else trained_T.bool()
    _check_shape("completion_T", completion_T, trained_T)
    tokens = _Tokens(
        logprobs_T=_select("logprobs_T", logprobs_T, trained_T),
        old_logprobs_T=_fixed("old_logprobs_T", old_logprobs_T, trained_T),
        advantages_T=_fixed("advantages_T", advantages_T, trained_T),
        completion_T=completion_T,
        trained_T=trained_T,
        ref_logprobs_T=_fixed("ref_logprobs_T", _reference_needed(objective, ref_logprobs_T), trained_T),
        sampled_logprobs_T=_fixed("sampled_logprobs_T", _sampled_used(objective, sampled_logprobs_T), trained_T),
    )
    return _losses(objective, tokens)


def policy_loss(
    preset: str | Objective,
    *,
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    completion_T: Tensor,
    ref_logprobs_T: Tensor | None = None,
    group_S: Tensor | None = None,
    trained_T: Tensor | None = None,
    weights_T: Tensor | None = None,
    sampled_logprobs_T: Tensor | None = None,
) -> Tensor:
    """The loss of a whole batch, a scalar: `(loss_T * weights_T).sum()`.

    `preset` is a name of PRESETS or an Objective. `logprobs_T[t]` is the log-prob of output token t now, `old` when the
    update began, `ref` under the reference, `sampled` under the engine; `completion_T` the token's output, `group_S` an
    output's group (without it all outputs weigh alike). With `weights_T` nothing is normalised here: the sum over
    micro-batches is then the batch's loss. Raises ObjectiveError as `token_losses` and `token_weights` do.
    """
    objective = objective_named(preset)
    losses = token_losses(
        objective,
        logprobs_T=logprobs_T,
        old_logprobs_T=old_logprobs_T,
        advantages_T=advantages_T,
        completion_T=completion_T,
        ref_logprobs_T=ref_logprobs_T,
        trained_T=trained_T,
        sampled_logprobs_T=sampled_logprobs_T,
    )
    if weights_T is None:
        weights_T = token_weights(
            objective, completion_T=completion_T, group_S=group_S, trained_T=trained_T, dtype=logprobs_T.dtype
        )
    elif trained_T is not None:
        weights_T = _select("weights_T", weights_T, trained_T.bool())
    _check_shape("weights_T", weights_T, completion_T)
    return (losses.loss_T * weights_T).sum()


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """What losses are computed from: 0 on every token that is not trained, a gradient in `logprobs_T` alone."""

    logprobs_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor
    completion_T: Tensor
    trained_T: Tensor
    ref_logprobs_T: Tensor | None
    sampled_logprobs_T: Tensor | None


def _losses(objective: Objective, tokens: _Tokens) -> TokenLosses:
    logprobs_T, old_T, completion_T = tokens.logprobs_T, tokens.old_logprobs_T, tokens.completion_T
    ratio_T = policy_ratio(objective.ratio, logprobs_T, old_T, completion_T, tokens.trained_T)
    loss_T, low_T, high_T = SURROGATES[objective.surrogate](ratio_T, logprobs_T, tokens.advantages_T, objective)
    correction_T = kl_T = None
    if tokens.sampled_logprobs_T is not None:
        correction_T = sampler_correction(objective, old_T, tokens.sampled_logprobs_T, completion_T)
        loss_T = loss_T * correction_T
    if tokens.ref_logprobs_T is not None:
        kl_T = KLS[objective.kl](logprobs_T, tokens.ref_logprobs_T, old_T)
        loss_T = loss_T + objective.beta * kl_T
        kl_T = kl_T.detach()
    return TokenLosses(loss_T, ratio_T.detach(), low_T, high_T, kl_T, correction_T)


def _select(name: str, values_T: Tensor, trained_T: Tensor) -> Tensor:
    # Before any arithmetic: 0 * NaN is NaN, and so is the gradient of what is masked only afterwards.
    _check_shape(name, values_T, trained_T)
    return torch.where(trained_T, values_T, 0.0)


@overload
def _fixed(name: str, values_T: Tensor, trained_T: Tensor) -> Tensor: ...
@overload
def _fixed(name: str, values_T: Tensor | None, trained_T: Tensor) -> Tensor | None: ...
def _fixed(name: str, values_T: Tensor | None, trained_T: Tensor) -> Tensor | None:
    return None if values_T is None else _select(name, values_T.detach(), trained_T)


def _reference_needed(objective: Objective, ref_logprobs_T: Tensor | None) -> Tensor | None:
    """The reference's log-probs if the loss has a KL term, else None: with beta 0 they are never touched."""
    if not objective.kl_in_loss:
        return None
    if ref_logprobs_T is None:
        raise ObjectiveError(
            f"beta is {objective.beta} with kl {objective.kl!r}, but ref_logprobs_T is missing: "
            "give the reference's log-probs, or set beta to 0."
        )
    return ref_logprobs_T


def _sampled_used(objective: Objective, sampled_logprobs_T: Tensor | None) -> Tensor | None:
    return None if objective.importance_sampling == "none" else sampled_logprobs_T


def _check_shape(name: str, values_T: Tensor, like_T: Tensor) -> None:
    if values_T.dim() != 1 or values_T.shape != like_T.shape:
        raise ObjectiveError(
            f"{name} has shape {list(values_T.shape)}, other tensors of the batch {list(like_T.shape)}: "
            "every _T tensor is flat, with one entry per output token."
        )
