"""From hidden states to log-probs of given tokens, without ever holding the logits of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupwise.models.precision import wide, wide_dtype

_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class HeadShape:
    """What lies between `hidden @ W.T + b` and the logits: a factor (Cohere, Granite) and a soft cap (Gemma2)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Logits from the raw product."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chain(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to the raw product, from that with respect to the logits. Works in place."""
        if self.softcap is not None:
            gradient *= 1 - (logits / self.softcap) ** 2
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps hidden states and one log-sum-exp per token; recomputes a chunk's logits in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor,
        options: tuple[HeadShape, float, bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shape, temperature, want_entropy = options
        logprobs_T = torch.empty(len(target_T), dtype=wide_dtype(hidden_TD.dtype), device=hidden_TD.device)
        lse_T, entropy_T = torch.empty_like(logprobs_T), torch.zeros_like(logprobs_T)
        for rows in _chunks(len(target_T), weight_VD.shape[0]):
            scaled = _logits(hidden_TD[rows], weight_VD, bias_V, shape).div_(temperature)
            lse_T[rows] = lse = torch.logsumexp(scaled, -1)
            logprobs_T[rows] = scaled.gather(-1, target_T[rows, None])[:, 0] - lse
            if want_entropy:
                probs = (scaled - lse[:, None]).exp_()
                entropy_T[rows] = lse - probs.mul_(_finite(scaled)).sum(-1)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, lse_T)
        ctx.shape, ctx.temperature = shape, temperature
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_T, lse_T = ctx.saved_tensors
        wide = lse_T.dtype
        grad_hidden = torch.empty_like(hidden_TD)
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        for rows in _chunks(len(target_T), weight_VD.shape[0]):
            hidden = hidden_TD[rows]
            logits = _logits(hidden, weight_VD, bias_V, ctx.shape)
            # d logprob / d logit = (onehot - softmax) / temperature
            gradient = torch.exp(logits / ctx.temperature - lse_T[rows, None]).neg_()
            gradient.scatter_add_(-1, target_T[rows, None], torch.ones_like(gradient[:, :1]))
            gradient *= (grad_T[rows] / ctx.temperature)[:, None]
            gradient = ctx.shape.chain(logits, gradient)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            narrow = gradient.to(hidden.dtype)
            grad_hidden[rows] = narrow @ weight_VD
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden
        return (
            grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(bias_V.dtype), None, None,
        )  # fmt: skip


def chunked_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, *,
    shape: HeadShape = HeadShape(), temperature: float = 1.0, entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probs of `target_T` under `softmax(logits / temperature)` and, on request, the entropy (no gradient).

    Both are `[T]`, float32 or wider. Memory beside the inputs: one chunk of logits.
    """
    if len(target_T) == 0:
        empty = wide(hidden_TD.sum(-1))
        return empty, empty.detach() if entropy else None
    options = (shape, temperature, entropy)
    logprobs_T, entropy_T = _ChunkedLogProbs.apply(hidden_TD, weight_VD, bias_V, target_T, options)  # type: ignore[no-untyped-call]
    return logprobs_T, entropy_T if entropy else None


def dense_logprobs(logits_TV: Tensor, target_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from whole logits `[T, V]`, by autograd: for heads that are not a matrix product, and as an oracle."""
    log_softmax = torch.log_softmax(wide(logits_TV) / temperature, -1)
    logprobs_T = log_softmax.gather(-1, target_T[:, None])[:, 0]
    with torch.no_grad():
        entropy_T = -(log_softmax.exp() * _finite(log_softmax)).sum(-1)
    return logprobs_T, entropy_T


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    return shape.apply(wide(torch.nn.functional.linear(hidden, weight, bias)))


def _finite(logits: Tensor) -> Tensor:
    # An impossible token adds 0 to the entropy; 0 * -inf would add nan.
    return logits.clamp_min(torch.finfo(logits.dtype).min)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(16, _CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
