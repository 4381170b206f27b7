"""Rows of stock attention under way: by the model's own key/value cache, or by running every row again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from groupwise.models.layout import Tokens


class CachedRows:
    """Rows that a model continues by its cache. Prompts of unlike lengths are padded on the left.

    `aligned` keeps a cache per length of prompt instead, so that every row begins at position 0 of its own: for models
    of which padding moves something (blocks of keys, states, a temperature by position). It takes a call per length.
    Not every model's cache can be used at all: see `groupwise.models.probe`.
    """

    def __init__(self, model: PreTrainedModel, aligned: bool = False) -> None:
        self.model, self.aligned = model, aligned
        self._takes_positions = _takes(model, "position_ids")
        self._keyword = "past_key_values" if _takes(model, "past_key_values") else "cache_params"

    def begin(self, prompts: Sequence[Tokens]) -> Tensor:
        """Compute prompts, one row each; returns the logits of their next tokens `[R, V]`."""
        sizes = sorted({len(prompt) for prompt in prompts}) if self.aligned else [max(map(len, prompts))]
        self.parts, ids = list[_Part](), list[Tensor]()
        device = self.model.device
        for width in sizes:
            places = [i for i, prompt in enumerate(prompts) if len(prompt) == width or not self.aligned]
            padded = [(width - len(prompts[i]), prompts[i]) for i in places]
            mask_RK = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in padded], device=device)
            ids.append(torch.tensor([[0] * pad + list(prompt) for pad, prompt in padded], device=device))
            place_R = torch.tensor(places, device=device)
            self.parts.append(_Part(DynamicCache(config=self.model.config), mask_RK, place_R))
        return self._call(ids)

    def select(self, index_R: Tensor) -> None:
        """Go on with these rows: new row `i` is old row `index_R[i]`, and one may come several times."""
        parts = []
        for part in self.parts:
            # Where the new rows that are of this part are, and which of its own rows each of them is.
            place_R, row_R = (index_R[:, None] == part.place_R).nonzero(as_tuple=True)
            if len(place_R):
                # A layer that has both selects its recurrent states by this method only.
                part.cache.reorder_cache(row_R)  # type: ignore[arg-type]
                parts.append(_Part(part.cache, part.mask_RK[row_R], place_R))
        self.parts = parts

    def step(self, token_R: Tensor) -> Tensor:
        """Feed every row a token; returns the logits of the next ones `[R, V]`."""
        self.parts = [part.longer() for part in self.parts]
        return self._call([token_R[part.place_R, None] for part in self.parts])

    def _call(self, ids: Sequence[Tensor]) -> Tensor:
        """The logits of each part's new tokens `[R', L]`, by the places of their rows."""
        found = [self._logits(part, part_ids) for part, part_ids in zip(self.parts, ids, strict=True)]
        if len(found) == 1:
            return found[0]
        return torch.cat(found)[torch.cat([part.place_R for part in self.parts]).argsort()]

    def _logits(self, part: _Part, input_ids: Tensor) -> Tensor:
        keywords: dict[str, Any] = {self._keyword: part.cache}
        if self._takes_positions:
            columns = (part.mask_RK.cumsum(1) - 1).clamp_min(0)
            keywords["position_ids"] = columns[:, -input_ids.shape[1] :]
        # A model without any attention takes a mask of the tokens it is given: none of those of a step is padding.
        if self._keyword == "past_key_values" or input_ids.shape == part.mask_RK.shape:
            keywords["attention_mask"] = part.mask_RK
        return _last_logits(self.model, input_ids, use_cache=True, **keywords)


class _Part(NamedTuple):
    """Rows of one cache, which of its columns are theirs, and the rows' places among all. Ascending, so with one part
    they are in order."""

    cache: DynamicCache
    mask_RK: Tensor
    place_R: Tensor

    def longer(self) -> _Part:
        """With a column for one more token."""
        return self._replace(mask_RK=torch.cat([self.mask_RK, torch.ones_like(self.mask_RK[:, :1])], 1))


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
