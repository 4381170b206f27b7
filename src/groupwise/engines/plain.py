"""Decoding for models that cannot take the shared layout: the model's own cache, each row with its own prompt.

Rows start together and new ones wait until all have ended. A model whose cache is not a plain key/value cache (state
spaces, linear attention) is decoded by running the whole row again: slow, and right."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from groupwise.models.policy import Policy


class PlainDecoder:
    """Decodes rows with stock attention. Prompts are named by the uid of their request."""

    refills = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tokens: dict[str, list[int]] = {}
        self.rows: list[list[int]] = []
        self.cache: DynamicCache | None = None
        self.mask_RK = torch.zeros(0, 0, dtype=torch.long)
        self._takes_positions = "position_ids" in inspect.signature(policy.model.forward).parameters

    def begin(self, prompts: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Compute `(uid, token_ids)` prompts, each once; only when no row is live."""
        assert not self.rows
        self.tokens = {uid: list(ids) for uid, ids in prompts}
        if getattr(self.policy.model, "_is_stateful", False):
            self.cache, self.first_QV = None, self._whole(list(self.tokens.values()))
            return
        width = max(len(ids) for _, ids in prompts)
        padded = [[0] * (width - len(ids)) + list(ids) for _, ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for _, ids in prompts]
        self.mask_RK = torch.tensor(mask, device=self.policy.device)
        out = self._call(torch.tensor(padded, device=self.policy.device), DynamicCache(config=self.policy.model.config))
        self.cache = out.past_key_values if isinstance(out.past_key_values, DynamicCache) else None
        self.first_QV = out.logits[:, -1] if self.cache is not None else self._whole(list(self.tokens.values()))

    def attach(self, uids: Sequence[str], max_tokens: int) -> Tensor:
        """Make the rows, one per uid; returns the logits of their first tokens `[len(uids), V]`."""
        names = list(self.tokens)
        index = torch.tensor([names.index(uid) for uid in uids], device=self.policy.device)
        self.rows = [list(self.tokens[uid]) for uid in uids]
        self._select(index)
        return _wide(self.first_QV[index])

    def step(self, token_R: Tensor) -> Tensor:
        """Feed every row its last token; returns the logits of the next ones `[R, V]`."""
        for row, token in zip(self.rows, token_R.tolist(), strict=True):
            row.append(token)
        if self.cache is None:
            return _wide(self._whole(self.rows))
        self.mask_RK = torch.cat([self.mask_RK, torch.ones_like(self.mask_RK[:, :1])], 1)
        return _wide(self._call(token_R[:, None], self.cache).logits[:, -1])

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows: new row `i` is old row `order[i]`."""
        self.rows = [self.rows[i] for i in order]
        self._select(torch.tensor(order, dtype=torch.long, device=self.policy.device))

    def end(self, uid: str) -> None:
        """Forget a prompt."""
        self.tokens.pop(uid, None)

    def _select(self, index_R: Tensor) -> None:
        if self.cache is not None and len(index_R):
            self.cache.batch_select_indices(index_R)
            self.mask_RK = self.mask_RK[index_R]

    def _call(self, input_ids: Tensor, cache: DynamicCache) -> Any:
        positions: dict[str, Tensor] = {}
        if self._takes_positions:
            columns = (self.mask_RK.cumsum(1) - 1).clamp_min(0)
            positions["position_ids"] = columns[:, -input_ids.shape[1] :]
        return self.policy.model(
            input_ids=input_ids, attention_mask=self.mask_RK, past_key_values=cache, use_cache=True, **positions
        )

    def _whole(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits after each whole row `[R, V]`; rows of one length at a time, so that nothing is padded."""
        out: list[Tensor | None] = [None] * len(rows)
        for length in sorted({len(row) for row in rows}):
            index = [i for i, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([list(rows[i]) for i in index], device=self.policy.device)
            for i, logits in zip(index, self.policy.model(input_ids=ids, use_cache=False).logits[:, -1], strict=True):
                out[i] = logits
        return torch.stack([logits for logits in out if logits is not None])


def _wide(logits: Tensor) -> Tensor:
    # A copy in any case: the caller works in place.
    return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
