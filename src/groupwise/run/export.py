"""Export: a run's weights as an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from groupwise.disk import cannot_write
from groupwise.errors import RunFolderError
from groupwise.learn.checkpoint import Checkpoint
from groupwise.learn.reward_learner import RewardLearner
from groupwise.models.codec import Codec
from groupwise.models.tokenizer_files import looks_local

GENERATION = "generation_config.json"


def write_folder(
    model: PreTrainedModel, codec: Codec, target: Path, *, source: str, dtype: torch.dtype, card: str
) -> None:
    """Write a model as a Hugging Face folder, in the data type that its source was stored in; the model is cast to it.

    Tokenizer files and the generation config are copied as they came. Raises RunFolderError where `target` is not an
    empty or new folder, or cannot be written.
    """
    try:
        if target.exists() and any(target.iterdir()):
            raise RunFolderError(f"{target} is not empty. Choose another folder to export to.")
        target.mkdir(parents=True, exist_ok=True)
        _write(model, target, dtype)
        if (Path(source) / GENERATION).is_file():
            shutil.copyfile(Path(source) / GENERATION, target / GENERATION)
        codec.save(target)
        (target / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise cannot_write(target, error) from error
    except SafetensorError as error:
        raise RunFolderError(f"Cannot write the weights into {target}: {error}") from error


def _write(model: PreTrainedModel, target: Path, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(target)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    config |= older_rope_keys(config) | {"dtype": name, "torch_dtype": name}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def older_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys by which transformers before 5 reads what `rope_parameters` says; without them it takes its default."""
    parameters = config.get("rope_parameters")
    if not parameters:
        return {}
    by_type = {k: v for k, v in parameters.items() if isinstance(v, dict)}
    main = by_type.get("full_attention", next(iter(by_type.values()))) if by_type else parameters
    keys: dict[str, Any] = {}
    if "rope_theta" in main:
        keys["rope_theta"] = main["rope_theta"]
    if "rope_theta" in by_type.get("sliding_attention", {}):
        keys["rope_local_base_freq"] = by_type["sliding_attention"]["rope_theta"]
    if main.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {k: v for k, v in main.items() if k != "rope_theta"}
    return keys


def model_card(job: Mapping[str, Any], saved: Checkpoint | None) -> str:
    """The README of an exported model: base, data, job and result. Without a checkpoint it is the base itself."""
    base, data, preset = job["model"]["path"], job["data"]["path"], job["objective"]["preset"]
    rewards = ", ".join(f"`{name}`" for name in job["reward"]["functions"])
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [grpo, groupwise]"]
    if not (base.startswith("builtin:") or looks_local(base) or Path(base).exists()):
        header.append(f"base_model: {base}")
    steps = saved.step if saved else 0
    return "\n".join([
        "---", *header, "---", "", f"# {Path(base).name}, trained by GRPO", "",
        f"Trained with groupwise from `{base}` on `{data}`: {steps} steps, objective `{preset}`, rewards {rewards}.",
        "", *_found(saved), "## Job", "", "```json", json.dumps(job, indent=2, ensure_ascii=False), "```", "",
    ])  # fmt: skip


def _found(saved: Checkpoint | None) -> list[str]:
    """What evaluation found of these very weights, as far as it is known."""
    if saved is None:
        return []
    if "value" in saved.state:
        return [f"Held-out reward: {saved.state['value']:.3f}, the best of its run.", ""]
    found = saved.state["evaluation"]
    if not found["first"] or not found["last"]:
        return []
    words = [
        f"{name} {found['first'][name]:.3f} before and {found['last'][name]:.3f} after {found['at_step']} steps"
        for name in ("accuracy", "reward")
        if name in found["first"] and name in found["last"]
    ]
    return [f"Held-out {', '.join(words)}; {saved.state['seconds']:.0f} s in all.", ""]


def save_reward_model(learner: RewardLearner, target: Path, card: str = "") -> None:
    """Write a learner's reward model as a Hugging Face folder, with tokenizer and separator; an older one is replaced.

    Raises RunFolderError where it cannot be written.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    whole = copy.deepcopy(learner.model.model).float()  # the one that trains stays as it is
    own: dict[str, torch.Tensor] = dict(whole.named_parameters()) | dict(whole.named_buffers())
    with torch.no_grad():
        for name, tensor in (learner.optimizer.frozen | learner.masters()).items():
            own[name].copy_(tensor)
    model = learner.model
    write_folder(whole, model.codec, partial, source=model.source, dtype=model.stored_dtype, card=card)
    model.write_card(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
