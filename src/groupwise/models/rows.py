"""Rows of stock attention under way: by the model's own key/value cache, or by running every row again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from groupwise.models.layout import Tokens


class CachedRows:
    """Rows that a model continues by its cache. Prompts of unlike lengths are padded on the left.

    Not every model's cache can be used so: see `groupwise.models.probe`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes_positions = _takes(model, "position_ids")

    def begin(self, prompts: Sequence[Tokens]) -> Tensor:
        """Compute prompts, one row each; returns the logits of their next tokens `[R, V]`."""
        width = max(map(len, prompts))
        device = self.model.device
        self.cache = DynamicCache(config=self.model.config)
        self.mask_RK = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        return self._call(torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device))

    def select(self, index_R: Tensor) -> None:
        """Go on with these rows: new row `i` is old row `index_R[i]`, and one may come several times."""
        self.cache.batch_select_indices(index_R)
        self.mask_RK = self.mask_RK[index_R]

    def step(self, token_R: Tensor) -> Tensor:
        """Feed every row a token; returns the logits of the next ones `[R, V]`."""
        self.mask_RK = torch.cat([self.mask_RK, torch.ones_like(self.mask_RK[:, :1])], 1)
        return self._call(token_R[:, None])

    def _call(self, input_ids: Tensor) -> Tensor:
        positions: dict[str, Tensor] = {}
        if self._takes_positions:
            columns = (self.mask_RK.cumsum(1) - 1).clamp_min(0)
            positions["position_ids"] = columns[:, -input_ids.shape[1] :]
        return _last_logits(
            self.model, input_ids, attention_mask=self.mask_RK, past_key_values=self.cache, use_cache=True, **positions
        )


def whole_rows(model: PreTrainedModel, rows: Sequence[Tokens]) -> Tensor:
    """Logits after each whole row `[R, V]`; rows of one length at a time, so that nothing is padded."""
    found: dict[int, Tensor] = {}
    for length in sorted({len(row) for row in rows}):
        index = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([list(rows[i]) for i in index], device=model.device)
        found |= dict(zip(index, _last_logits(model, ids, use_cache=False), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def _last_logits(model: PreTrainedModel, input_ids: Tensor, **keywords: Any) -> Tensor:
    # A vocabulary wide and a prompt long, all logits may be larger than the model.
    if _takes(model, "logits_to_keep"):
        keywords["logits_to_keep"] = 1
    out: Any = model(input_ids=input_ids, **keywords)
    return out.logits[:, -1]  # type: ignore[no-any-return]


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
