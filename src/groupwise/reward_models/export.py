"""A trained reward model as an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from groupwise.models.load import quiet_transformers
from groupwise.reward_models.learner import RewardLearner
from groupwise.store.written import Rounding, write_folder


def save_reward_model(learner: RewardLearner, target: Path, card: str = "") -> None:
    """Write a learner's reward model as a Hugging Face folder, with tokenizer and separator; an older one is replaced.

    It is in the type of its source, unless that would lose much of what training changed: then in float32. Raises
    RunFolderError where it cannot be written, and ModelError where it is not read back as it is.
    """
    model = learner.model
    dtype = model.stored_dtype if _keeps_most(learner) else torch.float32
    whole = copy.deepcopy(model.model).float()  # the one that trains stays as it is
    own: dict[str, torch.Tensor] = dict(whole.named_parameters()) | dict(whole.named_buffers())
    with torch.no_grad():
        for name, tensor in (learner.optimizer.frozen | learner.master_weights()).items():
            own[name].copy_(tensor)
    write_folder(
        whole, model.codec, target, source=model.source, dtype=dtype, card=card, also=model.write_card, replace=True
    )


def _keeps_most(learner: RewardLearner) -> bool:
    """Whether the type that a reward model's source was stored in has room for what training changed."""
    model = learner.model
    if model.stored_dtype == torch.float32:
        return True
    rounding, master_weights = Rounding(model.stored_dtype), learner.master_weights()
    try:
        with quiet_transformers():
            loaded: Any = type(model.model).from_pretrained(
                model.source, config=model.model.config, dtype=torch.float32, output_loading_info=True
            )
    except OSError:
        return False  # the source has gone since: float32 loses nothing
    source, report = loaded
    for name, before in source.named_parameters():
        if name in master_weights and name not in report["missing_keys"]:
            rounding.add(before.detach(), master_weights[name])
    return rounding.keeps_most
