"""Combinations that cannot work, or in which a key would be without effect; each refused with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date
from math import inf

from groupwise.config import (
    BUILTIN,
    TRAINED_REWARD_MODEL,
    EvalSection,
    Job,
    ObjectiveSection,
    ProcessSection,
    RewardSection,
    SamplingSection,
    TrainSection,
)
from groupwise.errors import ConfigError
from groupwise.jobfile import reward_model_checks
from groupwise.jobfile.effects import without_effect
from groupwise.jobfile.presets import VALUES

REASONS = {
    ("objective.kl", "k1"): (
        "as a loss its expected gradient is zero, so it would hold nothing back. "
        'Take "k1_in_reward" (the same estimate as a penalty in the reward), or the default "k3".'
    ),
}
"""Values outside a knob's choices that people know from elsewhere, and why they are not offered."""

_UNREAD_BY = {
    "clip": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "cispo": ("epsilon", "dual_clip", "sapo_temperature_pos", "sapo_temperature_neg"),
    "sapo": ("epsilon", "epsilon_high", "dual_clip"),
}
"""By surrogate, the keys that it does not read."""
_WITHOUT_KL = ("dr_grpo", "dapo", "gspo", "cispo", "sapo")
_DEFAULT_CAP = ObjectiveSection().importance_sampling_cap
_OFF = ProcessSection().model_dump()


def check(job: Job, origins: Mapping[str, str], *, training: bool = True) -> None:
    """Raise ConfigError with the first problem of the job: of any use of it, and of its `training`."""
    for problem in problems(job, origins):
        raise ConfigError(problem)
    for problem in without_effect(job) if training else ():
        raise ConfigError(problem)


def problems(job: Job, origins: Mapping[str, str]) -> Iterator[str]:
    """Every reason why this job cannot run as written, one sentence or two each."""
    if not job.run.strip():
        yield "`run` is empty, and a run needs a folder of its own: name one, as in --run runs/mine."
    yield from _sampling(job.sampling)
    yield from _objective(job.objective)
    yield from _reward(job, origins)
    yield from reward_model_checks.problems(job)
    yield from _credit(job)
    yield from _segmenter(job.process, bool(job.reward.step_functions))
    yield from _data(job, origins)
    yield from _train(job.train, job.sampling)
    yield from _eval(job)


def day_problems(key: str, day: str | None) -> Iterator[str]:
    """The reason why a text is no day of the calendar."""
    try:
        date.fromisoformat(day or "2000-01-01")
    except ValueError as error:
        yield f'`{key}` = "{day}" is no day: {error}. Write it as in {key} = "2026-12-01".'


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
    said = VALUES[preset]
    surrogate = objective.surrogate or said["surrogate"]
    how = f"surrogate `{surrogate}`" if objective.surrogate else f"preset `{preset}`"
    for name in _UNREAD_BY[surrogate]:
        if getattr(objective, name) is not None:
            yield f"`objective.{name}` has no effect with the {how}, which does not clip so. Remove it."
    cap = said.get("epsilon_high", 1.0) if objective.epsilon_high is None else objective.epsilon_high
    if surrogate == "cispo" and cap < 1:
        yield (
            f"`objective.epsilon_high` = {cap:g}: with `cispo` this is the cap of the ratio, and below 1 it would cut "
            "the ratio of tokens whose probability did not change. The preset `cispo` has 5."
        )
    scale = objective.scale_rewards or said["scale_rewards"]
    if (objective.baseline or said["baseline"]) == "batch_mean" and scale == "group":
        yield (
            '`objective.baseline` = "batch_mean" cannot go with `objective.scale_rewards` = "group": a group of equal '
            'rewards has std 0 but lies off the batch\'s mean. Take "batch" or "none".'
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
    section = job.reward
    for key, functions, option in (
        ("functions", section.functions, "--reward rewards.py:score"),
        ("step_functions", section.step_functions, "--step-reward rewards.py:score_steps"),
        ("verifier", section.verifier, "--set reward.verifier=rewards.py:score"),
    ):
        if job.data.path != BUILTIN and BUILTIN in functions and _nobody_said(f"reward.{key}", origins):
            yield (
                f'`data.path` = "{job.data.path}" needs a reward of its own: the built-in one checks sums. '
                f'Name a function, as in {option} or `{key} = ["{option.split()[1]}"]` under [reward].'
            )
        for function in functions:
            if not all(function.partition(":")) and function != TRAINED_REWARD_MODEL:
                yield (
                    f'`reward.{key}` has "{function}", which does not say where and what. '
                    "Write file.py:name or package.module:name."
                )
    yield from _reward_models(section)
    for name, weights, functions in (
        ("weights", section.weights, section.functions),
        ("step_weights", section.step_weights, section.step_functions),
    ):
        if weights is not None and len(weights) != len(functions):
            named = ", ".join(functions) or "that `reward` names: none"
            yield f"`reward.{name}` has {len(weights)} values for the functions {named}. Give one weight to each."


def _nobody_said(key: str, origins: Mapping[str, str]) -> bool:
    """Whether a value is only a default, or that of a shipped recipe."""
    origin = origins.get(key, "default")
    return origin == "default" or origin.startswith("recipe ")


def _reward_models(section: RewardSection) -> Iterator[str]:
    """What is said of reward models where none is named."""
    named = (*section.functions, *section.step_functions, *section.verifier)
    models = [name for name in named if name.startswith("model:") or name == TRAINED_REWARD_MODEL]
    if section.device is not None and not models:
        yield (
            f'`reward.device` = "{section.device}" has no effect: it says where reward models compute, and none is '
            "named. Name one, as in --reward model:DIR, or remove it."
        )
    if section.step_tags is not None and len(section.step_tags) != 3:
        yield (
            f"`reward.step_tags` has {len(section.step_tags)} entries. It takes three: the tag that ends a step, the "
            'word for right and the word for wrong, as in ["ки", "+", "-"].'
        )
    if section.step_tags is not None and not any(
        name in models and name != TRAINED_REWARD_MODEL for name in section.step_functions
    ):
        yield (
            "`reward.step_tags` has no effect where no reward model scores steps: name one, as in "
            "--step-reward model:DIR, or remove it."
        )


def _credit(job: Job) -> Iterator[str]:
    """What outputs and steps earn, against what their advantages count."""
    functions, step_functions, objective = job.reward.functions, job.reward.step_functions, job.objective
    if not functions and not step_functions:
        yield "`reward.functions` is empty, and no step is scored either: name a function that scores outputs or steps."
    if not functions and objective.outcome_weight:
        yield (
            f"`objective.outcome_weight` = {objective.outcome_weight:g}, but `reward.functions` is empty: there are no "
            "rewards of outputs to learn from. Name a function, or remove the weight."
        )
    if not functions and not job.reward.verifier and (job.eval.data is not None or job.data.path == BUILTIN):
        yield (
            "`reward.functions` is empty, and what is held out is judged by it. Name one in `reward.verifier`, which "
            "judges and takes no part in training."
        )
    if not step_functions and objective.process_weight:
        yield (
            f"`objective.process_weight` = {objective.process_weight:g}, but nothing scores steps: name a function, as "
            "in --step-reward rewards.py:score_steps, or remove the weight."
        )
    if objective.outcome_weight == 0 and (objective.process_weight == 0 or not step_functions):
        yield (
            "`objective.outcome_weight` = 0 and steps that do not count either: every advantage would be 0. "
            "Give one of the weights a value above 0."
        )
    for name in ("step_return", "step_normalization"):
        given = getattr(objective, name)
        if given is not None and (objective.process_weight == 0 or not step_functions):
            yield f'`objective.{name}` = "{given}" has no effect where steps do not count. Remove it.'


def _segmenter(process: ProcessSection, steps_are_scored: bool) -> Iterator[str]:
    if not steps_are_scored and process != ProcessSection():
        name = next(name for name in ProcessSection.model_fields if getattr(process, name) != _OFF[name])
        yield (
            f"`process.{name}` has no effect where no step is scored: name a function, as in "
            "--step-reward rewards.py:score_steps, or remove it."
        )
        return
    for name in ("pattern", "token_ids", "function"):
        given = getattr(process, name)
        if process.segmenter == name and not given:
            yield f'`process.segmenter` = "{name}" needs `process.{name}`, and it is {_absent(given)}.'
        if process.segmenter != name and given is not None:
            yield (
                f'`process.{name}` has no effect with `process.segmenter` = "{process.segmenter}". '
                f'Set segmenter = "{name}", or remove it.'
            )
    if process.function and not all(process.function.partition(":")):
        yield (
            f'`process.function` = "{process.function}" does not say where and what. '
            "Write file.py:name or package.module:name."
        )
    if process.pattern:
        yield from _pattern(process.pattern)


def _pattern(pattern: str) -> Iterator[str]:
    try:
        found = re.compile(pattern)
    except re.error as error:
        yield f"`process.pattern` = {pattern!r} is no regular expression: {error}."
        return
    if found.match(""):
        yield f"`process.pattern` = {pattern!r} matches nothing at all, and so would end a step after every character."


def _absent(value: object) -> str:
    return "not set" if value is None else "empty"


def _data(job: Job, origins: Mapping[str, str]) -> Iterator[str]:
    if job.model.path != BUILTIN and job.data.path == BUILTIN and _nobody_said("data.path", origins):
        yield (
            f'`model.path` = "{job.model.path}", but no data is named, and the built-in sums suit the built-in model. '
            "Name prompts and a reward, as in --data prompts.jsonl --reward rewards.py:score; if sums are meant, say "
            f"--data {BUILTIN}."
        )
    yield from day_problems("data.date", job.data.date)
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
