"""From a job's names to reward models: those that it names, and the one that it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from groupwise.config import MODEL_PREFIX, TRAINED_REWARD_MODEL, Job
from groupwise.models.load import choose_device, choose_dtype
from groupwise.models.size import weight_bytes
from groupwise.reward_models.model import (
    Kind,
    RewardModel,
    Source,
    load_reward_model,
    new_reward_model,
    parameters_of,
)
from groupwise.reward_models.reward import ModelReward, ModelStepReward
from groupwise.reward_models.text import Tags
from groupwise.rewards.base import Reward
from groupwise.rewards.functions.load import load_reward
from groupwise.rewards.stepwise import StepReward, load_step_reward
from groupwise.wiring.python_objects import PythonObjects


@dataclass(frozen=True)
class ModelOptions:
    """How reward models are opened: where they compute, in what, `tag, right, wrong` of causal ones, and what day their
    templates are told it is."""

    device: str = "auto"
    dtype: str = "auto"
    step_tags: Sequence[str] | None = None
    trust_remote_code: bool = False
    date: str | None = None


def open_reward(
    spec: str | Callable[..., Any] | Reward, *, models: ModelOptions = ModelOptions(), **limits: Any
) -> Reward:  # fmt: skip
    """The reward that `spec` names: a reward model (`model:DIR`), or what `load_reward` takes, with its `limits`.

    Raises RewardError, or ModelError for a model, where it cannot be loaded.
    """
    if isinstance(spec, str) and spec.startswith(MODEL_PREFIX):
        return ModelReward(open_reward_model(spec, "outcome", models))
    return load_reward(spec, **limits)


def open_step_reward(
    spec: str | Callable[..., Any], *, models: ModelOptions = ModelOptions(), **limits: Any
) -> StepReward:  # fmt: skip
    """What scores steps by the name `spec`: a reward model (`model:DIR`), or what `load_step_reward` takes.

    Raises RewardError, or ModelError for a model, where it cannot be loaded.
    """
    if isinstance(spec, str) and spec.startswith(MODEL_PREFIX):
        return ModelStepReward(open_reward_model(spec, "process", models))
    return load_step_reward(spec, **limits)


def open_reward_model(spec: str, kind: Kind, options: ModelOptions) -> RewardModel:
    """The reward model that `model:DIR` names. Raises ModelError where it cannot be used."""
    source = Source(spec.removeprefix(MODEL_PREFIX), trust_remote_code=options.trust_remote_code, date=options.date)
    dtype = choose_dtype(options.dtype, choose_device(options.device))
    tags = Tags(*options.step_tags) if options.step_tags else None
    return load_reward_model(source, kind, device=options.device, dtype=dtype, tags=tags)


def reward_model_bytes(job: Job, policy: Source | int, trust_remote_code: bool, dtype: torch.dtype) -> dict[str, int]:
    """What a job's reward models hold on the policy's device; `policy` is where the policy comes from, or the number of
    its parameters where that is no folder. Raises ModelError."""
    section = job.reward
    if section.device not in (None, job.model.device):
        return {}
    named = [("outcome", name) for name in (*section.functions, *section.verifier)]
    named += [("process", name) for name in section.step_functions]
    found = {"reward models": 0, "reward model in training": 0}
    for kind, name in named:
        if name.startswith(MODEL_PREFIX):
            source = Source(name.removeprefix(MODEL_PREFIX), trust_remote_code=trust_remote_code)
            found["reward models"] += dtype.itemsize * parameters_of(source, kind)  # type: ignore[arg-type]
        if name == TRAINED_REWARD_MODEL:
            own = Source(job.reward_model.path or "", job.reward_model.revision, trust_remote_code)
            backbone = own if job.reward_model.path else policy
            count = backbone if isinstance(backbone, int) else parameters_of(backbone, kind)  # type: ignore[arg-type]
            found["reward model in training"] = sum(weight_bytes(count, dtype, reference=False).values())
    return found


def open_trained(job: Job, policy: str, objects: PythonObjects) -> RewardModel:
    """The reward model that a run trains, as it is before the first round; `policy` is where the policy comes from.

    Raises ModelError where its backbone has no such class, or where it has to be trained already and is not.
    """
    section = job.reward_model
    revision = job.model.revision if section.path is None else section.revision
    return new_reward_model(
        Source(section.path or policy, revision, objects.trust_remote_code, job.data.date),
        "outcome" if TRAINED_REWARD_MODEL in job.reward.functions else "process",
        seed=job.seed, device=job.reward.device or job.model.device, has_head=section.first_prompts == 0,
    )  # fmt: skip
