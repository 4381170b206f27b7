"""Key/value stores of decoding, and the attention of a step over them.

Per layer there is one store for prompts `[slots, H_kv, P, d]` and one for outputs `[rows, H_kv, C, d]`. A step attends
to both apart and merges by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from groupwise.models.precision import wide
from groupwise.models.tiles import Options


class Store:
    """Preallocated keys and values of one kind (prompts, or outputs), all layers; grows when a larger need appears.

    `version` counts how often it grew: what lies in memory elsewhere then.
    """

    def __init__(self) -> None:
        self.rows, self.length = 0, 0
        self.version = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` entries of `length` tokens, keeping what is there."""
        if rows <= self.rows and length <= self.length:
            return
        self.rows, self.length = max(rows, self.rows), max(length, self.length)
        self.version += 1
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


@dataclass(frozen=True)
class Fold:
    """Rows gathered by prompt, `[Q, M]`, and back: a group's queries meet its prompt's keys in one product.

    `place_R` is where row `r` stands in the flat `row_QM`, which is padded by row 0.
    """

    row_QM: Tensor
    place_R: Tensor

    @classmethod
    def of(cls, slots: Sequence[int], prompts: int, device: torch.device) -> Fold:
        """Rows whose prompts are in `slots`, of `prompts` live ones."""
        members: list[list[int]] = [[] for _ in range(prompts)]
        place = []
        for row, slot in enumerate(slots):
            place.append((slot, len(members[slot])))
            members[slot].append(row)
        width = max(map(len, members))
        padded = [rows + [0] * (width - len(rows)) for rows in members]
        return cls(
            torch.tensor(padded, device=device), torch.tensor([slot * width + m for slot, m in place], device=device)
        )

    def place_of(self, width: int) -> Tensor:
        """The places in a fold of the same rows that is `width` wide."""
        own = self.row_QM.shape[1]
        return self.place_R // own * width + self.place_R % own


class Prompts(NamedTuple):
    """The live prompts: their lengths `[Q]`, how far the store is looked at, and whether lengths differ."""

    length_Q: Tensor
    reach: int
    ragged: bool


class Stores(NamedTuple):
    """Both kinds."""

    prompts: Store
    outputs: Store


class Step:
    """One decoding step's attention: each row's own tokens and its prompt's, merged."""

    def __init__(self, stores: Stores, fold: Fold, length_R: Tensor, reach: int, prompts: Prompts) -> None:
        self.stores, self.fold, self.length_R, self.reach, self.prompts = stores, fold, length_R, reach, prompts
        self.row_R = torch.arange(len(length_R), device=length_R.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        rows, heads, _, width = query.shape
        kv_heads = key.shape[1]
        own_k, own_v = self.stores.outputs.at(layer, key, value)
        own_k[self.row_R, :, self.length_R] = key[:, :, 0]
        own_v[self.row_R, :, self.length_R] = value[:, :, 0]
        grouped = (query[:, :, 0] * options.scale).view(rows, kv_heads, heads // kv_heads, width)
        own_k, own_v = (stored[:rows, :, : self.reach] for stored in (own_k, own_v))
        own = _part(grouped, own_k, own_v, self._own_mask(options), options)
        prompt = self._prompt_part(layer, grouped, options)
        sink = None if options.sinks is None else options.sinks.view(1, kv_heads, -1, 1)
        return _merge(own, prompt, sink).view(rows, 1, heads, -1).to(query.dtype)

    def _prompt_part(self, layer: int, grouped: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        fold, live = self.fold, len(self.prompts.length_Q)
        key, value = (x[:live, :, : self.prompts.reach] for x in self.stores.prompts.layers[layer])
        # [R, H_kv, r, d] -> [Q, M, H_kv, r, d] -> [Q, H_kv, M * r, d]
        folded = grouped[fold.row_QM].transpose(1, 2).flatten(2, 3)
        visible = self._prompt_mask(options, grouped.shape[2])
        out, lse = (x.unflatten(2, (fold.row_QM.shape[1], -1)) for x in _part(folded, key, value, visible, options))
        return out.transpose(1, 2).flatten(0, 1)[fold.place_R], lse.transpose(1, 2).flatten(0, 1)[fold.place_R]

    def _prompt_mask(self, options: Options, heads_per_key: int) -> Tensor | None:
        """What the folded rows may see of their prompts, `[Q, 1, 1 or M * r, P]`; None where that is all of it."""
        lengths_Q = self.prompts.length_Q
        if not self.prompts.ragged and options.window is None:
            return None
        column = torch.arange(self.prompts.reach, device=lengths_Q.device)
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
