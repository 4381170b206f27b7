"""Adapters beside a model's weights, such as LoRA's: said in one sentence, since they are neither trained nor served.

transformers applies one where peft is installed, to a model whose weights then have other names, and passes over it
where peft is not: the same folder would be two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from groupwise.errors import ModelError

ADAPTER: Final = "adapter_config.json"
"""The file by which peft knows a folder."""


def check_no_adapter(path: str, revision: str | None) -> None:
    """Raise ModelError where a folder or hub id holds an adapter, alone or beside whole weights."""
    file = _adapter_file(path, revision)
    if file is None:
        return
    folder = file.parent
    base = _base_of(file)
    merging = (
        f"Merge the two first, in Python: peft.AutoPeftModelForCausalLM.from_pretrained({path!r}).merge_and_unload()"
        ".save_pretrained(folder), and save the tokenizer into that folder too"
    )
    if any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
        raise ModelError(
            f"The model {path} has whole weights and an adapter ({ADAPTER}), and which of them is meant cannot be "
            f"told. For the weights alone, move {ADAPTER} and the adapter's weights out of the folder. {merging}."
        )
    raise ModelError(
        f"The model {path} is an adapter ({ADAPTER}) for {base or 'a base model that it does not name'}, and adapters "
        f"are not trained or served. {merging}."
    )


def _adapter_file(path: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        return Path(path) / ADAPTER if (Path(path) / ADAPTER).is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if try_to_load_from_cache(path, "config.json", revision=revision):
            # The hub need not answer then, and asking it might take long.
            cached = try_to_load_from_cache(path, ADAPTER, revision=revision)
            return Path(cached) if isinstance(cached, str) else None
        return Path(hf_hub_download(path, ADAPTER, revision=revision))
    except (HfHubHTTPError, OSError, ValueError):
        return None  # not there, or not reached: whoever loads the model says that best


def _base_of(file: Path) -> str | None:
    """The model that an adapter was trained on, as far as its file says."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a file that cannot be read is an adapter's all the same
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) and base else None
