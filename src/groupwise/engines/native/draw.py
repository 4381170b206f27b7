"""Drawing tokens: counter-based uniforms, filters of the distribution, and the inverse of its cumulative sum.

Token `t` of an output with seed `s` draws the uniform `hash(s, t)`: nothing else that runs can change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from groupwise.precision import exp
from groupwise.types import Sampling

_BLOCK = 512


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# SplitMix64's constants (Steele, Lea and Flood 2014), as signed 64-bit integers: products wrap as they should.
_GOLDEN, _MIX_1, _MIX_2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # `>>` keeps the sign; the mask makes it logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seed_R: Tensor, index_R: Tensor) -> Tensor:
    """One number in (0, 1) per row, float64 `[R]`, a function of the row's seed and token index (both int64) only.

    Both may have further dimensions, which broadcast.
    """
    bits = _mix(_mix(seed_R + _GOLDEN) + (index_R + 1) * _GOLDEN)
    # 52 bits and a half are exact in float64: the largest is less than 1.
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


class Filters(NamedTuple):
    """The sampling settings of the live rows, as `[R]` tensors, and which of them any row asks for."""

    temperature_R: Tensor
    top_p_R: Tensor
    top_k_R: Tensor
    min_p_R: Tensor
    tempered: bool
    greedy: bool
    cut: bool

    @classmethod
    def of(cls, settings: Sequence[Sampling], device: torch.device) -> Filters:
        """One row per entry of `settings`."""
        columns = [[s.temperature for s in settings], [s.top_p for s in settings]]
        columns += [[float(s.top_k) for s in settings], [s.min_p for s in settings]]
        temperature, top_p, top_k, min_p = torch.tensor(columns, dtype=torch.float32, device=device).unbind(0)
        return cls(
            temperature, top_p, top_k, min_p,
            tempered=any(s.temperature not in (0, 1) for s in settings),
            greedy=any(s.temperature == 0 for s in settings),
            cut=any(s.top_p < 1 or s.top_k > 0 or s.min_p > 0 for s in settings),
        )  # fmt: skip


def draw(logits_RV: Tensor, uniform_R: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Tokens `[R]` and their log-probs `[R]` under the distribution that was sampled. `logits_RV` is overwritten.

    Temperature 0 takes the likeliest token; its log-prob is that at temperature 1.
    """
    if filters.tempered:
        logits_RV.div_(torch.where(filters.temperature_R == 0, 1.0, filters.temperature_R)[:, None])
    if filters.cut:
        logits_RV = cut(logits_RV, filters)
    # Each pass over the vocabulary counts: the largest logit is taken out of all, and the sum serves the draw as well.
    relative = logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
    token_R, total_R = inverse_cdf(exp(relative), uniform_R)
    if filters.greedy:
        token_R = torch.where(filters.temperature_R == 0, relative.argmax(-1), token_R)
    return token_R, relative.gather(-1, token_R[:, None])[:, 0] - total_R.log().to(relative.dtype)


def cut(scaled_RV: Tensor, filters: Filters) -> Tensor:
    """The logits, `-inf` where a token is cut: the top k stay, of them the smallest set that holds top p, and of that
    what has min p of the likeliest's probability."""
    ordered, order = scaled_RV.sort(dim=-1, descending=True, stable=True)
    probs = torch.softmax(ordered, -1)
    rank = torch.arange(scaled_RV.shape[-1], device=scaled_RV.device)
    top_k = torch.where(filters.top_k_R > 0, filters.top_k_R, float(scaled_RV.shape[-1]))
    keep = rank < top_k[:, None]
    probs = probs * keep
    probs = probs / probs.sum(-1, keepdim=True)
    # Rounding takes the sum above 1 before the last token: 1 means "all", not "all that lie below 1".
    keep &= (probs.cumsum(-1) - probs < filters.top_p_R[:, None]) | (filters.top_p_R >= 1)[:, None]
    keep &= probs >= filters.min_p_R[:, None] * probs[:, :1]
    ordered = ordered.masked_fill(~keep, float("-inf"))
    return torch.empty_like(scaled_RV).scatter_(-1, order, ordered)


def inverse_cdf(weights_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """The token whose interval of the cumulative weights holds the row's uniform, `[R]`, and their sum, float64 `[R]`.

    Weights need not sum to 1. Two levels (blocks, then tokens of one block) keep the sums short: exact where one long
    float32 sum is not, and the vocabulary is read once. A token of weight 0 is never drawn.
    """
    rows, vocabulary = weights_RV.shape
    if vocabulary <= _BLOCK:
        upper = weights_RV.double().cumsum(-1)
        goal_R1 = _below(uniform_R[:, None] * upper[:, -1:], upper[:, -1:])
        return _first_above(upper, goal_R1)[:, 0], upper[:, -1]
    padded = torch.nn.functional.pad(weights_RV, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    block_RB = padded.sum(-1).double()
    upper_RB = block_RB.cumsum(-1)
    total_R1 = upper_RB[:, -1:]
    goal_R1 = _below(uniform_R[:, None] * total_R1, total_R1)
    block_R1 = _first_above(upper_RB, goal_R1)
    inside = padded.gather(1, block_R1[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double()
    upper = inside.cumsum(-1)
    # Rounding may push the rest outside the block's own sum: stay on its first or last possible token.
    rest = _below((goal_R1 - (upper_RB - block_RB).gather(1, block_R1)).clamp_min(0), upper[:, -1:])
    # Where weights are nan any token is as wrong as another, but it has to be one: the caller sees its log-prob.
    token_R = (block_R1 * _BLOCK + _first_above(upper, rest))[:, 0].clamp_max(vocabulary - 1)
    return token_R, total_R1[:, 0]


def _below(goal: Tensor, total: Tensor) -> Tensor:
    return torch.minimum(goal, torch.nextafter(total, torch.zeros_like(total)))


def _first_above(upper: Tensor, goal: Tensor) -> Tensor:
    """Index of the first entry of a rising row that exceeds the goal, `[R, 1]`; some entry has to."""
    return torch.searchsorted(upper, goal, right=True).clamp_max(upper.shape[-1] - 1)
