"""The objective as a value: one field per independent choice, and the named algorithms as values of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal, get_args

from groupwise.errors import ObjectiveError

Baseline = Literal["group_mean", "leave_one_out", "batch_mean"]
Scale = Literal["group", "batch", "none"]
Ratio = Literal["token", "sequence_mean", "sequence_product"]
Surrogate = Literal["clip", "cispo", "sapo"]
Weights = Literal["sequence_mean", "sequence_sum", "token_mean", "constant_length"]
KL = Literal["k1_in_reward", "k2", "k3", "k3_unbiased"]
StepReturn = Literal["sum", "mean"]
StepNormalization = Literal["group", "index"]
ImportanceSampling = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "baseline": get_args(Baseline),
        "scale": get_args(Scale),
        "step_return": get_args(StepReturn),
        "step_normalization": get_args(StepNormalization),
        "ratio": get_args(Ratio),
        "surrogate": get_args(Surrogate),
        "weights": get_args(Weights),
        "kl": get_args(KL),
        "importance_sampling": get_args(ImportanceSampling),
    }
)
_NOT_NEGATIVE = (
    "scale_eps", "outcome_weight", "process_weight", "epsilon", "epsilon_high", "beta", "importance_sampling_floor",
)  # fmt: skip
_POSITIVE = ("sapo_temperature_pos", "sapo_temperature_neg", "importance_sampling_cap")
_BOUNDS_OF: Mapping[Surrogate, frozenset[str]] = {
    "clip": frozenset({"epsilon", "epsilon_high", "dual_clip"}),
    "cispo": frozenset({"epsilon_high"}),
    "sapo": frozenset({"sapo_temperature_pos", "sapo_temperature_neg"}),
}


def check_choice(what: str, value: str, known: Collection[str]) -> None:
    """Raise ObjectiveError unless `value` is one of `known`; the message names the nearest."""
    if value in known:
        return
    nearest = get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ObjectiveError(f"{what} {value!r} is not known: {hint}Choose one of {', '.join(sorted(known))}.")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ObjectiveError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is maximised: one value per independent choice. The defaults are GRPO without a KL penalty.

    Change a preset with `dataclasses.replace(PRESETS["grpo"], beta=0.0)`. Raises ObjectiveError for a value that is
    not known, out of range, or cannot go with another.
    """

    baseline: Baseline = "group_mean"
    """What a reward is compared with. `leave_one_out`: the mean of the group's other scored outputs."""
    scale: Scale = "group"
    """What the difference is divided by: the sample std of the group or of the batch, or nothing."""
    scale_eps: float = 1e-4
    """Added to that std."""
    outcome_weight: float = 1.0
    """Times the advantages of outputs' rewards."""
    process_weight: float = 0.0
    """Times the advantages of steps' rewards; both weights together are how credit is spread over an output."""
    step_return: StepReturn = "sum"
    """What a token is given of the steps that end at it or later: the sum of their normalised rewards, or the mean."""
    step_normalization: StepNormalization = "group"
    """What a step's reward is compared with: all steps of the group, or those of the same number in their outputs."""
    ratio: Ratio = "token"
    """Policy now / policy that sampled: per token, or per output as the geometric mean or the product of its tokens."""
    surrogate: Surrogate = "clip"
    """How the ratio meets the advantage: hard clip (PPO), capped and detached weight (CISPO), soft gate (SAPO)."""
    epsilon: float = 0.2
    """Lower clip range of `clip`; `inf` turns it off."""
    epsilon_high: float = 0.2
    """Upper clip range of `clip` (`inf` turns it off); for `cispo`, the cap of the ratio itself."""
    dual_clip: float | None = None
    """With `clip`: where A < 0, a token's loss is at most this times |A|."""
    sapo_temperature_pos: float = 1.0
    """Steepness of the soft gate where A > 0."""
    sapo_temperature_neg: float = 1.05
    """Steepness of the soft gate elsewhere."""
    weights: Weights = "sequence_mean"
    """How tokens are averaged over the update."""
    max_completion_length: int | None = None
    """Tokens that `constant_length` divides by; nothing else reads it."""
    kl: KL = "k3"
    """Estimator of the divergence from the reference; read only when `beta` > 0."""
    beta: float = 0.0
    """Weight of the KL penalty; 0 needs no reference."""
    importance_sampling: ImportanceSampling = "token_truncate"
    """Correction for a sampler that differs from the old policy, applied when its log-probs are given; or `none`."""
    importance_sampling_cap: float = 3.0
    """Largest correction: above it truncated (`*_truncate`) or zeroed (`*_mask`)."""
    importance_sampling_floor: float = 0.0
    """Smallest correction: below it raised (`*_truncate`) or zeroed (`*_mask`)."""

    def __post_init__(self) -> None:
        if self.kl == "k1":  # type: ignore[comparison-overlap]  # what a caller without a type checker may write
            raise ObjectiveError(
                "kl 'k1' cannot be a loss: its expected gradient is zero, so it would only add noise. "
                "Use 'k1_in_reward' for the same estimator as a penalty in the reward, or 'k2', 'k3', 'k3_unbiased'."
            )
        for name, known in CHOICES.items():
            check_choice(name, getattr(self, name), known)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in _NOT_NEGATIVE:
            _check(getattr(self, name) >= 0, f"{name} must be at least 0, found {getattr(self, name)}.")
        for name in _POSITIVE:
            _check(getattr(self, name) > 0, f"{name} must be above 0, found {getattr(self, name)}.")
        weights = (self.outcome_weight, self.process_weight)
        _check(any(weights), "outcome_weight and process_weight are both 0: every advantage would be 0.")
        dual, length = self.dual_clip, self.max_completion_length
        _check(dual is None or dual > 1, f"dual_clip must be above 1, found {dual}.")
        _check(length is None or length >= 1, f"max_completion_length must be at least 1, found {length}.")
        _check(
            self.surrogate != "cispo" or self.epsilon_high >= 1,
            f"epsilon_high of 'cispo' caps the ratio itself and must be at least 1, found {self.epsilon_high}.",
        )
        _check(
            self.baseline != "batch_mean" or self.scale != "group",
            "baseline 'batch_mean' cannot go with scale 'group': a group of equal rewards has std 0 but lies off the "
            "batch's mean. Use scale 'batch' or 'none'.",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether a reference policy's log-probs are needed anywhere."""
        return self.beta > 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether rewards are lowered by `beta * sum_t (old - ref)` before credit."""
        return self.needs_reference and self.kl == "k1_in_reward"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term, and so needs `ref_logprobs_T`."""
        return self.needs_reference and not self.kl_in_reward

    @property
    def may_skip_zero_advantages(self) -> bool:
        """Whether an output whose every token advantage is 0 has exactly no gradient, so that its forward may be
        skipped. Its tokens stay in every denominator, so weights are computed before anything is left out."""
        return not self.kl_in_loss

    @property
    def ignored_fields(self) -> frozenset[str]:
        """Names of the fields that this combination never reads: setting one of them would change nothing."""
        ignored = frozenset().union(*_BOUNDS_OF.values()) - _BOUNDS_OF[self.surrogate]
        ignored |= frozenset() if self.weights == "constant_length" else {"max_completion_length"}
        ignored |= frozenset() if self.needs_reference else {"kl"}
        ignored |= frozenset() if self.process_weight else {"step_return", "step_normalization"}
        return ignored | (frozenset({"scale_eps"}) if self.scale == "none" else frozenset())


_GRPO = Objective(kl="k3", beta=0.04)
_RLOO = Objective(
    baseline="leave_one_out",
    scale="none",
    ratio="sequence_product",
    weights="sequence_sum",
    kl="k1_in_reward",
    beta=0.05,
)
PRESETS: Mapping[str, Objective] = MappingProxyType(
    {
        "grpo": _GRPO,
        "deepseekmath": _GRPO,
        "dr_grpo": Objective(scale="none", weights="constant_length"),
        "dapo": Objective(epsilon_high=0.28, weights="token_mean"),
        "gspo": Objective(ratio="sequence_mean", epsilon=3e-4, epsilon_high=4e-4),
        "cispo": Objective(surrogate="cispo", epsilon_high=5.0, weights="token_mean"),
        "sapo": Objective(surrogate="sapo"),
        "rloo": _RLOO,
    }
)
"""The named algorithms. `dr_grpo` still needs its `max_completion_length`: `objective_named` gives it one."""


def objective_named(preset: str | Objective, **changes: object) -> Objective:
    """An objective by its preset's name, with fields changed; an Objective passes through.

    `objective_named("dr_grpo", max_completion_length=256)`. Raises ObjectiveError for an unknown preset or field.
    """
    if isinstance(preset, str):
        check_choice("preset", preset, PRESETS)
        preset = PRESETS[preset]
    for field in changes:
        check_choice("objective field", field, Objective.__dataclass_fields__)
    return replace(preset, **changes)  # type: ignore[arg-type]  # __post_init__ checks every value
