"""Drawing tokens: counter-based uniforms, filters of the distribution, and the inverse of its cumulative sum.

Token `t` of an output with seed `s` draws the uniform `hash(s, t)`: nothing else that runs can change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
    """One number in (0, 1) per row, float64 `[R]`, a function of the row's seed and token index (both int64) only."""
    bits = _mix(_mix(seed_R + _GOLDEN) + (index_R + 1) * _GOLDEN)
    # 52 bits and a half are exact in float64: the largest is less than 1.
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


class Filters(NamedTuple):
    """The sampling settings of the live rows, as `[R]` tensors."""

    temperature_R: Tensor
    top_p_R: Tensor
    top_k_R: Tensor
    min_p_R: Tensor

    @classmethod
    def of(cls, settings: Sequence[Sampling], device: torch.device) -> Filters:
        """One row per entry of `settings`."""
        columns = [[s.temperature for s in settings], [s.top_p for s in settings]]
        columns += [[float(s.top_k) for s in settings], [s.min_p for s in settings]]
        return cls(*torch.tensor(columns, dtype=torch.float32, device=device).unbind(0))

    @property
    def cut_support(self) -> bool:
        """Whether any row drops tokens from the distribution."""
        return bool((self.top_p_R < 1).any() or (self.top_k_R > 0).any() or (self.min_p_R > 0).any())


def draw(logits_RV: Tensor, uniform_R: Tensor, filters: Filters, cut_support: bool) -> tuple[Tensor, Tensor]:
    """Tokens `[R]` and their log-probs `[R]` under the distribution that was sampled. `logits_RV` is overwritten.

    Temperature 0 takes the likeliest token; its log-prob is that at temperature 1.
    """
    greedy_R = filters.temperature_R == 0
    scaled = logits_RV.div_(torch.where(greedy_R, 1.0, filters.temperature_R)[:, None])
    if cut_support:
        scaled = _cut(scaled, filters)
    lse_R = torch.logsumexp(scaled, -1)
    token_R = inverse_cdf((scaled - lse_R[:, None]).exp_(), uniform_R)
    token_R = torch.where(greedy_R, scaled.argmax(-1), token_R)
    return token_R, scaled.gather(-1, token_R[:, None])[:, 0] - lse_R


def _cut(scaled_RV: Tensor, filters: Filters) -> Tensor:
    """Keep the top k, then the smallest set that holds top p, then what has min p of the likeliest's probability."""
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


def inverse_cdf(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token whose interval of the cumulative distribution holds the row's uniform, `[R]`.

    Two levels (blocks, then tokens of one block) keep the sums short: exact where one long float32 sum is not, and
    the vocabulary is read once. A token of probability 0 is never drawn.
    """
    rows, vocabulary = probs_RV.shape
    padded = torch.nn.functional.pad(probs_RV, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    block_RB = padded.sum(-1).double()
    upper_RB = block_RB.cumsum(-1)
    goal_R1 = _below(uniform_R[:, None] * upper_RB[:, -1:], upper_RB[:, -1:])
    block_R1 = _first_above(upper_RB, goal_R1)
    inside = padded.gather(1, block_R1[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double()
    upper = inside.cumsum(-1)
    # Rounding may push the rest outside the block's own sum: stay on its first or last possible token.
    rest = _below((goal_R1 - (upper_RB - block_RB).gather(1, block_R1)).clamp_min(0), upper[:, -1:])
    # Where probabilities are nan any token is as wrong as another, but it has to be one: the caller sees its log-prob.
    return (block_R1 * _BLOCK + _first_above(upper, rest))[:, 0].clamp_max(vocabulary - 1)


def _below(goal: Tensor, total: Tensor) -> Tensor:
    return torch.minimum(goal, torch.nextafter(total, torch.zeros_like(total)))


def _first_above(upper: Tensor, goal: Tensor) -> Tensor:
    """Index of the first entry of a rising row that exceeds the goal, `[R, 1]`; some entry has to."""
    return torch.searchsorted(upper, goal, right=True).clamp_max(upper.shape[-1] - 1)
