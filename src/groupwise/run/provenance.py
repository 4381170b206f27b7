"""What made a checkpoint, beside its job: the files and data that went in, and what computed it.

A resumed run is the same run only where all of this is as it was. What the policy is trained on may not change; what
judges outputs may, since a reward that fails is mended and the run goes on, but never without a word."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from types import CodeType
from typing import Any, Final

import torch
import transformers

from groupwise import __version__
from groupwise.config import BUILTIN, MODEL_PREFIX, TRAINED, Job
from groupwise.cpu.kernels import compiled, processor
from groupwise.data.stream import columns_digest, contents_digest
from groupwise.errors import DataError, RunFolderError
from groupwise.jobfile.reward_model import RewardModelJob
from groupwise.reward_models.model import RewardModel
from groupwise.rewards.functions.sources import sources_of
from groupwise.store.checkpoint import Checkpoint
from groupwise.types import Prompt
from groupwise.wiring.python_objects import PYTHON, Given

JOB: Final = "job.toml"
"""The file of a checkpoint that holds the job that it was made with."""
FEATURES: Final = "processor features"
_SAMPLED_BYTES = 1 << 16
"""So much of either end of a file of weights is read: all of it would take longer than the start of a run."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SETTINGS = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")
Digests = Mapping[str, str]


@dataclass(frozen=True)
class Provenance:
    """Digests by what people call a thing: `fixed` may not change, of `judging` and of `base` (weights that the run
    began with) a change is said.

    `computed` says what computed the bits: `{"torch": "2.9.0", "threads": "8", ...}`. `changes` are those that were
    said already, as sentences.
    """

    fixed: Digests
    judging: Digests
    base: Digests
    computed: Mapping[str, str]
    changes: tuple[str, ...] = field(default=())

    def state(self) -> dict[str, Any]:
        """What `state.json` holds."""
        return {
            "fixed": dict(self.fixed), "judging": dict(self.judging), "base": dict(self.base),
            "computed": dict(self.computed), "changes": list(self.changes),
        }  # fmt: skip


def provenance_of(
    job: Job, given: Given, commit: str | None, device: torch.device, prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
) -> Provenance:  # fmt: skip
    """What goes into a run. `commit` is that of a model from the hub. Raises GroupwiseError as opening the job does."""
    fixed, base = model_digests(job.model.path, commit)
    judging = columns_digest(prompts, job.data.path.replace(PYTHON, "the given "))
    if held_out:
        path = (job.eval.data or job.data.path).replace(PYTHON, "the given ")
        fixed[f"the held-out prompts ({path})"] = contents_digest(held_out)
        judging |= columns_digest(held_out, f"{path} (held out)")
    named = (*job.reward.functions, *job.reward.step_functions, *job.reward.verifier, job.process.function or BUILTIN)
    for spec in named:
        if spec.startswith(MODEL_PREFIX):
            settings, found = model_digests(spec.removeprefix(MODEL_PREFIX), None)
            judging |= settings | found
        elif not spec.startswith((PYTHON, "builtin:")) and spec != TRAINED:
            judging |= {name: _digest(file.read_bytes()) for name, file in sources_of(spec).items()}
    for function in (*given.rewards, *given.step_rewards, *given.verifier):
        judging |= callable_digest(function)
    return Provenance(fixed, judging, base, computed_by(device))


def provenance_of_examples(
    job: RewardModelJob, model: RewardModel, train: Sequence[Any], held_out: Sequence[Any]
) -> Provenance:  # fmt: skip
    """What goes into the training of a reward model: its backbone, and encoded examples to learn from and to hold
    out."""
    fixed, base = model_digests(job.model, getattr(model.model.config, "_commit_hash", None))
    data = {f"what it learns from ({job.data})": train, f"what is held out ({job.eval_data or job.data})": held_out}
    fixed |= {name: _digest("\n".join(map(repr, examples)).encode()) for name, examples in data.items()}
    return Provenance(fixed, {}, base, computed_by(model.device))


def computed_by(device: torch.device) -> dict[str, str]:
    """What decides the last bits of what is computed here."""
    found = {
        "groupwise": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda)}
    own = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return found | {
        "device": device.type, "threads": str(torch.get_num_threads()), "processor": own,
        FEATURES: _digest(processor().encode()), "compiled kernels": "no" if compiled() is None else "yes",
    }  # fmt: skip


FORK: Final = "use --fork FOLDER to start a new run from the checkpoint"


def check_resumed(
    saved: Checkpoint, now: Provenance, warn: Callable[[str], None], otherwise: str = FORK
) -> Provenance:  # fmt: skip
    """Say what is not as it was when `saved` was written; returns `now` with the changes so far. `otherwise` is what
    is left to do where it cannot be put back.

    Raises DataError where prompts or model are others, RunFolderError where the checkpoint does not say.
    """
    try:
        before = Provenance(**saved.state["made_by"])
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{saved.path} does not say what made it, so it cannot be resumed from.") from error
    if fixed := changed(before.fixed, now.fixed):
        raise DataError(
            f"A resumed run would not be the same run: since step {saved.step} {'; '.join(fixed)}. Put that back to "
            f"what it was, or {otherwise}."
        )
    said = [f"{one} since step {saved.step}" for one in changed(before.judging, now.judging)]
    for sentence in said:
        warn(f"{sentence}: steps from here on are judged by what is there now")
    for sentence in (f"{one} since step {saved.step}" for one in changed(before.base, now.base)):
        said.append(sentence)
        warn(f"{sentence}: the run goes on with its own weights")
    if other := difference(before.computed, now.computed):
        said.append(f"step {saved.step} was computed with {other}")
        warn(f"{said[-1]}: the run goes on, and the last bits of its numbers may not be those of an uninterrupted one")
    return replace(now, changes=(*before.changes, *said))


def changed(before: Digests, now: Digests) -> list[str]:
    """`["rewards.py has changed", "rows.jsonl, column 'want' is gone"]`."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    how = {(False, True): "is new", (True, False): "is gone", (True, True): "has changed"}
    return [f"{name} {how[name in before, name in now]}" for name in names]


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """`"torch 2.8.0 (now 2.9.0), threads 8 (now 4)"`; empty where nothing differs."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names == [FEATURES]:
        return "a processor of other instructions"
    told = [name for name in names if name != FEATURES]
    return ", ".join(f"{name} {before.get(name, 'unknown')} (now {now.get(name, 'unknown')})" for name in told)


def model_digests(path: str, commit: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Of a model's folder: its configuration and tokenizer as they are, its weights by size and both ends.

    Of a hub id its commit, where that is known. Weights are read from the checkpoint when a run is resumed: those of
    the folder are its base.
    """
    folder = Path(path).expanduser()
    if path == BUILTIN or not folder.is_dir():
        return ({f"model {path}": commit} if commit else {}), {}
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    settings = {f"{path}/{file.name}": _digest(file.read_bytes()) for file in files if file.suffix in _SETTINGS}
    return settings, {f"{path}/{file.name}": _ends(file) for file in files if file.suffix in _WEIGHTS}


def callable_digest(function: Callable[..., Any]) -> dict[str, str]:
    """Of a function from Python: its code, not the values that it finds around it. Nothing of what has no code."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    name = getattr(function, "__name__", type(function).__name__)
    return {f"{name} (from Python)": _digest(repr(list(_instructions(code))).encode())} if code else {}


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


def _ends(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(_SAMPLED_BYTES)
        opened.seek(max(0, size - _SAMPLED_BYTES))
        return _digest(b"%d " % size + first + opened.read())


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
