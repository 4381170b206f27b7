"""Loading a policy: the weights, and the layout and head that a probe of its class found to be right."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from groupwise.errors import ModelError
from groupwise.models.attention import ATTENTION_NAME
from groupwise.models.lora import check_no_adapter
from groupwise.models.multimodal import check_causal, freeze_towers, remark
from groupwise.models.policy import LayoutName, Policy
from groupwise.models.probe import Findings, probe, unfit_itself
from groupwise.tokenizer.files import looks_local
from groupwise.tokenizer.hub import NOT_HERE, check_within_reach
from groupwise.wording import one_line


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy, one line that says how it is run, and what its source was stored in.

    `context` is the longest row in tokens, None where the model names no limit.
    """

    policy: Policy
    line: str
    compute_dtype: torch.dtype
    source_dtype: torch.dtype
    context: int | None


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder or hub id. Raises ModelError."""
    if (looks_local(path) or Path(path).exists()) and not Path(path).is_dir():
        raise ModelError(f"The model {path} is no folder: give an existing folder, or a hub id as 'org/name'.")
    check_within_reach(path, revision, f"The model {path}")
    check_no_adapter(path, revision)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # Named boundary: whatever the hub, the disk or the library raises, the user's question is the same.
        raise _unreadable(path, error) from error
    return config


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
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"The model {path} is quantized, and such weights cannot be trained: use what it came from.")
    check_causal(config, path)
    with quiet_transformers():
        findings = probe(config, trust_remote_code)
    if findings.unfit:
        raise ModelError(f"The model {path} ({config.model_type}) cannot be trained: {findings.unfit}.")
    chosen = choose_layout(layout, findings, path)
    with quiet_transformers():
        model, unused = _load_weights(path, chosen, revision, trust_remote_code)
    frozen = freeze_towers(model)
    if gradient_checkpointing:
        checkpoint_gradients(model, path)
    policy = Policy(
        model, chosen, findings.head, findings.cached, findings.direct, findings.aligned,
        stays_training=findings.stays_training,
    ).to(where)  # fmt: skip
    if not findings.proven and (unfit := unfit_itself(policy.model)):
        raise ModelError(f"The model {path} ({config.model_type}) cannot be trained: {unfit}.")
    line = _describe(policy, findings, layout, compute)
    if said := remark(config, frozen):
        line += f"; {said}"
    elif unused:
        line += f"; {len(unused)} weights of the folder are not used ({', '.join(unused[:3])})"
    return LoadedPolicy(policy, line, compute, source_dtype(config), context_length(config))


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


_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions", "seq_length")
"""How configurations call the longest row; most know the first name, whatever they call it themselves."""
_COUNT_FROM_PAD = ("roberta", "camembert", "xmod", "data2vec-text")
"""In the names of classes whose first position is the one after the pad token's id."""


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest row in tokens that the model computes as it does any shorter one; None where it names no limit.

    For longrope that is where its frequencies change: beyond it a long row would change the others of its batch.
    """
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in _LENGTHS]
    longest = min([length for length in named if isinstance(length, int) and length > 0], default=None)
    if longest is not None and any(name in text.model_type for name in _COUNT_FROM_PAD):
        longest -= (text.pad_token_id or 0) + 1
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    limits = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([limit for limit in [longest, *limits] if limit is not None], default=None)


def choose_layout(asked: str, findings: Findings, path: str) -> LayoutName:
    """The layout that a probe allows and a job asks for. Raises ModelError where `shared` is asked for and wrong."""
    if asked == "shared" and not findings.shared:
        raise ModelError(
            f"model.layout is 'shared', but {path} cannot take it: {findings.reason}. Use 'auto' or 'plain'."
        )
    return "shared" if findings.shared and asked != "plain" else "plain"


def checkpoint_gradients(model: PreTrainedModel, path: str) -> None:
    """Have a model recompute its layers in the backward pass. Raises ModelError where it cannot."""
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"model.gradient_checkpointing is on, but {path} ({type(model).__name__}) has none: turn it off."
        )
    # The first name is the newer one, and the older warns where both exist.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def read_weights(
    auto_class: Any, path: str, revision: str | None, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A model in float32, the names of weights that the folder lacks, and of those that the model has no place for.

    `auto_class` is one of transformers' `AutoModelFor...`. Raises ModelError.
    """
    try:
        loaded: Any = auto_class.from_pretrained(
            path, revision=revision, dtype=torch.float32, trust_remote_code=trust_remote_code,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except Exception as error:
        # Named boundary, as above.
        raise _unreadable(path, error) from error
    model, report = loaded
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise ModelError(
            f"The weights of {path} do not fit its config.json: {name} is stored as {list(stored)}, and the "
            f"configuration asks for {list(wanted)} (and {len(report['mismatched_keys']) - 1} more)."
        )
    return model, sorted(report["missing_keys"]), sorted(report["unexpected_keys"])


def _load_weights(
    path: str, layout: LayoutName, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The model in float32, and the names of stored weights that it has no place for."""
    attention: dict[str, Any] = {"attn_implementation": ATTENTION_NAME} if layout == "shared" else {}
    model, missing, unused = read_weights(AutoModelForCausalLM, path, revision, trust_remote_code, **attention)
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}, ..): training would start "
            "from random numbers. Is it a causal language model of this class, and whole?"
        )
    return model, unused


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No remarks about tiny clones that nobody asked for, no bars: what matters is an error here, or in the line."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        with without_bars():
            yield
    finally:
        hf_logging.set_verbosity(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers: they would run through the panel, and say nothing that a line does not. They are back
    afterwards, since the process may be somebody else's."""
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()


def _describe(policy: Policy, findings: Findings, asked: str, compute: torch.dtype) -> str:
    size = policy.size / 1e6
    kind = type(policy.model).__name__
    name = str(compute).removeprefix("torch.")
    if policy.layout == "shared":
        how = f"prompts computed once per group ({findings.reason})"
    elif asked == "plain":
        how = "each output with its own prompt, as asked"
    else:
        how = f"each output with its own prompt, because {findings.reason}"
    if not findings.proven:
        how += "; tried on a few rows of its own"
    if policy.head is None:
        how += "; whole logits, because its head is more than a matrix"
    if policy.layout == "plain" and not policy.cached:
        how += "; slow sampling, because its cache cannot be used"
    elif policy.layout == "plain" and policy.aligned:
        how += "; prompts of one length sampled together, because padding would change what it computes"
    if policy.stays_training:
        how += "; always in train mode, because it changes its weights in eval mode"
    return f"{kind}, {size:.1f}M parameters, {name} on {policy.device}: {how}"


def source_dtype(config: PreTrainedConfig) -> torch.dtype:
    """What a model's weights are stored in."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _unreadable(path: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"The model {path} brings code of its own, which runs only where that is asked for: read the code, then "
            "add --trust-remote-code (in Python trust_remote_code=True)."
        )
    advice = NOT_HERE
    if Path(path).is_dir():
        advice = "The folder needs a config.json of a known model_type and whole weights."
    return ModelError(f"The model {path} cannot be loaded: {one_line(error, 300)} {advice}")
