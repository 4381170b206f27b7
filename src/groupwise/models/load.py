"""Loading a policy: the weights, and the layout and head that a probe of its class found to be right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from groupwise.errors import ModelError
from groupwise.models.attention import NAME
from groupwise.models.policy import LayoutName, Policy
from groupwise.models.probe import Findings, probe


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy, one line that says how it is run, and what its source was stored in."""

    policy: Policy
    line: str
    compute_dtype: torch.dtype
    source_dtype: torch.dtype
    context: int | None


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder or hub id. Raises ModelError."""
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Named boundary: whatever the hub, the disk or the library raises, the user's question is the same.
        raise _unreadable(path, error) from error


def load_policy(
    path: str, *, revision: str | None = None, device: str = "auto", dtype: str = "auto",
    layout: Literal["auto", "shared", "plain"] = "auto", gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> LoadedPolicy:  # fmt: skip
    """Load a causal language model as a policy, in float32: whoever trains it keeps that and casts to `compute_dtype`.

    The layout is `shared` where a probe of the class proves it equal to the stock model. Raises ModelError where the
    model cannot be loaded, or `layout="shared"` is asked for and wrong.
    """
    where = choose_device(device)
    compute = choose_dtype(dtype, where)
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    findings = _quiet_probe(config, trust_remote_code)
    chosen = _choose_layout(layout, findings, path)
    source_dtype = _source_dtype(config)
    model = _load_weights(path, config, chosen, revision, trust_remote_code)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model.to(where), chosen, findings.head)
    line = _describe(policy, findings, layout, compute)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return LoadedPolicy(policy, line, compute, source_dtype, context)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ModelError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device is {name!r}, which names no device: use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device is {name!r}, but this machine or this build of torch has no CUDA: use cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What forward and backward compute in: `auto` is bfloat16 on CUDA, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _choose_layout(asked: str, findings: Findings, path: str) -> LayoutName:
    usable = findings.shared and findings.head is not None
    if asked == "shared" and not usable:
        raise ModelError(
            f"model.layout is 'shared', but {path} cannot take it: {findings.reason}. Use 'auto' or 'plain'."
        )
    return "shared" if usable and asked != "plain" else "plain"


def _load_weights(
    path: str, config: PreTrainedConfig, layout: LayoutName, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    attention: dict[str, Any] = {"attn_implementation": NAME} if layout == "shared" else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=torch.float32, trust_remote_code=trust_remote_code,
            output_loading_info=True, **attention,
        )  # fmt: skip
    except Exception as error:
        # Named boundary, as above.
        raise _unreadable(path, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}, ..): training would start "
            "from random numbers. Is it a causal language model of this class, and whole?"
        )
    return model  # type: ignore[no-any-return]


def _quiet_probe(config: PreTrainedConfig, trust_remote_code: bool) -> Findings:
    # Tiny clones make transformers say things about models that nobody asked for.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        return probe(config, trust_remote_code)
    finally:
        transformers.logging.set_verbosity(level)


def _describe(policy: Policy, findings: Findings, asked: str, compute: torch.dtype) -> str:
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    kind = type(policy.model).__name__
    name = str(compute).removeprefix("torch.")
    if policy.layout == "shared":
        how = f"prompts computed once per group ({findings.reason})"
    elif asked == "plain":
        how = "each output with its own prompt, as asked"
    else:
        how = f"each output with its own prompt, because {findings.reason}"
    head = "" if policy.head is not None else "; whole logits, because its head is more than a matrix"
    return f"{kind}, {size:.1f}M parameters, {name} on {policy.device}: {how}{head}"


def _source_dtype(config: PreTrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _unreadable(path: str, error: Exception) -> ModelError:
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
        return ModelError(f"The model {path} does not exist. Name a Hugging Face folder or a hub id.")
    text = " ".join(str(error).split())
    return ModelError(f"The model {path} cannot be loaded: {text[:400]}")
