"""Export: a run's weights as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from groupwise.store.checkpoint import Checkpoint
from groupwise.store.written import Rounding
from groupwise.tokenizer.files import looks_local

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


def exported_dtype(asked: str, source: torch.dtype, rounding: Rounding) -> tuple[torch.dtype, str]:
    """The type to export in, and a sentence on what rounding to it loses, empty where nothing.

    `auto` is the source's, unless that would lose much of what training changed: then float32. `rounding` is that of
    the type that is asked for, of the source's for `auto`.
    """
    chosen = source if asked == "auto" else DTYPES[asked]
    if chosen == torch.float32 or rounding.share is None:
        return chosen, ""
    name = str(chosen).removeprefix("torch.")
    keeps = f"{rounding.share:.0%} of what training changed in the weights"
    if asked == "auto" and not rounding.keeps_most:
        return torch.float32, f"exported in float32: {name}, in which the base model is stored, would keep {keeps}"
    return chosen, f"{name} keeps {keeps}" + ("" if rounding.keeps_most else "; float32 keeps all of it")


def model_card(job: Mapping[str, Any], saved: Checkpoint | None, lost: str = "") -> str:
    """The README of an exported model: base, data, job and result, and what rounding lost. Without a checkpoint it is
    the base itself."""
    base, data, preset = job["model"]["path"], job["data"]["path"], job["objective"]["preset"]
    rewards = ", ".join(f"`{name}`" for name in job["reward"]["functions"])
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [grpo, groupwise]"]
    if not (base.startswith("builtin:") or looks_local(base) or Path(base).exists()):
        header.append(f"base_model: {base}")
    steps = saved.step if saved else 0
    return "\n".join([
        "---", *header, "---", "", f"# {Path(base).name}, trained by GRPO", "",
        f"Trained with groupwise from `{base}` on `{data}`: {steps} steps, objective `{preset}`, rewards {rewards}.",
        "", *_found(saved), *([f"Weights: {lost}.", ""] if lost else []),
        "## Job", "", "```json", json.dumps(job, indent=2, ensure_ascii=False), "```", "",
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
    return [f"Held-out {', '.join(words)}; {saved.state['clock']['seconds']:.0f} s in all.", ""]
