"""How large a model is, before any weight is read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from groupwise.errors import ModelError
from groupwise.models.multimodal import check_causal
from groupwise.wording import one_line


def parameter_count(config: PreTrainedConfig, trust_remote_code: bool = False, auto: Any = AutoModelForCausalLM) -> int:
    """Parameters of the model that a configuration describes, tied ones once; causal, unless `auto` is another class of
    transformers'. Raises ModelError."""
    if auto is AutoModelForCausalLM:
        check_causal(config, config.name_or_path or config.model_type)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Named boundary: transformers knows no such class for this configuration, or its values do not fit together,
        # which each class says in its own way.
        what = "causal language model" if auto is AutoModelForCausalLM else "reward model"
        raise ModelError(
            f"No {what} can be made from a configuration of type {config.model_type}: {one_line(error, 300)}"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(parameters: int, dtype: torch.dtype, reference: bool) -> dict[str, int]:
    """Bytes of all that is as large as the model and stays: weights, gradients, first and second moments, copies."""
    narrow = dtype.itemsize if dtype.itemsize < torch.float32.itemsize else 0
    return {
        "master weights": 4 * parameters,
        "gradients": 4 * parameters,
        "Adam's two means": 8 * parameters,
        "narrow copy": narrow * parameters,
        "reference": dtype.itemsize * parameters if reference else 0,
    }
