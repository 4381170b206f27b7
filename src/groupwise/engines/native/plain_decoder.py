"""Decoding for models that cannot take the shared layout: stock attention, each row with its own prompt.

Rows start together and new ones wait until all have ended. A model whose own cache was not seen to be right (state
spaces, linear attention, sparse attention) is decoded by running the whole row again: slow, and right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from groupwise.models.policy import Policy
from groupwise.models.stock_decode import CachedRows, whole_rows
from groupwise.precision import wide_dtype
from groupwise.types import Branch

NONE: Mapping[str, Branch] = MappingProxyType({})


class PlainDecoder:
    """Decodes rows with stock attention. Prompts are named by the uid of their request."""

    refills = False

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tokens: dict[str, list[int]] = {}
        self.rows: list[list[int]] = []
        self.cache: CachedRows | None = None

    def begin(self, prompts: Sequence[tuple[str, Sequence[int]]], branches: Mapping[str, Branch] = NONE) -> None:
        """Compute `(uid, token_ids)` prompts, each once; only when no row is live. `branches` tell what prompts have in
        common, of which nothing is made here."""
        assert not self.rows
        self.tokens = {uid: list(ids) for uid, ids in prompts}
        rows = list(self.tokens.values())
        self.cache = CachedRows(self.policy.model, self.policy.aligned) if self.policy.cached else None
        self.first_QV = whole_rows(self.policy.model, rows) if self.cache is None else self.cache.begin(rows)

    def attach(self, uids: Sequence[str], max_tokens: int) -> Tensor:
        """Make the rows, one per uid; returns the logits of their first tokens `[len(uids), V]`."""
        names = list(self.tokens)
        self.rows = [list(self.tokens[uid]) for uid in uids]
        index_R = self._select([names.index(uid) for uid in uids])
        return _own(self.first_QV[index_R])

    def step(self, token_R: Tensor) -> Tensor:
        """Feed every row its last token; returns the logits of the next ones `[R, V]`."""
        for row, token in zip(self.rows, token_R.tolist(), strict=True):
            row.append(token)
        return _own(whole_rows(self.policy.model, self.rows) if self.cache is None else self.cache.step(token_R))

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows: new row `i` is old row `order[i]`."""
        self.rows = [self.rows[i] for i in order]
        if not order:
            self.cache = None  # nothing decodes from it any more, and it may be large
        self._select(order)

    def end(self, uid: str) -> None:
        """Forget a prompt."""
        self.tokens.pop(uid, None)

    def _select(self, index: Sequence[int]) -> Tensor:
        index_R = torch.tensor(index, dtype=torch.long, device=self.policy.device)
        if self.cache is not None:
            self.cache.select(index_R)
        return index_R


def _own(logits: Tensor) -> Tensor:
    # A copy in any case: the caller works in place.
    return logits.to(wide_dtype(logits.dtype), copy=True)
