"""What made a checkpoint, beside its job: the files and data that went in, and what computed it.

A resumed run is the same run only where all of this is as it was. What the policy is trained on may not change; what
judges outputs may, since a reward that fails is mended and the run goes on, but never without a word."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from groupwise import __version__
from groupwise.config import BUILTIN
from groupwise.cpu.kernels import compiled, processor
from groupwise.errors import DataError, RunFolderError
from groupwise.store.checkpoint import Checkpoint

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
        FEATURES: digest(processor().encode()), "compiled kernels": "no" if compiled() is None else "yes",
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
    settings = {f"{path}/{file.name}": digest(file.read_bytes()) for file in files if file.suffix in _SETTINGS}
    return settings, {f"{path}/{file.name}": _ends(file) for file in files if file.suffix in _WEIGHTS}


def _ends(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(_SAMPLED_BYTES)
        opened.seek(max(0, size - _SAMPLED_BYTES))
        return digest(b"%d " % size + first + opened.read())


def digest(data: bytes) -> str:
    """16 hexadecimal digits that tell whether two things are the same."""
    return blake2b(data, digest_size=8).hexdigest()
