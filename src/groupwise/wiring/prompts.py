"""From a job to its prompts: those that are trained on, and those that are held out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from groupwise.config import BUILTIN, Job
from groupwise.data.files import PromptSet, check_keys, load_prompts
from groupwise.data.objects import Splits, of_split
from groupwise.data.remarks import remarks
from groupwise.demo import task
from groupwise.errors import ConfigError, DataError
from groupwise.tokenizer.codec import Codec
from groupwise.wiring.models import Model
from groupwise.wiring.python_objects import PYTHON_PREFIX, PythonObjects, Rows
from groupwise.wiring.settings import (
    eval_sampling_of,
)

TRAINING_QUESTIONS = 8192
"""How many of the built-in questions are an epoch."""
CHECKED_PROMPTS = 64
"""How many prompts the tokenizer is tested on."""


def training_prompts(job: Job, model: Model, objects: PythonObjects) -> PromptSet:
    """The job's prompts, encoded, the too long ones left out."""
    return encoded_prompts(job, model.codec, model.loaded.context, objects)


def encoded_prompts(
    job: Job, codec: Codec, context: int | None, objects: PythonObjects, limit: int | None = None
) -> PromptSet:
    """The same for a model that is not loaded, whose rows have at most `context` tokens; the first `limit` of them."""
    built_in = partial(task.questions, "train", job.seed, TRAINING_QUESTIONS)
    rows = _rows(job.data.path, objects.rows, "data", job.data.split, built_in)
    longest = _room(job, context, job.sampling.max_completion_length, "sampling.max_completion_length")
    prompts = load_prompts(job.data, codec, longest, rows=rows, limit=limit)
    if limit is None:
        check_keys(job.data, prompts)
    return prompts


def held_out_prompts(job: Job, model: Model, objects: PythonObjects) -> PromptSet | None:
    """The job's held-out prompts; None where it names none."""
    section = job.eval
    if section.data is None and job.data.path != BUILTIN:
        return None
    path = section.data or BUILTIN
    rows = _rows(path, objects.eval_rows, "eval_data", section.split, task.held_out)
    # Another split of the same data set is of the same revision; another data set has none of its own.
    other = {} if path == job.data.path else {"revision": None, "subset": None}
    data = job.data.model_copy(update={"path": path, "split": section.split, **other})
    own = "eval" if section.max_completion_length else "sampling"
    longest = _room(job, model.loaded.context, eval_sampling_of(job).max_tokens, f"{own}.max_completion_length")
    return load_prompts(data, model.codec, longest, rows=rows, limit=section.limit)


def check_prompts(prompts: PromptSet, codec: Codec, warn: Callable[[str], None]) -> None:
    """Say what was left out, and hold the tokenizer against what is left. Raises ModelError where it loses text."""
    if prompts.dropped_long:
        warn(f"{prompts.dropped_long} prompts are too long and were left out")
    if prompts.as_json:
        warn(f"{prompts.as_json} prompts are messages written as JSON, and are taken as messages")
    first = prompts.prompts[:CHECKED_PROMPTS]
    texts = [codec.render(prompt.content, prompt.template_options) for prompt in first]
    for warning in [*codec.check(texts), *remarks(prompts.prompts, codec)]:
        warn(warning)


def _rows(path: str, handed: Rows | Splits | None, name: str, split: str, built_in: Callable[[], Rows]) -> Rows | None:
    """Rows that are in memory already; None where `path` names them."""
    if path == BUILTIN:
        return built_in()
    if not path.startswith(PYTHON_PREFIX):
        return None
    if handed is None:
        raise DataError(f"This job's {name} ({path}) was handed over from Python; hand it over again: {name}=rows.")
    return of_split(handed, split, "eval.split" if name == "eval_data" else "data.split")


def _room(job: Job, context: int | None, completion: int, key: str) -> int | None:
    """The longest prompt, in tokens, that leaves an output its length. Raises ConfigError where none does."""
    limit = job.data.max_prompt_length
    if context is None:
        return limit
    if completion + (limit or 1) > context:
        prompts = f"prompts of up to {limit} tokens (data.max_prompt_length)" if limit else "any prompt"
        raise ConfigError(
            f"`{key}` = {completion} leaves no room for {prompts} in the model's context of {context} tokens. Lower it."
        )
    return limit or context - completion
