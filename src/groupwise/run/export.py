"""Export: a run's weights as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupwise.errors import RunFolderError
from groupwise.models.codec import Codec
from groupwise.models.policy import Policy

_GENERATION = "generation_config.json"


def export(
    policy: Policy, codec: Codec, masters: Mapping[str, Tensor], target: Path, *, source: str, dtype: torch.dtype,
    card: str,
) -> None:  # fmt: skip
    """Write `target` as a Hugging Face folder with these weights, in the data type that the source was stored in.

    Tokenizer files and the generation config are copied as they came. Raises RunFolderError where `target` is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise RunFolderError(f"{target} is not empty. Choose another folder to export to.")
    target.mkdir(parents=True, exist_ok=True)
    model = policy.model
    with torch.no_grad():
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in masters.items():
            own[name].copy_(tensor)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.set_attn_implementation("eager") if policy.layout == "shared" else None
    model.save_pretrained(target)
    _write_both_rope_forms(target / "config.json", dtype)
    if (Path(source) / _GENERATION).is_file():
        shutil.copy(Path(source) / _GENERATION, target / _GENERATION)
    codec.save(target)
    (target / "README.md").write_text(card)


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


def _write_both_rope_forms(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text())
    name = str(dtype).removeprefix("torch.")
    config |= older_rope_keys(config) | {"dtype": name, "torch_dtype": name}
    path.write_text(json.dumps(config, indent=2) + "\n")


def model_card(job: Mapping[str, Any], result: Mapping[str, Any] | None, step: int) -> str:
    """The README of an exported model: base, data, job and result."""
    base, data = job["model"]["path"], job["data"]["path"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [grpo, groupwise]"]
    if not base.startswith(("builtin:", "/", ".")):
        lines.append(f"base_model: {base}")
    lines += [
        "---", "", f"# {Path(base).name}, trained by GRPO", "",
        f"Trained with groupwise from `{base}` on `{data}`, {step} steps, objective `{job['objective']['preset']}`.", "",
        f"Rewards: {', '.join(f'`{name}`' for name in job['reward']['functions'])}.", "",
    ]  # fmt: skip
    if result and result.get("eval_before") is not None:
        before, after = result["eval_before"], result["eval_after"]
        lines += [f"Held-out accuracy: {before:.3f} before, {after:.3f} after ({result['seconds']:.0f} s).", ""]
    lines += ["## Job", "", "```json", json.dumps(job, indent=2), "```", ""]
    return "\n".join(lines)
