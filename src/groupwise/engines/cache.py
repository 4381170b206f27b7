"""Key/value stores of the native engine's shared decoding: a prompt is held once, however many outputs continue it.

Per layer there is one store for prompts `[slots, H_kv, P, d]` and one for outputs `[rows, H_kv, C, d]`. Live rows are
always the first `R` and live prompts the first `Q`: what finishes is overwritten by the last one, so views suffice and
nothing that has ended costs anything. A decoding step attends to both stores apart and merges by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupwise.models.attention import ForestAttention
from groupwise.models.layout import Forest, build_forest
from groupwise.models.policy import Policy
from groupwise.models.precision import wide
from groupwise.models.tiles import Options

_PREFILL_TOKENS = 16384
"""Most prompt tokens of one forward pass: more would take memory and no less time."""
_FIRST_LENGTH = 64
"""Tokens that an output has room for at first; what grows longer gets twice as much, up to the longest limit."""


class Store:
    """Preallocated keys and values of one kind (prompts, or outputs), all layers; grows when a larger need appears."""

    def __init__(self) -> None:
        self.rows, self.length = 0, 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` entries of `length` tokens, keeping what is there."""
        if rows <= self.rows and length <= self.length:
            return
        self.rows, self.length = max(rows, self.rows), max(length, self.length)
        for layer, pair in self.layers.items():
            key, value = (self._grown(old) for old in pair)
            self.layers[layer] = (key, value)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.rows, old.shape[1], self.length, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def at(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's stores, made on first use in the shape `[.., H_kv, .., d]` that the model shows."""
        if layer not in self.layers:
            # Zeros, not garbage: masked entries are multiplied by a weight of 0, and 0 * nan is nan.
            self.layers[layer] = (
                key.new_zeros(self.rows, key.shape[1], self.length, key.shape[3]),
                value.new_zeros(self.rows, value.shape[1], self.length, value.shape[3]),
            )
        return self.layers[layer]

    def move(self, target: int, source: int) -> None:
        """Overwrite entry `target` by entry `source`."""
        for key, value in self.layers.values():
            key[target], value[target] = key[source], value[source]


class _Prefill:
    """Attention over a stream of prompts that also fills the prompt store, from `first` on."""

    def __init__(self, forest: Forest, store: Store, first: int) -> None:
        self.attention, self.store, self.first = ForestAttention(forest), store, first

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        index = self.attention.forest.levels[0].query_RL
        rows = slice(self.first, self.first + index.shape[0])
        for stored, new in zip(self.store.at(layer, key, value), (key, value), strict=True):
            stored[rows, :, : index.shape[1]] = new[0].transpose(0, 1)[index].transpose(1, 2)
        return self.attention.attend(layer, query, key, value, options)


class _Fold:
    """Rows gathered by prompt, `[Q, M]`, and back: a group's queries meet its prompt's keys in one product."""

    def __init__(self, slots: Sequence[int], prompts: int, device: torch.device) -> None:
        members: list[list[int]] = [[] for _ in range(prompts)]
        place = []
        for row, slot in enumerate(slots):
            place.append((slot, len(members[slot])))
            members[slot].append(row)
        self.width = max(map(len, members))
        padded = [rows + [0] * (self.width - len(rows)) for rows in members]
        self.row_QM = torch.tensor(padded, device=device)
        self.place_R = torch.tensor([slot * self.width + m for slot, m in place], device=device)


class _Step:
    """One decoding step's attention: each row's own tokens and its prompt's, merged."""

    def __init__(self, decoder: SharedDecoder, fold: _Fold, length_R: Tensor, reach: int) -> None:
        self.decoder, self.fold, self.length_R, self.reach = decoder, fold, length_R, reach
        self.row_R = torch.arange(len(length_R), device=length_R.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        rows, heads, _, width = query.shape
        kv_heads = key.shape[1]
        own_k, own_v = self.decoder.outputs.at(layer, key, value)
        own_k[self.row_R, :, self.length_R] = key[:, :, 0]
        own_v[self.row_R, :, self.length_R] = value[:, :, 0]
        grouped = (query[:, :, 0] * options.scale).view(rows, kv_heads, heads // kv_heads, width)
        own_k, own_v = (stored[:rows, :, : self.reach] for stored in (own_k, own_v))
        own = _part(grouped, own_k, own_v, self._own_mask(options), options)
        prompt = self._prompt_part(layer, grouped, options)
        sink = None if options.sinks is None else options.sinks.view(1, kv_heads, -1, 1)
        return _merge(own, prompt, sink).view(rows, 1, heads, -1).to(query.dtype)

    def _prompt_part(self, layer: int, grouped: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        fold, lengths_Q = self.fold, self.decoder.prompt_length_Q
        prompts, reach = len(lengths_Q), self.decoder.prompt_reach
        key, value = (x[:prompts, :, :reach] for x in self.decoder.prompts.layers[layer])
        # [R, H_kv, r, d] -> [Q, M, H_kv, r, d] -> [Q, H_kv, M * r, d]
        folded = grouped[fold.row_QM].transpose(1, 2).flatten(2, 3)
        visible = self._prompt_mask(options, grouped.shape[2])
        out, lse = (x.unflatten(2, (fold.width, -1)) for x in _part(folded, key, value, visible, options))
        return out.transpose(1, 2).flatten(0, 1)[fold.place_R], lse.transpose(1, 2).flatten(0, 1)[fold.place_R]

    def _prompt_mask(self, options: Options, heads_per_key: int) -> Tensor | None:
        """What the folded rows may see of their prompts, `[Q, 1, 1 or M * r, P]`; None where that is all of it."""
        lengths_Q = self.decoder.prompt_length_Q
        if not self.decoder.ragged and options.window is None:
            return None
        column = torch.arange(self.decoder.prompt_reach, device=lengths_Q.device)
        visible = (column < lengths_Q[:, None])[:, None, None]
        if options.window is not None:
            position_QM = lengths_Q[:, None] + self.length_R[self.fold.row_QM]
            near = position_QM[:, :, None] - column < options.window
            visible = visible & near[:, None].repeat_interleave(heads_per_key, 2)
        return visible

    def _own_mask(self, options: Options) -> Tensor:
        column = torch.arange(self.reach, device=self.length_R.device)
        visible = column <= self.length_R[:, None]
        if options.window is not None:
            visible = visible & (self.length_R[:, None] - column < options.window)
        return visible[:, None, None]


def _part(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries `[B, H, M, d]` over one store: result `[B, H, M, d_v]` and log-sum-exp `[.., 1]`."""
    scores = wide(q @ k.transpose(-1, -2))
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    # Where a window hides everything the maximum is -inf; any finite number gives weights of 0 then.
    top = scores.amax(-1, keepdim=True).clamp_min(-1e30)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = wide(weights.to(v.dtype) @ v) / total.clamp_min(1e-30)
    return out, top + total.log()


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], sink: Tensor | None) -> Tensor:
    """Two partial attentions as one; a sink takes part in the denominator only."""
    top = torch.maximum(a[1], b[1])
    if sink is not None:
        top = torch.maximum(top, sink)
    weight_a, weight_b = (a[1] - top).exp(), (b[1] - top).exp()
    total = weight_a + weight_b + (0 if sink is None else (sink - top).exp())
    return (a[0] * weight_a + b[0] * weight_b) / total


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
        self._fold: _Fold | None = None

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
            self._row_slots = [slot_of[uid] for uid in self.row_uid]
            self._fold = _Fold(self._row_slots, len(self.slots), device)
            self._slot_R = torch.tensor(self._row_slots, device=device)
        length_R = torch.tensor(self.lengths, device=device)
        position_R = self.prompt_length_Q[self._slot_R] + length_R
        reach = max(self.lengths) + 1
        if reach > self.outputs.length:
            self.outputs.reserve(len(self.row_uid), min(self._longest, 2 * self.outputs.length))
        layout = _Step(self, self._fold, length_R, reach)
        hidden = self.policy.hidden(token_R[:, None], position_R[:, None], layout)
        self.lengths = [n + 1 for n in self.lengths]
        return self.policy.logits(hidden[:, 0])

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
