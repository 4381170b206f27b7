"""A float32 model to the type that it computes in, as its class has it there."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def cast_to_compute_dtype(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast a module's parameters and buffers to `dtype`, except what its class keeps in float32.

    Of parameters that is what transformers' `_keep_in_fp32_modules_strict` names (routers, mostly), of buffers also
    whatever the class makes in float32 in any case, such as rotary frequencies. Returns the persistent buffers that
    were cast, as they were: a checkpoint has those.
    """
    kept: dict[str, Tensor] = {}
    if dtype.itemsize >= torch.float32.itemsize:
        return kept
    wide = _kept_wide(module)
    for name, parameter in module.named_parameters():
        if not wide(name):
            parameter.data = parameter.data.to(dtype)
    if not isinstance(module, PreTrainedModel):
        return kept
    stored = module.state_dict().keys()
    made_in = _buffer_types(module, dtype)
    for name, buffer in module.named_buffers():
        if buffer.dtype == torch.float32 and made_in.get(name) == dtype and not wide(name):
            if name in stored:
                kept[name] = buffer.clone()
            buffer.data = buffer.data.to(dtype)
    return kept


def _kept_wide(module: nn.Module) -> Callable[[str], bool]:
    names = sorted(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names)) if names else None
    return lambda name: pattern is not None and pattern.search(name) is not None


def _buffer_types(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What the class makes its buffers in where it is made in `dtype`; nothing is allocated."""
    if not any(buffer.is_floating_point() for buffer in model.buffers()):
        return {}
    with torch.device("meta"):
        other = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    return {name: buffer.dtype for name, buffer in other.named_buffers()}
