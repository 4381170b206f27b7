"""Key/value stores of decoding, and the attention of a step over them.

Per layer there is one store for prompts `[slots, H_kv, P, d]` and one for outputs `[rows, H_kv, C, d]`. A step computes
scores against both apart, a prompt's for all its rows in one product, and takes one softmax over them.

Index arrays: `R` live rows, `Q` live prompts, `M` rows of a prompt, `H_kv` heads of keys, `r` heads that share keys."""

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

    `place_R` is where row `r` stands in the flat `row_QM`, which is padded by row 0. Where every prompt has as many
    rows as the others, in order, the fold is `even`: a view.
    """

    row_QM: Tensor
    place_R: Tensor
    even: bool = False

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
            torch.tensor(padded, device=device), torch.tensor([slot * width + m for slot, m in place], device=device),
            even=[row for rows in padded for row in rows] == list(range(len(slots))),
        )  # fmt: skip

    @property
    def slot_R(self) -> Tensor:
        """The prompt of each row."""
        return self.place_R // self.row_QM.shape[1]

    def place_of(self, width: int) -> Tensor:
        """The places in a fold of the same rows that is `width` wide."""
        own = self.row_QM.shape[1]
        return self.place_R // own * width + self.place_R % own

    def gather(self, rows: Tensor) -> Tensor:
        """`[R, H_kv, r, X] -> [Q, H_kv, M * r, X]`."""
        of_prompt: Tensor = rows.unflatten(0, self.row_QM.shape) if self.even else rows[self.row_QM]
        return of_prompt.transpose(1, 2).flatten(2, 3)

    def spread(self, folded: Tensor) -> Tensor:
        """The way back: `[Q, H_kv, M * r, X] -> [R, H_kv, r, X]`."""
        rows: Tensor = folded.unflatten(2, (self.row_QM.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.even else rows[self.place_R]


class Prompts(NamedTuple):
    """The live prompts: their lengths `[Q]`, how far the store is looked at, and whether lengths differ."""

    length_Q: Tensor
    reach: int
    ragged: bool


class Outputs(NamedTuple):
    """The live outputs: their lengths `[R]` before the step, how far the store is looked at, whether lengths differ."""

    length_R: Tensor
    reach: int
    ragged: bool


class Stores(NamedTuple):
    """Both kinds."""

    prompts: Store
    outputs: Store


class Step:
    """One decoding step's attention: each row's own tokens and its prompt's under one softmax."""

    def __init__(self, stores: Stores, fold: Fold, prompts: Prompts, outputs: Outputs) -> None:
        self.stores, self.fold, self.prompts, self.outputs = stores, fold, prompts, outputs
        self._hidden: dict[int | None, Tensor | None] = {}
        self._places: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        rows, heads, _, width = query.shape
        own_k, own_v = self._write(layer, key, value)
        live, reach = len(self.prompts.length_Q), self.prompts.reach
        prompt_k, prompt_v = (stored[:live, :, :reach] for stored in self.stores.prompts.layers[layer])
        scaled = (query[:, :, 0] * options.scale).view(rows, key.shape[1], -1, width)
        prompt_scores = self.fold.gather(scaled) @ prompt_k.transpose(-1, -2)
        parts = [self.fold.spread(prompt_scores), scaled @ own_k.transpose(-1, -2)]
        weights = self._weights(wide(torch.cat(parts, -1)), options).to(value.dtype)
        out = wide(weights[..., reach:] @ own_v)
        out += self.fold.spread(self.fold.gather(weights[..., :reach]) @ prompt_v)
        return out.view(rows, 1, heads, -1).to(query.dtype)

    def _weights(self, scores: Tensor, options: Options) -> Tensor:
        """The softmax of `[R, H_kv, r, P + C]`; sinks take part in its denominator only."""
        if options.softcap is not None:
            scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
        hidden = self._what_is_hidden(options.window)
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        if options.sinks is None:
            return scores.softmax(-1)
        sinks = options.sinks.to(scores.dtype).view(1, scores.shape[1], -1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def _write(self, layer: int, key: Tensor, value: Tensor) -> list[Tensor]:
        """Put each row's new key and value behind its others; returns what the rows have then, `[R, H_kv, C, d]`."""
        rows, found = len(key), []
        for stored, new in zip(self.stores.outputs.at(layer, key, value), (key, value), strict=True):
            if self.outputs.ragged:
                kv_heads, room, width = stored.shape[1:]
                place = self._place(kv_heads, room)
                stored.view(-1, width).index_copy_(0, place, new[:, :, 0].reshape(-1, width))
            else:
                stored[:rows, :, self.outputs.reach - 1] = new[:, :, 0]
            found.append(stored[:rows, :, : self.outputs.reach])
        return found

    def _place(self, kv_heads: int, room: int) -> Tensor:
        """Where a store of `[.., H_kv, room, d]`, laid flat, has the next token of each row and head."""
        if (kv_heads, room) not in self._places:
            length_R = self.outputs.length_R
            entry = torch.arange(len(length_R) * kv_heads, device=length_R.device).view(-1, kv_heads)
            self._places[kv_heads, room] = (entry * room + length_R[:, None]).flatten()
        return self._places[kv_heads, room]

    def _what_is_hidden(self, window: int | None) -> Tensor | None:
        """Columns that a row may not see, bool `[R, 1, 1, P + C]`; None where it may see all."""
        if window not in self._hidden:
            plain = not (self.prompts.ragged or self.outputs.ragged)
            near = window is None or window >= self.prompts.reach + self.outputs.reach
            self._hidden[window] = None if plain and near else self._build_hidden(window)
        return self._hidden[window]

    def _build_hidden(self, window: int | None) -> Tensor:
        length_R = self.outputs.length_R
        prompt_R = self.prompts.length_Q[self.fold.slot_R]
        column = torch.arange(max(self.prompts.reach, self.outputs.reach), device=length_R.device)
        in_prompt, own = column[: self.prompts.reach], column[: self.outputs.reach]
        hidden = torch.cat([in_prompt >= prompt_R[:, None], own > length_R[:, None]], 1)
        if window is not None:
            # Distances from the new token: it stands at `prompt + length`, what it made itself from `prompt` on.
            far = [(prompt_R + length_R)[:, None] - in_prompt >= window, length_R[:, None] - own >= window]
            hidden |= torch.cat(far, 1)
        return hidden[:, None, None]
