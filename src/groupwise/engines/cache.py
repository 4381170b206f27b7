"""The native engine's shared decoding: a prompt is computed once and held once, however many outputs continue it.

Live rows are always the first `R` of their store and live prompts the first `Q`: what finishes is overwritten by the
last one, so views suffice and nothing that has ended costs anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupwise.engines.graphs import Graphs, Live
from groupwise.engines.stores import Fold, Outputs, Prompts, Step, Store, Stores
from groupwise.models.attention import ForestAttention
from groupwise.models.layout import Forest, build_forest
from groupwise.models.policy import Policy
from groupwise.models.tiles import Options

_PREFILL_TOKENS = 16384
"""Most prompt tokens of one forward pass: more would take memory and no less time."""
_FIRST_LENGTH = 64
"""Tokens that an output has room for at first; what grows longer gets twice as much, up to the longest limit."""


class _Prefill:
    """Attention over a stream of prompts that also fills the prompt store, from `first` on."""

    def __init__(self, forest: Forest, store: Store, first: int) -> None:
        self.attention, self.store, self.first = ForestAttention(forest), store, first
        length_Q = torch.tensor(forest.lengths)
        column = torch.arange(max(forest.lengths))
        index_QL = (length_Q.cumsum(0) - length_Q)[:, None] + column
        # What stands behind a shorter prompt is never looked at; its first token does as well as any.
        self.index_QL = index_QL.where(column < length_Q[:, None], 0).to(forest.position_N.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        rows = slice(self.first, self.first + len(self.index_QL))
        for stored, new in zip(self.store.at(layer, key, value), (key, value), strict=True):
            stored[rows, :, : self.index_QL.shape[1]] = new[0].transpose(0, 1)[self.index_QL].transpose(1, 2)
        return self.attention.attend(layer, query, key, value, options)


class SharedDecoder:
    """Decodes rows that hang from prompts of the store. Prompts are named by the uid of their request."""

    refills = True

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.prompts, self.outputs = Store(), Store()
        self.slots: list[str] = []
        self.prompt_length_Q = torch.zeros(0, dtype=torch.long, device=policy.device)
        self.prompt_reach, self.ragged = 0, False
        self.hidden_QD: Tensor | None = None
        self.row_uid: list[str] = []
        self.lengths: list[int] = []
        self._longest = 0
        self._fold: Fold | None = None
        self.graphs = Graphs(policy) if policy.device.type == "cuda" else None

    def begin(self, prompts: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Compute `(uid, token_ids)` prompts, each once, into the store."""
        self.prompts.reserve(len(self.slots) + len(prompts), max(len(ids) for _, ids in prompts))
        part: list[tuple[str, Sequence[int]]] = []
        for prompt in prompts:
            if part and sum(len(ids) for _, ids in part) + len(prompt[1]) > _PREFILL_TOKENS:
                self._prefill(part)
                part = []
            part.append(prompt)
        self._prefill(part)

    def _prefill(self, prompts: Sequence[tuple[str, Sequence[int]]]) -> None:
        lengths = [len(ids) for _, ids in prompts]
        first = len(self.slots)
        device = self.policy.device
        forest = build_forest(lengths, [-1] * len(prompts), device)
        ids = torch.tensor([[t for _, tokens in prompts for t in tokens]], device=device)
        hidden = self.policy.hidden(ids, forest.position_N[None], _Prefill(forest, self.prompts, first))[0]
        last = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]
        self.hidden_QD = last if first == 0 else torch.cat([self.hidden_QD[:first], last])  # type: ignore[index]
        self.slots += [uid for uid, _ in prompts]
        self._set_prompt_lengths([*self.prompt_length_Q.tolist(), *lengths])

    def attach(self, uids: Sequence[str], max_tokens: int) -> Tensor:
        """Add a row per uid behind the live ones; returns the logits of their first tokens `[len(uids), V]`."""
        self.row_uid += uids
        self.lengths += [0] * len(uids)
        self._longest = max(self._longest, max_tokens)
        self.outputs.reserve(len(self.row_uid), min(self._longest, _FIRST_LENGTH))
        self._fold = None
        assert self.hidden_QD is not None
        index = torch.tensor([self.slots.index(uid) for uid in uids], device=self.hidden_QD.device)
        # One head product per prompt, not per row.
        unique, inverse = index.unique(return_inverse=True)
        return self.policy.logits(self.hidden_QD[unique])[inverse]

    def step(self, token_R: Tensor) -> Tensor:
        """Feed every live row its last token; returns the logits of the next ones `[R, V]`."""
        device = token_R.device
        if self._fold is None:
            slot_of = {uid: slot for slot, uid in enumerate(self.slots)}
            self._fold = Fold.of([slot_of[uid] for uid in self.row_uid], len(self.slots), device)
            self._prompt_R = self.prompt_length_Q[self._fold.slot_R]
        length_R = torch.tensor(self.lengths, device=device)
        position_R = self._prompt_R + length_R
        reach = max(self.lengths) + 1
        ragged = min(self.lengths) + 1 < reach
        if reach > self.outputs.length:
            self.outputs.reserve(len(self.row_uid), min(self._longest, 2 * self.outputs.length))
        self.lengths = [n + 1 for n in self.lengths]
        logits_RV = self._replayed(reach, token_R, length_R, position_R)
        if logits_RV is None:
            prompts = Prompts(self.prompt_length_Q, self.prompt_reach, self.ragged)
            outputs = Outputs(length_R, reach, ragged)
            layout = Step(Stores(self.prompts, self.outputs), self._fold, prompts, outputs)
            hidden = self.policy.hidden(token_R[:, None], position_R[:, None], layout)
            logits_RV = self.policy.logits(hidden[:, 0])
        return logits_RV

    def _replayed(self, reach: int, token_R: Tensor, length_R: Tensor, position_R: Tensor) -> Tensor | None:
        """The step by a captured graph, where there is one for it."""
        if self.graphs is None or self.graphs.refused:
            return None
        assert self._fold is not None
        bucket = self.graphs.bucket(self._fold, reach, self._longest)
        self.outputs.reserve(bucket.rows, bucket.reach)
        self.prompts.reserve(bucket.prompts, self.prompts.length)
        live = Live(self._fold, token_R, length_R, position_R, self.prompt_length_Q)
        return self.graphs.step(Stores(self.prompts, self.outputs), bucket, live)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these rows: new row `i` is old row `order[i]`, which stays where it is or comes from the end."""
        for target, source in enumerate(order):
            if target != source:
                assert source >= len(order), "a row that is kept would be overwritten before it is read"
                self.outputs.move(target, source)
        self.row_uid = [self.row_uid[i] for i in order]
        self.lengths = [self.lengths[i] for i in order]
        self._fold = None

    def end(self, uid: str) -> None:
        """Forget a prompt; the last one takes its place."""
        slot, last = self.slots.index(uid), len(self.slots) - 1
        lengths = self.prompt_length_Q.tolist()
        if slot != last:
            assert self.hidden_QD is not None
            self.prompts.move(slot, last)
            self.hidden_QD[slot] = self.hidden_QD[last]
            self.slots[slot], lengths[slot] = self.slots[last], lengths[last]
        self.slots.pop()
        self._set_prompt_lengths(lengths[:last])
        self._fold = None

    def _set_prompt_lengths(self, lengths: list[int]) -> None:
        self.prompt_length_Q = torch.tensor(lengths, dtype=torch.long, device=self.policy.device)
        self.prompt_reach = max(lengths, default=0)
        self.ragged = any(n != self.prompt_reach for n in lengths)
