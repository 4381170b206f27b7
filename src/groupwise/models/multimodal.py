"""Models that read more than text: what of them is trained, and how the rest of them comes back at export."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from groupwise.errors import ModelError
from groupwise.wording import one_line

_TOWER = re.compile(r"vision|visual|image|audio|video|vq_config|vqmodel")


def towers(config: PreTrainedConfig) -> tuple[str, ...]:
    """What a model reads besides text, as its configuration calls it: `("vision", "audio")`; empty for a text model."""
    names = [n for n in type(config).sub_configs if _TOWER.search(n) and getattr(config, n, None) is not None]
    return tuple(name.removesuffix("_config") for name in names)


def check_causal(config: PreTrainedConfig, path: str) -> None:
    """Raise ModelError where a type has no class that continues text by itself."""
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise ModelError(
            f"The model {path} ({config.model_type}) cannot be trained: it has several text models, and none of them "
            "continues text by itself."
        ) from error
    own_code: Any = getattr(config, "auto_map", None) or {}
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in own_code:
        return
    why = "transformers has no causal language model of this type."
    if beside := towers(config):
        why = (
            f"it reads {' and '.join(beside)} besides text, and transformers has no class of it for text alone. Save "
            f"its language model ({text.model_type}) as a folder of its own with its tokenizer, and train that."
        )
    raise ModelError(f"The model {path} ({config.model_type}) cannot be trained as it is: {why}")


def freeze_towers(model: PreTrainedModel) -> int:
    """Have only the text model of a model train, since training is on text; returns how many parameters do not.

    Without it, weight decay would shrink what never gets a gradient.
    """
    if not towers(model.config):
        return 0
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    frozen = [p for name, p in model.named_parameters() if id(p) not in text or _TOWER.search(name)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)


def remark(config: PreTrainedConfig, frozen: int) -> str:
    """What to say at load of a model that reads more than text; empty for others."""
    if not (beside := towers(config)):
        return ""
    parts = " and ".join(beside)
    rest = f"its {frozen / 1e6:.1f}M parameters for {parts} stay as they are" if frozen else f"{parts} is not loaded"
    return f"it reads {parts} besides text: only its text model is trained, {rest}, and export writes them as they were"


def with_towers(
    model: PreTrainedModel, source: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, str]:
    """The model of which `model` is the text part, as its source has it but for that part, for export; `model` itself
    where it is whole. The second is a sentence, empty where nothing is lost."""
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(source, **options)
    named = (config.architectures or [""])[0]
    if not towers(config) or named == type(model).__name__:
        return model, ""
    alone = f"exported without {' and '.join(towers(config))}, as {type(model).__name__}: "
    kind = getattr(transformers, named, None)
    if kind is None:
        return model, f"{alone}its config.json names no class of transformers ({named or 'none'})"
    try:
        whole: PreTrainedModel = kind.from_pretrained(source, dtype=torch.float32, **options)
    except Exception as error:  # noqa: BLE001 - a boundary: a class may need what is not installed
        return model, f"{alone}{named} cannot be loaded ({one_line(error, 200)})"
    ours, theirs = model.get_decoder(), whole.get_decoder()
    new, old = ({n: t.shape for n, t in part.state_dict().items()} for part in (ours, theirs))
    if new != old:
        return model, f"{alone}the text model of {named} is another"
    theirs.load_state_dict(ours.state_dict())
    head, own = whole.get_output_embeddings(), model.get_output_embeddings()
    if head is not None and own is not None:
        head.load_state_dict(own.state_dict())
    return whole, ""
