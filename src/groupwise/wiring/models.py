"""From a job to its policy: model, tokenizer, and what they were read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from groupwise.config import BUILTIN, Job
from groupwise.cpu.malloc import keep_freed_memory
from groupwise.demo.warmup import ensure_warm
from groupwise.errors import ModelError
from groupwise.models.cast import cast_to_compute_dtype
from groupwise.models.load import LoadedPolicy, choose_device, load_policy
from groupwise.tokenizer.codec import Codec
from groupwise.wiring.memory import check_memory
from groupwise.wiring.python_objects import PythonObjects
from groupwise.wiring.settings import (
    memory_settings,
)


@dataclass(frozen=True)
class Model:
    """A policy, its codec, and the folder or hub id that both came from."""

    loaded: LoadedPolicy
    codec: Codec
    source: str


def open_model(job: Job, objects: PythonObjects, say: Callable[[str], None], *, training: bool) -> Model:
    """Load the job's model and tokenizer; the built-in one is made, or taken from the cache."""
    section, source = job.model, model_source(job, say)
    if training:
        check_memory(job, source, objects.trust_remote_code)
    keep_freed_memory(choose_device(section.device))
    say(f"loading {source}")
    loaded = load_policy(
        source, revision=section.revision, device=section.device, dtype=section.dtype, layout=section.layout,
        gradient_checkpointing=memory_settings(job)[1] and training, trust_remote_code=objects.trust_remote_code,
    )  # fmt: skip
    codec = Codec.load(
        source, revision=section.revision, trust_remote_code=objects.trust_remote_code,
        chat_template_kwargs=job.data.chat_template_kwargs, date=job.data.date,
        skip_special_tokens=job.sampling.skip_special_tokens,
    )  # fmt: skip
    rows = int(loaded.policy.model.config.get_text_config().vocab_size)
    if codec.vocab_size > rows:
        raise ModelError(
            f"The tokenizer of {source} knows {codec.vocab_size} tokens, the model has rows for {rows}: they do not "
            "belong together. Resize the model's embeddings, or take the tokenizer that it was trained with."
        )
    say(loaded.line)
    return Model(loaded, codec, source)


def model_source(job: Job, say: Callable[[str], None]) -> str:
    """The folder or hub id of the job's model; the built-in one is made first, where the cache does not have it."""
    return str(ensure_warm(job.seed, say=say)) if job.model.path == BUILTIN else job.model.path


def cast_policy(model: Model) -> None:
    """Compute as training does, which samples in the narrow type."""
    cast_to_compute_dtype(model.loaded.policy.model, model.loaded.compute_dtype)
