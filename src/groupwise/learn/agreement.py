"""Whether sampler and trainer compute the same log-probs, judged before an update is made from them.

Both compute the same function of the same weights in two ways (cache or whole rows, one order of sums or another), so
they differ by rounding. More than that means that outputs are drawn from another distribution than the one that is
trained: every ratio, advantage and KL would be of a model that nobody has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from groupwise.errors import ModelError
from groupwise.models.policy import Policy

FEW = 32
"""Fewer tokens are judged as if there were so many, the others without a difference: one of them proves little."""
SHARE = 0.1
"""More than this share of tokens beyond `Bounds.stray` is no rounding."""


@dataclass(frozen=True)
class Bounds:
    """What rounding may do to log-probs, in nats.

    `mean` and `token` (the worst one) are what a sound model keeps to: beyond them it is said. A mean beyond
    `far_mean`, or a `SHARE` of tokens that are off by more than `stray`, is another distribution.
    """

    mean: float
    token: float
    far_mean: float
    stray: float


FLOAT64 = Bounds(mean=1e-5, token=1e-4, far_mean=1e-3, stray=1e-3)
"""52 bits, but transformers computes norms and rotations in float32 whatever the type: a rounding of 6e-8 that falls
on either side, made larger by tens of layers."""
FLOAT32 = Bounds(mean=1e-4, token=1e-3, far_mean=1e-2, stray=2e-2)
"""24 bits: a logit of 30 is known to 30 * 2**-24 = 2e-6, and sums over some thousand terms in tens of layers, taken in
another order, differ by about a hundred such roundings: 2e-4. Five times that for the worst of many tokens, half of it
on average. A wrong mask, position or factor moves most tokens by 0.1 and more."""
FLOAT16 = Bounds(mean=0.01, token=0.25, far_mean=0.1, stray=0.25)
"""11 bits: as bfloat16, eight times finer; a router's ties (see there) give way to less rounding just the same, so what
ends a run is no eighth of that."""
BFLOAT16 = Bounds(mean=0.05, token=1.0, far_mean=0.3, stray=1.0)
"""8 bits: a logit between 16 and 32 is a multiple of 1/8, so that the head alone moves a log-prob by 1/16, and two
passes apart by 1/8; hidden states, rounded in tens of layers, add a few times that for the worst token. Most logits
that matter are smaller: on average a tenth. Where a router chooses experts a tie may fall otherwise, which moves single
tokens by a nat and more: so a run ends for a mean of six times that, or for many such tokens, never for one."""


def bounds(dtype: torch.dtype) -> Bounds:
    """The bounds for what is computed in `dtype`."""
    by_dtype = {torch.float64: FLOAT64, torch.float32: FLOAT32, torch.float16: FLOAT16}
    return by_dtype.get(dtype, BFLOAT16)


class Difference(NamedTuple):
    """How far sampled log-probs are from recomputed ones, in nats, over `tokens` tokens.

    `stray` is the share of them that are off by more than `Bounds.stray`.
    """

    tokens: int
    mean: float
    worst: float
    stray: float

    @classmethod
    def of(cls, difference_T: Tensor, dtype: torch.dtype) -> Difference:
        """Of the distances `[T]` of single tokens, computed in `dtype`."""
        if not len(difference_T):
            return cls(0, 0.0, 0.0, 0.0)
        far_T = is_stray(difference_T, dtype)
        return cls(len(difference_T), *torch.stack([
            difference_T.double().mean(), difference_T.double().max(), far_T.double().mean()
        ]).tolist())  # fmt: skip


def is_stray(difference_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Which tokens are off by more than `Bounds.stray`, `[T]`; what is not a number is."""
    return ~(difference_T <= bounds(dtype).stray)


class Guard:
    """Ends a run whose sampler and trainer disagree, and warns once where they differ by more than they should.

    `corrected` says that the job weighs the loss by old / sampled log-probs, so that a sampler which differs is meant:
    it is said and nothing more. Both policies' class and layout are named.
    """

    def __init__(self, policy: Policy, warn: Callable[[str], None], *, corrected: bool = False) -> None:
        self.policy, self.warn, self.corrected = policy, warn, corrected
        self._warned = False

    def check(self, found: Difference, where: str) -> None:
        """Judge what was found, in words for `where`. Raises ModelError where sampler and trainer disagree."""
        allowed = bounds(self.policy.dtype)
        if not found.tokens:
            return
        weight = found.tokens / max(found.tokens, FEW)
        far = not (found.mean * weight <= allowed.far_mean and found.stray * weight <= SHARE)
        if far and not self.corrected:
            raise ModelError(f"Sampler and trainer disagree: {self._words(found, where)} {self._advice()}")
        if (far or found.mean * weight > allowed.mean or found.worst > allowed.token) and not self._warned:
            self._warned = True
            self.warn(f"sampler and trainer are further apart than rounding explains: {self._words(found, where)}")

    def _words(self, found: Difference, where: str) -> str:
        policy, allowed = self.policy, bounds(self.policy.dtype)
        dtype = str(policy.dtype).removeprefix("torch.")
        decoding = "" if policy.layout == "shared" else f", {'its own cache' if policy.cached else 'no cache'}"
        return (
            f"{where}, log-probs of {found.tokens:,} sampled tokens are recomputed {found.mean:.2g} nats apart on "
            f"average and {found.worst:.2g} at worst, {found.stray:.0%} of them by more than {allowed.stray:g}; in "
            f"{dtype} a mean of {allowed.mean:g} is usual. The model is a {type(policy.model).__name__} in the "
            f"{policy.layout} layout{decoding}."
        )

    def _advice(self) -> str:
        other = "set model.layout to 'plain'" if self.policy.layout == "shared" else "take a model of another class"
        narrow = " or model.dtype to 'float32'" if self.policy.dtype.itemsize < torch.float32.itemsize else ""
        return (
            "Nothing was learned from these outputs: training on them would be of another distribution than the one "
            f"that wrote them. Look with `groupwise doctor`, {other}{narrow}, and please report this model. Where the "
            "sampler is meant to differ, objective.importance_sampling corrects for it."
        )


class NoGuard:
    """Stands where nothing was sampled by an engine: sampled log-probs mean nothing there."""

    def check(self, found: Difference, where: str) -> None:
        """Never judged."""
