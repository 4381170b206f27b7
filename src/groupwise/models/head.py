"""From hidden states to log-probs of given tokens, without ever holding the logits of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupwise.models.tracing import counter
from groupwise.precision import exp, wide, wide_dtype

_CHUNK_ELEMENTS = 1 << 20
"""Logits of a chunk, 4 MB in float32, or a quarter of the matrix where that is more: the matrix is read per chunk."""


@dataclass(frozen=True)
class HeadShape:
    """What lies between `hidden @ W.T + b` and the logits: a factor (Cohere, Granite) and a soft cap (Gemma2)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Logits from the raw matmul."""
        logits = raw if self.scale == 1.0 else raw * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chain(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to the raw matmul, from that with respect to the logits. Works in place."""
        if self.softcap is not None:
            gradient *= 1 - (logits / self.softcap) ** 2
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps hidden states and one log-sum-exp per token; recomputes a chunk's logits in the backward pass.

    Where the gradient that will arrive is known beforehand (`grad_logprobs_T`) a chunk's logits are used for it at once
    and computed no second time: three matmuls with the head's matrix instead of four.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor,
        options: tuple[HeadShape, float, bool, Tensor | None],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shape, temperature, want_entropy, grad_logprobs_T = options
        logprobs_T = torch.empty(len(target_T), dtype=wide_dtype(hidden_TD.dtype), device=hidden_TD.device)
        lse_T, entropy_T = torch.empty_like(logprobs_T), torch.zeros_like(logprobs_T)
        inputs = (hidden_TD, weight_VD, bias_V)
        ctx.shape, ctx.temperature, ctx.totals = shape, temperature, None
        if grad_logprobs_T is not None and any(ctx.needs_input_grad):
            ctx.totals = _Totals(inputs, ctx.needs_input_grad, target_T, shape, temperature)
        ctx.chunks = _chunks(len(target_T), weight_VD)
        for rows in ctx.chunks:
            logits = _logits(hidden_TD[rows], weight_VD, bias_V, shape)
            scaled = logits if temperature == 1.0 else logits / temperature
            top = scaled.amax(-1, keepdim=True)
            chosen = scaled.gather(-1, target_T[rows, None])
            probs = exp(scaled - top)
            total = probs.sum(-1, keepdim=True)
            lse = top + total.log()
            lse_T[rows], logprobs_T[rows] = lse[:, 0], (chosen - lse)[:, 0]
            if want_entropy:
                # An impossible token adds 0 to the entropy; 0 * -inf would add nan.
                finite = scaled.clamp_min(torch.finfo(scaled.dtype).min)
                entropy_T[rows] = lse[:, 0] - torch.linalg.vecdot(probs, finite) / total[:, 0]
            if ctx.totals is not None and grad_logprobs_T is not None:
                ctx.totals.add(rows, probs.div_(total), logits, grad_logprobs_T[rows])
        if ctx.totals is None:
            ctx.save_for_backward(*inputs, target_T, lse_T)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        totals = ctx.totals
        if totals is None:
            hidden_TD, weight_VD, bias_V, target_T, lse_T = ctx.saved_tensors
            inputs = (hidden_TD, weight_VD, bias_V)
            totals = _Totals(inputs, ctx.needs_input_grad, target_T, ctx.shape, ctx.temperature)
            for rows in ctx.chunks:
                logits = _logits(hidden_TD[rows], weight_VD, bias_V, ctx.shape)
                probs = exp(logits / ctx.temperature - lse_T[rows, None])
                totals.add(rows, probs, logits, grad_T[rows])
        return *totals.gradients(), None, None


class _Totals:
    """Gradients of hidden states, matrix and bias, gathered chunk by chunk in float32 or wider."""

    def __init__(
        self, inputs: tuple[Tensor, Tensor, Tensor | None], needed: Sequence[bool], target_T: Tensor,
        shape: HeadShape, temperature: float,
    ) -> None:  # fmt: skip
        self.inputs, self.target_T, self.shape, self.temperature = inputs, target_T, shape, temperature
        hidden_TD, weight_VD, bias_V = inputs
        wide = wide_dtype(hidden_TD.dtype)
        self.hidden_TD = torch.empty_like(hidden_TD)
        self.weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needed[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and needed[2] else None

    def add(self, rows: slice, probs: Tensor, logits: Tensor, slope: Tensor) -> None:
        """Count a chunk whose log-probs have the gradient `slope`; `probs` are overwritten."""
        hidden = self.inputs[0][rows]
        # d logprob / d logit = (onehot - softmax) / temperature
        factor = (slope / self.temperature)[:, None].to(probs.dtype)
        change = probs.mul_(-factor).scatter_add_(-1, self.target_T[rows, None], factor)
        change = self.shape.chain(logits, change)
        if self.bias_V is not None:
            self.bias_V += change.sum(0)
        narrow = change.to(hidden.dtype)
        torch.mm(narrow, self.inputs[1], out=self.hidden_TD[rows])
        if self.weight_VD is not None and narrow.dtype == self.weight_VD.dtype:
            self.weight_VD.addmm_(narrow.T, hidden)
        elif self.weight_VD is not None:
            self.weight_VD += narrow.T @ hidden

    def gradients(self) -> tuple[Tensor | None, ...]:
        """In the type of the inputs."""
        found = (self.hidden_TD, self.weight_VD, self.bias_V)
        return tuple(
            None if total is None or x is None else total.to(x.dtype)
            for total, x in zip(found, self.inputs, strict=True)
        )


def chunked_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, *,
    shape: HeadShape = HeadShape(), temperature: float = 1.0, entropy: bool = False,
    grad_logprobs_T: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probs of `target_T` under `softmax(logits / temperature)` and, on request, the entropy (no gradient).

    Both are `[T]`, float32 or wider. Memory beside the inputs: one chunk of logits. `grad_logprobs_T` `[T]` promises
    that the gradient of the loss with respect to the log-probs will be just that, which saves a matmul with the matrix:
    what arrives in the backward pass is not looked at then.
    """
    if len(target_T) == 0:
        empty = wide(hidden_TD.sum(-1))
        return empty, empty.detach() if entropy else None
    options = (shape, temperature, entropy, grad_logprobs_T)
    logprobs_T, entropy_T = _ChunkedLogProbs.apply(hidden_TD, weight_VD, bias_V, target_T, options)  # type: ignore[no-untyped-call]
    return logprobs_T, entropy_T if entropy else None


def dense_logprobs(logits_TV: Tensor, target_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from whole logits `[T, V]`, by autograd: for heads that are more than one matmul, and as an oracle."""
    log_softmax = torch.log_softmax(wide(logits_TV) / temperature, -1)
    logprobs_T = log_softmax.gather(-1, target_T[:, None])[:, 0]
    with torch.no_grad():
        entropy_T = -(log_softmax.exp() * _finite(log_softmax)).sum(-1)
    return logprobs_T, entropy_T


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    if hidden.device.type != "cpu":
        return shape.apply(wide(torch.nn.functional.linear(hidden, weight, bias)))
    # The larger matrix from the left: the kernels of a CPU are a tenth to a fifth faster that way round.
    raw = torch.mm(weight, hidden.T) if bias is None else torch.addmm(bias[:, None], weight, hidden.T)
    return shape.apply(wide(raw.T))


def _finite(logits: Tensor) -> Tensor:
    # An impossible token adds 0 to the entropy; 0 * -inf would add nan.
    return logits.clamp_min(torch.finfo(logits.dtype).min)


def _chunks(rows: int, weight_VD: Tensor) -> Sequence[slice]:
    vocabulary = weight_VD.shape[0]
    size = max(16, max(_CHUNK_ELEMENTS, weight_VD.numel() // 4) // vocabulary)
    chunks = [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
    counting = counter.get()
    return chunks if counting is None else counting.rounds(chunks, lambda chunk: chunk.stop - chunk.start)
