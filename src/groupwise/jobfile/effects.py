"""Keys that would be without effect in the training of a job: a key that does nothing is a mistake of somebody's.

Looked at are values that differ from the default, so that a run folder's job, in which every key is written out, says
no more than the one that it came from. What shows only in the data is told where the data is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from groupwise.config import (
    BUILTIN,
    TRAINED_REWARD_MODEL,
    EvalSection,
    Job,
    RewardModelSection,
    RewardSection,
    WatchSection,
)

PYTHON_ROWS: Final = "python:rows"
"""How a job names rows that were given from Python."""
FILES: Final = (".jsonl", ".json", ".csv", ".parquet")
_HUB_KEYS: Final = ("split", "subset", "revision")
_EVAL, _REWARD, _WATCH, _ROUNDS = EvalSection(), RewardSection(), WatchSection(), RewardModelSection()


def without_effect(job: Job) -> Iterator[str]:
    """A sentence or two for every key of a job that its training would not read."""
    yield from _model(job)
    yield from _data(job)
    yield from _objective(job)
    yield from _reward(job)
    yield from _rounds(job)
    yield from _eval(job)
    if not job.watch.rollouts and job.watch.rollouts_max_bytes != _WATCH.rollouts_max_bytes:
        yield "`watch.rollouts_max_bytes` has no effect where `watch.rollouts` is false: no rollouts are written."


def beside(path: str, key: str) -> str:
    """Why `split`, `subset` or `revision` say nothing of a data set of this path; empty where they do."""
    if path == BUILTIN:
        return f"`{BUILTIN}`, which has no {key}"
    if path == PYTHON_ROWS:
        return f"rows from Python, which have no {key}"
    place = Path(path)
    if place.suffix.lower() in FILES or place.is_file():
        return f"the file {path}, which has no {key}"
    if not place.is_dir():
        return ""
    if key == "revision":
        return f"the folder {path}: revisions are those of the hub"
    if (place / "dataset_dict.json").is_file():
        return f"the saved data set {path}, which has no {key}" if key == "subset" else ""
    return f"the saved data set {path}, which has no {key}" if (place / "state.json").is_file() else ""


def _model(job: Job) -> Iterator[str]:
    models: tuple[tuple[str, str, str | None], ...] = (("model", job.model.path, job.model.revision),)
    if job.reward_model.path is not None:
        models += (("reward_model", job.reward_model.path, job.reward_model.revision),)
    for section, path, revision in models:
        if revision is not None and Path(path).is_dir():
            yield (
                f'`{section}.revision` = "{revision}" has no effect beside the folder {path}: revisions are those of '
                "the hub. Remove it."
            )


def _data(job: Job) -> Iterator[str]:
    for key in _HUB_KEYS:
        value = getattr(job.data, key)
        why = beside(job.data.path, key)
        if why and value not in (None, "train"):
            yield f'`data.{key}` = "{value}" has no effect beside {why}. Remove it.'
    path = job.eval.data or (BUILTIN if job.data.path == BUILTIN else "")
    why = beside(path, "split") if path else "no held-out prompts: name some with `eval.data`"
    if why and job.eval.split != _EVAL.split:
        yield f'`eval.split` = "{job.eval.split}" has no effect beside {why}. Remove it.'


def _objective(job: Job) -> Iterator[str]:
    section = job.objective
    if section.kl is not None and section.beta == 0:
        yield (
            f'`objective.kl` = "{section.kl}" has no effect while `objective.beta` = 0: there is no KL penalty. Give '
            "beta a value above 0 (0.04 in the paper), or remove `kl`."
        )
    if section.process_weight is not None and not job.reward.step_functions:
        yield "`objective.process_weight` has no effect where nothing scores steps. Remove it."
    if section.outcome_weight is not None and not job.reward.functions:
        yield "`objective.outcome_weight` has no effect where `reward.functions` is empty. Remove it."


def _reward(job: Job) -> Iterator[str]:
    section = job.reward
    if section.verifier and not _holds_out(job) and not _trains_reward_model(job):
        yield (
            "`reward.verifier` has no effect: it judges held-out prompts, and says what is right where a reward model "
            "is trained. Name held-out prompts with `eval.data`, or remove it."
        )
    named = [*section.functions, *section.step_functions, *section.verifier, *filter(None, [job.process.function])]
    if all(name.startswith("model:") or name == TRAINED_REWARD_MODEL for name in named):
        for key in ("timeout", "output_timeout"):
            if getattr(section, key) != getattr(_REWARD, key):
                yield f"`reward.{key}` has no effect: it bounds the calls of functions, and only models are named."


def _rounds(job: Job) -> Iterator[str]:
    section = job.reward_model
    if not _trains_reward_model(job):
        return
    if section.labels not in (None, "verifier", "pairs", "monte_carlo"):
        for key in ("prompts_per_round", "first_prompts"):
            value = getattr(section, key)
            if value not in (0, getattr(_ROUNDS, key)):
                yield (
                    f"`reward_model.{key}` = {value} has no effect where labels come from the file {section.labels}: "
                    "no outputs are labelled. Remove it."
                )
    if section.replay == 0 and section.replay_size != _ROUNDS.replay_size:
        yield "`reward_model.replay_size` has no effect while `reward_model.replay` = 0. Remove it."


def _eval(job: Job) -> Iterator[str]:
    section = job.eval
    if not _holds_out(job):
        # What is right, from `threshold` on, is asked for by labels too.
        for key in EvalSection.model_fields:
            if key not in ("data", "split", "threshold") and getattr(section, key) != getattr(_EVAL, key):
                yield (
                    f"`eval.{key}` = {getattr(section, key)} has no effect: there are no held-out prompts. Name some "
                    f"with `eval.data`, or remove `{key}`."
                )
    if section.temperature == 0:
        for key in ("top_p", "top_k"):
            if getattr(section, key) != getattr(_EVAL, key):
                yield (
                    f"`eval.{key}` has no effect while `eval.temperature` = 0, which takes the likeliest token. Give a "
                    "temperature above 0, or remove it."
                )


def _holds_out(job: Job) -> bool:
    return job.eval.data is not None or job.data.path == BUILTIN


def _trains_reward_model(job: Job) -> bool:
    return TRAINED_REWARD_MODEL in (*job.reward.functions, *job.reward.step_functions)
