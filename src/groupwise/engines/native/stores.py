"""Key/value stores of decoding, and the attention of a step over them.

Per layer there is one store for prompts `[slots, H_kv, P, d]` and one for outputs `[rows, H_kv, C, d]`; where rows go
on from inside outputs that are there already, those have a store between the two. A step computes scores against each
apart, those of a shared entry for all its rows in one product, and takes one softmax over them.

Index arrays: `R` live rows, `Q` live entries of a shared store, `M` rows of an entry, `H_kv` heads of keys, `r` heads
that share keys."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from groupwise.cpu.kernels import Kernels, KeyRange, KeyRanges, kernels_for
from groupwise.models.tiles import Options
from groupwise.precision import wide, wide_dtype


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
                key.new_zeros(self.rows, key.shape[1], self.length, key.shape[-1]),
                value.new_zeros(self.rows, value.shape[1], self.length, value.shape[-1]),
            )
        return self.layers[layer]

    def move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Overwrite the entries `targets` by the entries `sources`, which are read first."""
        for pair in self.layers.values():
            into, come = (torch.tensor(places, device=pair[0].device) for places in (targets, sources))
            for stored in pair:
                stored.index_copy_(0, into, stored.index_select(0, come))


class Shared:
    """A store of what rows share, each entry with a name and a length. Live entries are the first ones: the last takes
    the place of what is freed."""

    def __init__(self) -> None:
        self.store = Store()
        self.names: list[Hashable] = []
        self.lengths: list[int] = []

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for entries behind the live ones."""
        self.store.reserve(len(self.names) + len(lengths), max(lengths))

    def add(self, names: Sequence[Hashable], lengths: Sequence[int]) -> int:
        """Name entries behind the live ones; returns the place of the first."""
        first = len(self.names)
        self.reserve(lengths)
        self.names += names
        self.lengths += lengths
        return first

    def free(self, name: Hashable) -> None:
        """Forget an entry."""
        slot, last = self.names.index(name), len(self.names) - 1
        if slot != last:
            self.store.move([slot], [last])
            self.names[slot], self.lengths[slot] = self.names[last], self.lengths[last]
        self.names.pop()
        self.lengths.pop()

    def level(self, names: Sequence[Hashable], seen: Sequence[int], device: torch.device) -> SharedLevel:
        """How a step looks at it: per row, the name of its entry and how many of its tokens the row sees; None and 0
        for a row that uses none. Entries that no row uses now move behind those that are used, and cost nothing."""
        used = {name for name in names if name is not None}
        holes = [slot for slot, name in enumerate(self.names[: len(used)]) if name not in used]
        if holes:
            behind = [slot for slot in range(len(used), len(self.names)) if self.names[slot] in used]
            self._swap(holes, behind)
        slot_of = {name: slot for slot, name in enumerate(self.names[: len(used)])}
        fold = PromptFold.of([0 if name is None else slot_of[name] for name in names], len(used), device)
        reach = max(seen)
        return SharedLevel(self.store, fold, torch.tensor(seen, device=device), reach, min(seen) < reach)

    def _swap(self, some: Sequence[int], others: Sequence[int]) -> None:
        self.store.move([*some, *others], [*others, *some])
        for one, other in zip(some, others, strict=True):
            self.names[one], self.names[other] = self.names[other], self.names[one]
            self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]


@dataclass(frozen=True)
class PromptFold:
    """Rows gathered by the entry that they share, `[Q, M]`, and back: a group's queries meet its prompt's keys in one
    product.

    `place_R` is where row `r` stands in the flat `row_QM`, which is padded by row 0. Where every entry has as many
    rows as the others, in order, the fold is `even`: a view. `known_slot_R` are the entries; where it is None they
    follow from the places.
    """

    row_QM: Tensor
    place_R: Tensor
    even: bool = False
    known_slot_R: Tensor | None = None

    @classmethod
    def of(cls, slots: Sequence[int], live: int, device: torch.device) -> PromptFold:
        """Rows whose entries are in `slots`, of `live` ones."""
        members: list[list[int]] = [[] for _ in range(live)]
        place = []
        for row, slot in enumerate(slots):
            place.append((slot, len(members[slot])))
            members[slot].append(row)
        width = max(map(len, members))
        padded = [rows + [0] * (width - len(rows)) for rows in members]
        return cls(
            torch.tensor(padded, device=device), torch.tensor([slot * width + m for slot, m in place], device=device),
            even=[row for rows in padded for row in rows] == list(range(len(slots))),
            known_slot_R=torch.tensor(slots, device=device),
        )  # fmt: skip

    @property
    def slot_R(self) -> Tensor:
        """Each row's entry."""
        return self.place_R // self.row_QM.shape[1] if self.known_slot_R is None else self.known_slot_R

    def place_of(self, width: int) -> Tensor:
        """The places in a fold of the same rows that is `width` wide."""
        own = self.row_QM.shape[1]
        return self.place_R // own * width + self.place_R % own

    def gather(self, rows: Tensor) -> Tensor:
        """`[R, H_kv, r, X] -> [Q, H_kv, M * r, X]`."""
        of_entry: Tensor = rows.unflatten(0, self.row_QM.shape) if self.even else rows[self.row_QM]
        return of_entry.transpose(1, 2).flatten(2, 3)

    def spread(self, folded: Tensor) -> Tensor:
        """The way back: `[Q, H_kv, M * r, X] -> [R, H_kv, r, X]`."""
        rows: Tensor = folded.unflatten(2, (self.row_QM.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.even else rows[self.place_R]

    def spread_into(self, place: Tensor, folded: Tensor) -> None:
        """The way back into a place of that shape, which may be wider in type: where even, in one copy."""
        if self.even:
            place.unflatten(0, self.row_QM.shape).copy_(folded.unflatten(2, (self.row_QM.shape[1], -1)).transpose(1, 2))
        else:
            place.copy_(self.spread(folded))


class SharedLevel(NamedTuple):
    """What rows share of one kind: the store, how rows fold over its entries, how many tokens of its entry each row
    sees `[R]`, how far the store is looked at, and whether some rows see less."""

    store: Store
    fold: PromptFold
    seen_R: Tensor
    reach: int
    ragged: bool

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the live entries, `[Q, H_kv, reach, d]`."""
        key, value = self.store.layers[layer]
        live = len(self.fold.row_QM)
        return key[:live, :, : self.reach], value[:live, :, : self.reach]


class Outputs(NamedTuple):
    """The live outputs: their store, their lengths `[R]` before the step, how far the store is looked at, and whether
    lengths differ."""

    store: Store
    length_R: Tensor
    reach: int
    ragged: bool


class Step:
    """One decoding step's attention: what each row shares, level by level, and its own tokens, under one softmax."""

    def __init__(self, levels: Sequence[SharedLevel], outputs: Outputs) -> None:
        self.levels, self.outputs = levels, outputs
        self._hidden: dict[int | None, Tensor | None] = {}
        self._places: dict[tuple[int, int], Tensor] = {}
        self._seen: dict[int | None, KeyRanges] = {}
        self._decided: tuple[Kernels | None] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """See `AttentionLayout`: a token per row."""
        rows, heads, width = query.shape
        kernels = None if options.softcap is not None or options.sinks is not None else self._kernels(query, value)
        if kernels is not None:
            self.outputs.store.at(layer, key, value)
            stores = [*(level.store.layers[layer] for level in self.levels), self.outputs.store.layers[layer]]
            return kernels.attend(query, key, value, options.scale, self._parts(options.window), stores)
        own_k, own_v = self._write(layer, key, value)
        shared = [(level.fold, *level.stored(layer)) for level in self.levels]
        scaled = (query * options.scale).view(rows, key.shape[1], -1, width)
        columns = [k.shape[2] for _, k, _ in shared] + [own_k.shape[2]]
        scores = scaled.new_empty(*scaled.shape[:3], sum(columns), dtype=wide_dtype(scaled.dtype))
        *of_shared, of_own = scores.split(columns, -1)
        for (fold, k, _), place in zip(shared, of_shared, strict=True):
            fold.spread_into(place, fold.gather(scaled) @ k.transpose(-1, -2))
        of_own.copy_(scaled @ own_k.transpose(-1, -2))
        weights = self._weights(scores, options).to(value.dtype)
        *of_shared, of_own = weights.split(columns, -1)
        out = wide(of_own @ own_v)
        for (fold, _, v), part in zip(shared, of_shared, strict=True):
            out += fold.spread(fold.gather(part) @ v)
        return out.view(rows, heads, -1).to(query.dtype)

    def _kernels(self, query: Tensor, value: Tensor) -> Kernels | None:
        """Decided once, in the first layer: all are alike in this."""
        if self._decided is None:
            reach = sum(level.reach for level in self.levels) + self.outputs.reach
            alike = query.shape[-1] == value.shape[-1]
            self._decided = (kernels_for(query.numel() * reach, query, value) if alike else None,)
        return self._decided[0]

    def _parts(self, window: int | None) -> KeyRanges:
        """What the rows see of each store, their own tokens last and the new one among them."""
        if window not in self._seen:
            end_R = self.outputs.length_R + 1
            ends = [*(level.seen_R for level in self.levels), end_R]
            slots = [*(level.fold.slot_R for level in self.levels), None]
            firsts: list[Tensor | None] = [None] * len(ends)
            if window is not None:
                # The first that is near enough, counted from where each part starts.
                firsts = [(torch.stack(ends[i:]).sum(0) - window).clamp_min(0) for i in range(len(ends))]
            self._seen[window] = KeyRanges([KeyRange(*look) for look in zip(slots, firsts, ends, strict=True)])
        return self._seen[window]

    def _weights(self, scores: Tensor, options: Options) -> Tensor:
        """The softmax of `[R, H_kv, r, columns]`; sinks take part in its denominator only."""
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
        for stored, new in zip(self.outputs.store.at(layer, key, value), (key, value), strict=True):
            if self.outputs.ragged:
                kv_heads, room, width = stored.shape[1:]
                place = self._place(kv_heads, room)
                stored.view(-1, width).index_copy_(0, place, new.reshape(-1, width))
            else:
                stored[:rows, :, self.outputs.reach - 1] = new
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
        """Columns that a row may not see, bool `[R, 1, 1, columns]`; None where it may see all."""
        if window not in self._hidden:
            parts: list[SharedLevel | Outputs] = [*self.levels, self.outputs]
            plain = not any(part.ragged for part in parts)
            near = window is None or window >= sum(part.reach for part in parts)
            self._hidden[window] = None if plain and near else self._build_hidden(window)
        return self._hidden[window]

    def _build_hidden(self, window: int | None) -> Tensor:
        length_R = self.outputs.length_R
        parts = [*((level.reach, level.seen_R) for level in self.levels), (self.outputs.reach, length_R + 1)]
        column = torch.arange(max(reach for reach, _ in parts), device=length_R.device)
        # From the new token back to the first one of the part: it stands behind all that its row shares.
        distance_R = length_R + sum(level.seen_R for level in self.levels)
        hidden = []
        for reach, seen_R in parts:
            unseen = column[:reach] >= seen_R[:, None]
            if window is not None:
                unseen |= distance_R[:, None] - column[:reach] >= window
                distance_R = distance_R - seen_R
            hidden.append(unseen)
        return torch.cat(hidden, 1)[:, None, None]
