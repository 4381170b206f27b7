"""How prompts and outputs are laid out for a forward pass: one stream of tokens that is a forest of segments.

A segment (a prompt, an output, a continuation) has at most one parent. A token attends to its ancestors' tokens and to
its own segment's past; positions continue from the parent. So a prompt is computed once, however many outputs hang
from it. The plain layout, a row per output with its prompt repeated, describes the same outputs for models that cannot
take the forest. Both give a `Stream`, and nothing after it asks which one it was.

Index arrays: `R` segments of one depth, `L` their longest length, `A` their longest ancestry in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from groupwise.models.tiles import Tile, build_tiles

Tokens = Sequence[int]


@dataclass(frozen=True)
class Level:
    """The segments of one depth, as rows of one attention call.

    `query_RL` indexes the stream (0 where padded). `key_RK` does too, `K = A + L`: the ancestors' tokens, aligned to
    the right so that a segment's own tokens start at column `A` in every row. `valid_RA` tells ancestors from padding.
    """

    query_RL: Tensor
    key_RK: Tensor
    valid_RA: Tensor
    query_position_RL: Tensor
    key_position_RK: Tensor
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict, repr=False)

    def mask(self, window: int | None) -> Tensor | None:
        """What each query may see, bool `[R, 1, L, K]`; None where that is plain causality. Windows count positions."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor | None:
        rows, length = self.query_RL.shape
        ancestry = self.valid_RA.shape[1]
        if ancestry == 0 and (window is None or window >= length):
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=self.query_RL.device).tril()
        mask = torch.cat(
            [self.valid_RA[:, None, :].expand(rows, length, ancestry), causal.expand(rows, length, length)], 2
        )
        if window is not None:
            distance = self.query_position_RL[:, :, None] - self.key_position_RK[:, None, :]
            # A padded query sees itself, at distance 0: no row of the softmax is empty.
            mask = mask & (distance < window)
        return mask[:, None]


@dataclass(frozen=True)
class Forest:
    """Segments of `lengths` that lie end to end in a stream, their `parents`, and each token's position `[N]`.

    `asked` are the tokens whose last hidden states will be used, in rising order; None where that may be all.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    position_N: Tensor
    asked: tuple[int, ...] | None = None
    _tiles: dict[tuple[int, int, bool], tuple[Tile, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def asked_K(self) -> Tensor | None:
        """`asked` as a tensor."""
        return None if self.asked is None else torch.tensor(self.asked, device=self.position_N.device)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The segments by depth, as padded rows that stock attention takes."""
        return self._laid[0]

    @cached_property
    def gather_N(self) -> Tensor:
        """Where each stream token's result lies in the levels' padded rows laid end to end."""
        return self._laid[1]

    @cached_property
    def _laid(self) -> tuple[tuple[Level, ...], Tensor]:
        return _build_levels(self.lengths, self.parents, self.position_N)

    def tiles(self, heads: int, kv_heads: int, narrow: bool = False) -> tuple[Tile, ...]:
        """The same as rectangles for `heads` heads over `kv_heads` of keys, see `groupwise.models.tiles`; for queries
        of all tokens or, where `narrow`, of those that are asked for."""
        kind = (heads, kv_heads, narrow)
        if kind not in self._tiles:
            asked = self.asked if narrow else None
            self._tiles[kind] = build_tiles(self.lengths, self.parents, heads, kv_heads, self.position_N.device, asked)
        return self._tiles[kind]


@dataclass(frozen=True)
class Stream:
    """Tokens ready for a forward pass, and which hidden state predicts which output token.

    `input_ids` and `position_ids` are `[B, L]` (`[1, N]` for the shared layout), `attention_mask` is `[B, L]` or None.
    Output token `t` is `target_T[t]`; the hidden state at flat position `predictor_T[t]` predicts it: this is the one
    place where the shift by one happens. An output's last token predicts nothing, so it is not in the input. Of a
    forest, `place_T` is where that hidden state stands among those of `forest.asked_K`.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    forest: Forest | None
    predictor_T: Tensor
    target_T: Tensor
    place_T: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the linear layers see, padding included."""
        return self.input_ids.numel()


def build_forest(
    lengths: Sequence[int], parents: Sequence[int], device: torch.device | str = "cpu",
    asked: Sequence[int] | None = None,
) -> Forest:  # fmt: skip
    """The forest of segments of `lengths` (all > 0) whose `parents` come before them (-1: a root).

    The stream holds the segments one after the other, in this order. `asked`: see `Forest`.
    """
    ends: list[int] = []
    position: list[int] = []
    for length, parent in zip(lengths, parents, strict=True):
        assert length > 0
        first = 0 if parent < 0 else ends[parent]
        ends.append(first + length)
        position += range(first, first + length)
    position_N = torch.tensor(position, dtype=torch.long, device=device)
    return Forest(tuple(lengths), tuple(parents), position_N, None if asked is None else tuple(asked))


def _build_levels(
    lengths: Sequence[int], parents: Sequence[int], position_N: Tensor
) -> tuple[tuple[Level, ...], Tensor]:
    starts = [0] * len(lengths)
    for i in range(1, len(lengths)):
        starts[i] = starts[i - 1] + lengths[i - 1]
    ancestry: list[list[int]] = []
    depth: list[int] = []
    for parent in parents:
        inherited = [] if parent < 0 else [*ancestry[parent], *range(starts[parent], starts[parent] + lengths[parent])]
        ancestry.append(inherited)
        depth.append(0 if parent < 0 else depth[parent] + 1)
    device, position = position_N.device, position_N.cpu()
    gather_N = torch.empty(sum(lengths), dtype=torch.long)
    levels: list[Level] = []
    offset = 0
    for d in range(max(depth, default=-1) + 1):
        rows = [i for i in range(len(lengths)) if depth[i] == d]
        longest, reach = max(lengths[i] for i in rows), max(len(ancestry[i]) for i in rows)
        key = torch.zeros(len(rows), reach + longest, dtype=torch.long)
        valid = torch.zeros(len(rows), reach, dtype=torch.bool)
        for row, i in enumerate(rows):
            length, inherited = lengths[i], ancestry[i]
            key[row, reach : reach + length] = torch.arange(starts[i], starts[i] + length)
            if inherited:
                key[row, reach - len(inherited) : reach] = torch.tensor(inherited)
                valid[row, reach - len(inherited) :] = True
            first = offset + row * longest
            gather_N[starts[i] : starts[i] + length] = torch.arange(first, first + length)
        query = key[:, reach:]
        level = Level(query, key, valid, position[query], position[key])
        levels.append(Level(*(getattr(level, name).to(device) for name in _LEVEL_TENSORS)))
        offset += len(rows) * longest
    return tuple(levels), gather_N.to(device)


_LEVEL_TENSORS = ("query_RL", "key_RK", "valid_RA", "query_position_RL", "key_position_RK")


def shared_stream(groups: Sequence[tuple[Tokens, Sequence[Tokens]]], device: torch.device | str = "cpu") -> Stream:
    """One row that holds every group's prompt once and then its outputs: `groups` are `(prompt, outputs)`."""
    ids: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    asked: list[int] = []
    place: list[int] = []
    target: list[int] = []
    for prompt, outputs in groups:
        root = len(lengths)
        lengths.append(len(prompt))
        parents.append(-1)
        ids += prompt
        last = len(asked)
        asked.append(len(ids) - 1)
        for output in outputs:
            assert len(output) > 0
            place += [last, *range(len(asked), len(asked) + len(output) - 1)]
            asked += range(len(ids), len(ids) + len(output) - 1)
            target += output
            if len(output) > 1:
                lengths.append(len(output) - 1)
                parents.append(root)
                ids += output[:-1]
    forest = build_forest(lengths, parents, device, asked)
    return Stream(
        torch.tensor([ids], device=device), forest.position_N[None], None, forest,
        torch.tensor([asked[k] for k in place], device=device), torch.tensor(target, device=device),
        torch.tensor(place, device=device),
    )  # fmt: skip


def plain_stream(groups: Sequence[tuple[Tokens, Sequence[Tokens]]], device: torch.device | str = "cpu") -> Stream:
    """A row per output, its prompt repeated, padded on the right: what every causal model understands."""
    rows = [[*prompt, *output[:-1]] for prompt, outputs in groups for output in outputs]
    width = max(map(len, rows))
    predictor: list[int] = []
    target: list[int] = []
    row = 0
    for prompt, outputs in groups:
        for output in outputs:
            first = row * width + len(prompt) - 1
            predictor += range(first, first + len(output))
            target += output
            row += 1
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device)
    length = torch.tensor([len(r) for r in rows], device=device)
    position = torch.arange(width, device=device).expand(len(rows), width)
    # Without padding no mask is handed over: some models take a quicker way then.
    mask = None if all(len(r) == width for r in rows) else (position < length[:, None]).long()
    return Stream(
        ids, position, mask, None, torch.tensor(predictor, device=device), torch.tensor(target, device=device)
    )
