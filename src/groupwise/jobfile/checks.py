"""Combinations that cannot work, or in which a key would be without effect; each refused with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf

from groupwise.config import BUILTIN, EvalSection, Job, ObjectiveSection, SamplingSection, TrainSection
from groupwise.errors import ConfigError

REASONS = {
    ("objective.kl", "k1"): (
        "as a loss its expected gradient is zero, so it would hold nothing back. "
        'Take "k1_in_reward" (the same estimate as a penalty in the reward), or the default "k3".'
    ),
}
"""Values outside a knob's choices that people know from elsewhere, and why they are not offered."""

_WITHOUT_CLIP = {"cispo": ("epsilon", "dual_clip"), "sapo": ("epsilon", "epsilon_high", "dual_clip")}
_WITHOUT_KL = ("dr_grpo", "dapo", "gspo", "cispo", "sapo")
_DEFAULT_CAP = ObjectiveSection().importance_sampling_cap


def check(job: Job, origins: Mapping[str, str]) -> None:
    """Raise ConfigError with the first problem of the job."""
    for problem in problems(job, origins):
        raise ConfigError(problem)


def problems(job: Job, origins: Mapping[str, str]) -> Iterator[str]:
    """Every reason why this job cannot run as written, one sentence or two each."""
    yield from _sampling(job.sampling)
    yield from _objective(job.objective)
    yield from _reward(job, origins)
    yield from _data(job)
    yield from _train(job.train, job.sampling)
    yield from _eval(job)


def _sampling(sampling: SamplingSection) -> Iterator[str]:
    if sampling.num_generations == 1:
        yield (
            "`sampling.num_generations` = 1: an output is compared with the others of its group, and in a group of one "
            "there are none: every advantage would be 0. Take at least 2; 8 is usual."
        )
    if sampling.temperature == 0:
        yield (
            "`sampling.temperature` = 0: greedy outputs of one prompt are all the same, so there is nothing to "
            "compare. Train at 1, or anywhere above 0; `eval.temperature` may be 0."
        )
    for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("min_completion_length", 0)):
        if getattr(sampling, name) != off:
            yield (
                f"`sampling.{name}` = {getattr(sampling, name)}: training draws from the whole distribution. What "
                f"{name} cuts off would have to be remembered and left out of the log-probs of policy, old policy and "
                f"reference alike, which is not done yet; without it the ratios are biased. "
                f"Leave it at {off:g}; evaluation may use top_p and top_k."
            )


def _objective(objective: ObjectiveSection) -> Iterator[str]:
    preset = objective.preset
    for name in _WITHOUT_CLIP.get(preset, ()):
        if getattr(objective, name) is not None:
            yield f"`objective.{name}` has no effect with the preset `{preset}`, which does not clip so. Remove it."
    if preset == "cispo" and objective.epsilon_high is not None and objective.epsilon_high < 1:
        yield (
            f"`objective.epsilon_high` = {objective.epsilon_high:g}: with `cispo` this is the cap of the ratio, and "
            "below 1 it would cut the ratio of tokens whose probability did not change. The preset's cap is 5."
        )
    if objective.epsilon is not None and 1 <= objective.epsilon < inf:
        yield (
            f"`objective.epsilon` = {objective.epsilon:g}: ratios are clipped below 1 - epsilon, and none is below "
            "0, so it would never bind. Take less than 1 (0.2 is usual), or inf to turn it off."
        )
    if objective.kl is not None and objective.beta is None and preset in _WITHOUT_KL:
        yield (
            f'`objective.kl` = "{objective.kl}" has no effect: the preset `{preset}` has no KL penalty. '
            "Set `objective.beta` too (0.04 in the paper), or remove `kl`."
        )
    if objective.importance_sampling == "none" and objective.importance_sampling_cap != _DEFAULT_CAP:
        yield (
            f"`objective.importance_sampling_cap` = {objective.importance_sampling_cap:g} has no effect while "
            '`objective.importance_sampling` = "none".'
        )


def _reward(job: Job, origins: Mapping[str, str]) -> Iterator[str]:
    functions, weights = job.reward.functions, job.reward.weights
    nobody_said = origins["reward.functions"] == "default" or origins["reward.functions"].startswith("recipe ")
    if job.data.path != BUILTIN and BUILTIN in functions and nobody_said:
        yield (
            f'`data.path` = "{job.data.path}" needs a reward of its own: the built-in one checks sums. '
            'Name a function, as in --reward rewards.py:score or `functions = ["rewards.py:score"]` under [reward].'
        )
    for function in functions:
        if not all(function.partition(":")):
            yield (
                f'`reward.functions` has "{function}", which does not say where and what. '
                "Write file.py:name or package.module:name."
            )
    if weights is not None and len(weights) != len(functions):
        yield (
            f"`reward.weights` has {len(weights)} values for the functions {', '.join(functions)}. "
            "Give one weight to each."
        )


def _data(job: Job) -> Iterator[str]:
    given = (
        ("model", "revision", job.model.path, job.model.revision),
        ("data", "revision", job.data.path, job.data.revision),
        ("data", "subset", job.data.path, job.data.subset),
    )
    for section, name, path, value in given:
        if path == BUILTIN and value is not None:
            yield f'`{section}.{name}` = "{value}" has no effect on `{section}.path` = "{BUILTIN}". Remove it.'


def _train(train: TrainSection, sampling: SamplingSection) -> Iterator[str]:
    if train.updates_per_batch > train.prompts_per_step:
        yield (
            f"`train.updates_per_batch` = {train.updates_per_batch} is more than `train.prompts_per_step` = "
            f"{train.prompts_per_step}: each update takes whole groups, and there is one group per prompt."
        )
    updates = train.iterations * train.steps * train.num_iterations * train.updates_per_batch
    if train.warmup_steps > updates:
        yield (
            f"`train.warmup_steps` = {train.warmup_steps}: the job has {updates} updates in all, so the learning rate "
            "would never reach `train.learning_rate`. Take fewer."
        )
    if train.tokens_per_micro_batch is not None and train.tokens_per_micro_batch < sampling.max_completion_length:
        yield (
            f"`train.tokens_per_micro_batch` = {train.tokens_per_micro_batch} is less than `sampling."
            f"max_completion_length` = {sampling.max_completion_length}: an output with its prompt has to fit."
        )


def _eval(job: Job) -> Iterator[str]:
    held_out: EvalSection = job.eval
    if held_out.every > 0 and held_out.data is None and job.data.path != BUILTIN:
        yield (
            f"`eval.every` = {held_out.every}, but there are no held-out prompts: "
            "name some with `eval.data`, or remove `every`."
        )
    if held_out.num_generations > 1 and held_out.temperature == 0:
        yield (
            f"`eval.num_generations` = {held_out.num_generations} at `eval.temperature` = 0 would draw the same output "
            f"{held_out.num_generations} times. Give a temperature above 0, or one output."
        )
