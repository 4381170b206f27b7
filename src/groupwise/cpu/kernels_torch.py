"""What the compiled kernels compute, in torch's operations: for tensors that C cannot read.

Sums are in float32 or wider, results in the type of what comes in. Shapes are those of the methods of `Kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from groupwise.precision import wide

if TYPE_CHECKING:
    from groupwise.cpu.kernels import KeyRange, Pair


def norm(x: Tensor, weight: Tensor, epsilon: float, factor: Tensor | None = None) -> Tensor:
    """RMSNorm; one over the root is put into `factor` where that is given."""
    broad = wide(x)
    root = (broad.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    if factor is not None:
        factor.copy_(root)
    return (broad * root).to(x.dtype) * weight


def norm_back(x: Tensor, weight: Tensor, factor: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of `weight`."""
    broad, back, root = wide(x), wide(grad), wide(factor)
    of_weight = (back * broad * root).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    scaled = back * weight
    along = (scaled * broad).mean(-1, keepdim=True)
    return (scaled * root - broad * along * root**3).to(x.dtype), of_weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return nn.functional.silu(gate) * up


def swiglu_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` and `up`."""
    part = gate.sigmoid()
    return grad * up * part * (1 + gate * (1 - part)), grad * gate * part


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor, out: Tensor) -> Tensor:
    """Every head rotated, into `out`, which may be `x`."""
    return out.copy_(x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin)


def softmax_numerator_(scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`exp(scores + bias - top)` in place; returns `top` and the sums."""
    if bias is not None:
        scores.add_(bias)
    top = scores.amax(-1).clamp_min(-1e30)  # where all is hidden weights are 0
    scores.sub_(top[..., None]).exp_()
    return top, scores.sum(-1)


def softmax_numerator_back_(scores: Tensor, bias: Tensor | None, change: Tensor, lse: Tensor, delta: Tensor) -> None:
    """`exp(scores + bias - lse)` in place, and `(change - delta)` times that in place of `change`."""
    if bias is not None:
        scores.add_(bias)
    scores.sub_(lse.view(scores.shape[:3])[..., None]).exp_()
    back = change.view(scores.shape)
    back.sub_(delta.view(scores.shape[:3])[..., None]).mul_(scores)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, looks: Sequence[KeyRange], stores: Sequence[Pair]
) -> Tensor:  # fmt: skip
    """New keys and values at the end of the last part, then attention over all parts under one softmax."""
    row_R = torch.arange(len(query), device=query.device)
    scores, values = [], []
    shared = query.shape[1] // key.shape[1]
    for number, (look, (stored_keys, stored_values)) in enumerate(zip(looks, stores, strict=True)):
        slot_R = row_R if look.slot_R is None else look.slot_R
        if number == len(stores) - 1:
            stored_keys[slot_R, :, look.end_R - 1] = key
            stored_values[slot_R, :, look.end_R - 1] = value
        column = torch.arange(stored_keys.shape[2], device=query.device)
        seen = column < look.end_R[:, None]
        if look.first_R is not None:
            seen &= column >= look.first_R[:, None]
        keys, found = (wide(stored[slot_R]).repeat_interleave(shared, 1) for stored in (stored_keys, stored_values))
        scored = torch.einsum("rhd,rhkd->rhk", wide(query), keys) * scale
        scores.append(scored.masked_fill(~seen[:, None], float("-inf")))
        values.append(found)
    weights = torch.cat(scores, -1).softmax(-1)
    return torch.einsum("rhk,rhkd->rhd", weights, torch.cat(values, 2)).to(query.dtype)
