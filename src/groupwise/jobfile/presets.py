"""What a preset says of the keys of `[objective]`, so that a job can show and keep it without torch being imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from groupwise.config import Job

_CLIP: Final = {"beta": 0.0, "kl": "k3", "epsilon": 0.2, "epsilon_high": 0.2, "scale_rewards": "group"}
_GRPO: Final = _CLIP | {"beta": 0.04}

VALUES: Final[Mapping[str, Mapping[str, Any]]] = {
    "grpo": _GRPO,
    "deepseekmath": _GRPO,
    "dr_grpo": _CLIP | {"scale_rewards": "none"},
    "dapo": _CLIP | {"epsilon_high": 0.28},
    "gspo": _CLIP | {"epsilon": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"beta": 0.0, "kl": "k3", "epsilon_high": 5.0, "scale_rewards": "group"},
    "sapo": {"beta": 0.0, "kl": "k3", "scale_rewards": "group"},
    "rloo": _CLIP | {"beta": 0.05, "kl": "k1_in_reward", "scale_rewards": "none"},
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
