"""From the sections of a job to the settings of what runs it: pure, so that nothing has to be loaded for it."""

from __future__ import annotations

from typing import Any

import torch

from groupwise.config import TRAINED_REWARD_MODEL, Job
from groupwise.learn.learner import LearnerSettings
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.objective import PRESETS, Objective, objective_named
from groupwise.reward_models.learner import RewardLearnerSettings
from groupwise.types import Sampling

BUDGET = 16384
"""Tokens of a micro-batch where memory is no question: more would take memory and no less time."""


def objective_of(job: Job) -> Objective:
    """The job's preset with the job's changes. Raises ObjectiveError where they cannot go together."""
    section = job.objective
    given = (
        "baseline", "ratio", "surrogate", "weights", "epsilon", "epsilon_high", "beta", "kl", "dual_clip",
        "sapo_temperature_pos", "sapo_temperature_neg",
    )  # fmt: skip
    changes: dict[str, Any] = {name: value for name in given if (value := getattr(section, name)) is not None}
    preset = PRESETS[section.preset]
    if section.epsilon is not None and preset.epsilon == preset.epsilon_high:
        changes.setdefault("epsilon_high", section.epsilon)
    changes |= {name: value for name in ("step_return", "step_normalization") if (value := getattr(section, name))}
    for name, functions in (("outcome", job.reward.functions), ("process", job.reward.step_functions)):
        given_weight = getattr(section, f"{name}_weight")
        changes[f"{name}_weight"] = float(bool(functions)) if given_weight is None else given_weight
    if section.scale_rewards is not None:
        changes["scale"] = section.scale_rewards
    if section.importance_sampling != "none":
        changes |= {
            "importance_sampling": section.importance_sampling,
            "importance_sampling_cap": section.importance_sampling_cap,
        }
    return objective_named(section.preset, max_completion_length=job.sampling.max_completion_length, **changes)


def total_steps(job: Job) -> int:
    """Steps of all outer iterations."""
    return job.train.iterations * job.train.steps


def sampling_of(job: Job) -> Sampling:
    """How training outputs are drawn."""
    section = job.sampling
    return Sampling(temperature=section.temperature, max_tokens=section.max_completion_length, stop=tuple(section.stop))


def eval_sampling_of(job: Job) -> Sampling:
    """How held-out outputs are drawn: settings of their own."""
    section = job.eval
    return Sampling(
        temperature=section.temperature, top_p=section.top_p, top_k=section.top_k, stop=tuple(job.sampling.stop),
        max_tokens=section.max_completion_length or job.sampling.max_completion_length,
    )  # fmt: skip


def memory_settings(job: Job) -> tuple[int, bool]:
    """A job's token budget, and whether layers are computed twice: where it names none, as if there were room."""
    budget = job.train.tokens_per_micro_batch or max(BUDGET, job.sampling.max_completion_length)
    return budget, bool(job.model.gradient_checkpointing)


def learner_settings(job: Job, compute_dtype: torch.dtype) -> LearnerSettings:
    """How the learner works for this job."""
    section = job.train
    optimizer = OptimizerSettings(
        learning_rate=section.learning_rate,
        total_updates=total_steps(job) * section.num_iterations * section.updates_per_batch,
        lr_scheduler_type=section.lr_scheduler_type, warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay, adam_beta1=section.adam_beta1, adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon, max_grad_norm=section.max_grad_norm,
    )  # fmt: skip
    return LearnerSettings(
        optimizer=optimizer, temperature=job.sampling.temperature, num_iterations=section.num_iterations,
        updates_per_batch=section.updates_per_batch, tokens_per_micro_batch=memory_settings(job)[0],
        mask_truncated=job.objective.mask_truncated_completions,
        correct_sampler=job.objective.importance_sampling != "none", compute_dtype=compute_dtype, seed=job.seed,
    )  # fmt: skip


def trains_reward_model(job: Job) -> bool:
    """Whether the run trains a reward model of its own."""
    return TRAINED_REWARD_MODEL in (*job.reward.functions, *job.reward.step_functions)


def reward_learner_settings(job: Job, compute_dtype: torch.dtype) -> RewardLearnerSettings:
    """How the reward model that the run trains is trained in each of its rounds."""
    section = job.reward_model
    optimizer = OptimizerSettings(section.learning_rate, total_updates=1, warmup_steps=section.warmup_steps)
    return RewardLearnerSettings(
        optimizer=optimizer, batch_size=section.batch_size, epochs=section.epochs,
        tokens_per_micro_batch=memory_settings(job)[0], compute_dtype=compute_dtype, seed=job.seed,
    )  # fmt: skip
