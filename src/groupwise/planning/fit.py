"""How a step is made to fit into memory: what a job leaves to the library is settled before weights are read.

What was settled stands in the run folder's job, so that a resumed run cuts its micro-batches as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from groupwise.config import BUILTIN, Job
from groupwise.disk import in_words
from groupwise.errors import ModelError
from groupwise.models.load import choose_device, load_config
from groupwise.models.size import parameter_count
from groupwise.wiring.memory import available_memory
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.settings import memory_settings

NOTHING_FITS: Final = "does not fit"
"""The verdict of a plan that has no way."""
_PER_LAYER = (20, 6)
"""Numbers that a layer keeps of a token for the backward pass, in widths and in inner widths: more than any seen."""


def choose_budget(job: Job, objects: PythonObjects, say: Callable[[str], None]) -> Job:
    """The job with numbers where it names none: the largest budget, and checkpointing only where it is needed.

    A class of models that cannot be planned takes the budget of a job that names none. Raises ModelError where nothing
    fits.
    """
    named = (job.train.tokens_per_micro_batch, job.model.gradient_checkpointing)
    if None not in named or _is_roomy(job, objects):
        return _with(job, *memory_settings(job))
    from groupwise.planning.plan import plan_of
    from groupwise.planning.trace import UntraceableError  # nobody else pays for importing these

    say("planning memory")
    try:
        plan = plan_of(job, objects, memory_only=True)
    except UntraceableError as error:
        budget, checkpointing = memory_settings(job)
        say(f"{error} Micro-batches have {budget:,} tokens, and half as many where memory runs out.")
        return _with(job, budget, checkpointing)
    chosen = (plan.tokens_per_micro_batch, plan.gradient_checkpointing)
    if plan.verdict == NOTHING_FITS or any(
        mine not in (None, found) for mine, found in zip(named, chosen, strict=True)
    ):
        raise ModelError(
            f"A step of this job would take {in_words(plan.needed)} of the {in_words(plan.free)} that are free; it "
            f"{plan.verdict}. `groupwise plan` tells what takes how much. Shorten outputs or prompts, lower "
            "train.prompts_per_step or sampling.max_live_outputs, or use a larger device."
        )
    if not plan.fits:
        say(f"memory: {plan.verdict}")
    return _with(job, *chosen)


def _with(job: Job, budget: int, checkpointing: bool) -> Job:
    changes: dict[str, Any] = {
        "train": job.train.model_copy(update={"tokens_per_micro_batch": budget}),
        "model": job.model.model_copy(update={"gradient_checkpointing": checkpointing}),
    }
    return job.model_copy(update=changes)


def _largest(size: int | Sequence[int] | None) -> int:
    """Of a width that may differ between layers."""
    return max(size, default=0) if isinstance(size, Sequence) else size or 0


def _is_roomy(job: Job, objects: PythonObjects) -> bool:
    """Whether twice what a step may take by a rough count is free: then nothing is traced, which takes its time."""
    if job.model.path == BUILTIN:
        return True
    config = load_config(job.model.path, revision=job.model.revision, trust_remote_code=objects.trust_remote_code)
    text, sampling = config.get_text_config(), job.sampling
    width = int(getattr(text, "hidden_size", None) or 0)
    inner = _largest(getattr(text, "intermediate_size", None)) or 4 * width
    layers = int(getattr(text, "num_hidden_layers", None) or 0)
    if not width * layers:
        return False  # a class that calls it otherwise is traced
    rows = min(job.train.prompts_per_step * sampling.num_generations, sampling.max_live_outputs)
    stored = rows * sampling.max_completion_length * 2 * width
    kept = memory_settings(job)[0] * (_PER_LAYER[0] * width + _PER_LAYER[1] * inner)
    weights = 24 * parameter_count(config, objects.trust_remote_code)
    needed = weights + 4 * layers * (stored + kept)
    return 2 * needed < available_memory(choose_device(job.model.device))
