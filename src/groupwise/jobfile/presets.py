"""What a preset says of the keys of `[objective]`, so that a job can show and keep it without torch being imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from groupwise.config import Job

_PPO: Final = {
    "baseline": "group_mean", "ratio": "token", "surrogate": "clip", "weights": "sequence_mean",
    "beta": 0.0, "kl": "k3", "epsilon": 0.2, "epsilon_high": 0.2, "scale_rewards": "group",
}  # fmt: skip
_GRPO: Final = _PPO | {"beta": 0.04}
_RLOO: Final = {
    "baseline": "leave_one_out", "scale_rewards": "none", "ratio": "sequence_product", "weights": "sequence_sum",
    "kl": "k1_in_reward", "beta": 0.05,
}  # fmt: skip
_GATE: Final = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
_BOUNDS: Final[Mapping[str, tuple[str, ...]]] = {
    "clip": ("epsilon", "epsilon_high"), "cispo": ("epsilon_high",), "sapo": tuple(_GATE),
}  # fmt: skip


def _of(surrogate: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with those bounds that a surrogate reads."""
    others = {name for names in _BOUNDS.values() for name in names} - set(_BOUNDS[surrogate])
    return {name: value for name, value in values.items() if name not in others} | {"surrogate": surrogate}


VALUES: Final[Mapping[str, Mapping[str, Any]]] = {
    "grpo": _GRPO,
    "deepseekmath": _GRPO,
    "dr_grpo": _PPO | {"scale_rewards": "none", "weights": "constant_length"},
    "dapo": _PPO | {"epsilon_high": 0.28, "weights": "token_mean"},
    "gspo": _PPO | {"ratio": "sequence_mean", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": _of("cispo", _PPO | {"epsilon_high": 5.0, "weights": "token_mean"}),
    "sapo": _of("sapo", _PPO | _GATE),
    "rloo": _PPO | _RLOO,
}
"""By preset, what its objective reads of this section: the values of `groupwise.objective.PRESETS`, as a test holds."""
STEPS: Final[Mapping[str, Any]] = {"step_return": "sum", "step_normalization": "group"}
"""What every preset says of steps, where they are scored and count."""


def filled(job: Job, origins: Mapping[str, str]) -> tuple[Job, dict[str, str]]:
    """A job with what its preset says written out, and the origins with it; a key that is not read stays open."""
    section = job.objective
    said: dict[str, Any] = dict(VALUES[section.preset])
    if section.epsilon is not None and said.get("epsilon") == said.get("epsilon_high"):
        said["epsilon_high"] = section.epsilon
    if section.surrogate is not None:
        said = _of(section.surrogate, _GATE | said)
    if not (said["beta"] if section.beta is None else section.beta):
        del said["kl"]
    if job.reward.step_functions and section.process_weight != 0:
        said.update(STEPS)
    new = {name: value for name, value in said.items() if getattr(section, name) is None}
    found = dict(origins) | {f"objective.{name}": f"preset {section.preset}" for name in new}
    if new.get("epsilon_high") is not None and new["epsilon_high"] == section.epsilon:
        found["objective.epsilon_high"] = origins["objective.epsilon"]
    return job.model_copy(update={"objective": section.model_copy(update=new)}), found


def is_of(preset: Any, key: str, value: Any) -> bool:
    """Whether a value is what a preset says anyway, so that it goes where the preset is exchanged."""
    section, _, name = key.rpartition(".")
    known = {**STEPS, **VALUES.get(preset, {})} if isinstance(preset, str) else {}
    return section == "objective" and name in known and known[name] == value
