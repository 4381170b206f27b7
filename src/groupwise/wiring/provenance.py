"""What a run is made from: digests of the files, functions and data that its job names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any

import torch

from groupwise.config import BUILTIN, MODEL_PREFIX, TRAINED_REWARD_MODEL, Job
from groupwise.data.stream import columns_digest, contents_digest
from groupwise.jobfile.reward_model import RewardModelJob
from groupwise.reward_models.model import RewardModel
from groupwise.rewards.functions.sources import sources_of
from groupwise.store.provenance import Provenance, computed_by, digest, model_digests
from groupwise.types import Prompt
from groupwise.wiring.python_objects import PYTHON_PREFIX, PythonObjects


def provenance_of(
    job: Job, objects: PythonObjects, commit: str | None, device: torch.device, prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
) -> Provenance:  # fmt: skip
    """What goes into a run. `commit` is that of a model from the hub. Raises GroupwiseError as opening the job does."""
    fixed, base = model_digests(job.model.path, commit)
    judging = columns_digest(prompts, job.data.path.replace(PYTHON_PREFIX, "the given "))
    if held_out:
        path = (job.eval.data or job.data.path).replace(PYTHON_PREFIX, "the given ")
        fixed[f"the held-out prompts ({path})"] = contents_digest(held_out)
        judging |= columns_digest(held_out, f"{path} (held out)")
    named = (*job.reward.functions, *job.reward.step_functions, *job.reward.verifier, job.process.function or BUILTIN)
    for spec in named:
        if spec.startswith(MODEL_PREFIX):
            settings, found = model_digests(spec.removeprefix(MODEL_PREFIX), None)
            judging |= settings | found
        elif not spec.startswith((PYTHON_PREFIX, "builtin:")) and spec != TRAINED_REWARD_MODEL:
            judging |= {name: digest(file.read_bytes()) for name, file in sources_of(spec).items()}
    for function in (*objects.rewards, *objects.step_rewards, *objects.verifier):
        judging |= callable_digest(function)
    return Provenance(fixed, judging, base, computed_by(device))


def provenance_of_examples(
    job: RewardModelJob, model: RewardModel, train: Sequence[Any], held_out: Sequence[Any]
) -> Provenance:  # fmt: skip
    """What goes into the training of a reward model: its backbone, and encoded examples to learn from and to hold
    out."""
    fixed, base = model_digests(job.model, getattr(model.model.config, "_commit_hash", None))
    data = {f"what it learns from ({job.data})": train, f"what is held out ({job.eval_data or job.data})": held_out}
    fixed |= {name: digest("\n".join(map(repr, examples)).encode()) for name, examples in data.items()}
    return Provenance(fixed, {}, base, computed_by(model.device))


def callable_digest(function: Callable[..., Any]) -> dict[str, str]:
    """Of a function from Python: its code, not the values that it finds around it. Nothing of what has no code."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    name = getattr(function, "__name__", type(function).__name__)
    return {f"{name} (from Python)": digest(repr(list(_instructions(code))).encode())} if code else {}


def _instructions(code: CodeType) -> Iterable[Any]:
    """What a function does, wherever it stands: names and constants, and those of the functions inside it."""
    yield code.co_code
    yield code.co_names
    yield code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
