"""Attention over a forest without a copy of any key: rectangles of queries against keys, merged by log-sum-exp.

A segment's tokens meet the segment's own keys, causally, and each ancestor's keys meet the tokens of all its
descendants at once, in one product. So a prompt's keys are read in place of being copied once per output, and of what
was computed only the result and one log-sum-exp per token and head are kept for the backward pass, which computes the
scores again. A tile is as large as stays in a processor's cache: the passes over its scores do not reach memory.

Index arrays: `R` rows of a tile, `M` query tokens and `K` keys of a row, `H` heads, `r` heads that share keys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from groupwise.cpu.kernels import Kernels, kernels_for
from groupwise.precision import exp, wide_dtype

_SCORES = 1 << 19
"""Scores of a tile, over all heads: 2 MB in float32."""
_QUERIES = 128
"""A longer segment is cut, so that most of what causality hides is not computed."""
_FULL = 0.75
"""Rows share a tile while each fills at least this much of its width."""
_NEVER = float("-inf")

Indices = npt.NDArray[np.int64]


class Options:
    """What a layer asks of attention besides its tensors: score scale, window in positions, soft cap, sinks `[H]`."""

    __slots__ = ("scale", "sinks", "softcap", "window")

    def __init__(
        self, scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> None:
        self.scale, self.window, self.softcap, self.sinks = scale, window, softcap, sinks


class _Row(NamedTuple):
    """Query tokens that meet one range of keys. `first` is the place of the first query among its own segment's
    tokens; where the keys are an ancestor's, which all the queries see, it is less than 0 and tells the ancestor's
    depth: rows of one depth have no query in common."""

    first: int
    queries: tuple[int, ...]
    keys: range


@dataclass(frozen=True)
class Tile:
    """`R` rows of at most `M` queries and `K` keys, padded by token 0, for `H` heads of which `r` share keys.

    `query_index` `[R * H_kv * r * M]` and `key_index` `[R * H_kv * K]` point into tensors that are laid out token by
    token, head by head. `place` tells real queries among the former from padding, None where all are real, and `target`
    is where these point. `position_RM` and `position_RK` are for windows; `reach` is the farthest that a query looks.
    """

    shape: tuple[int, int, int, int, int]
    query_index: Tensor
    key_index: Tensor
    place: Tensor | None
    target: Tensor
    own: bool
    bias: Tensor | None
    position_RM: Tensor
    position_RK: Tensor
    reach: int
    _windows: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def products(self, query: Tensor, key: Tensor, room: Tensor) -> Tensor:
        """`[R * H_kv, r * M, K]` in float32 or wider, written into `room`."""
        rows, kv_heads, shared, count, keys = self.shape
        out = room[: rows * kv_heads * shared * count * keys].view(rows * kv_heads, shared * count, keys)
        return _product(query, key.transpose(1, 2), out)

    def scores(self, query: Tensor, key: Tensor, options: Options, room: Tensor) -> Tensor:
        """The same with soft cap, and what is hidden at -inf."""
        out = self.products(query, key, room)
        if options.softcap is not None:
            out.div_(options.softcap).tanh_().mul_(options.softcap)
        bias = self.hidden(options.window)
        if bias is not None:
            out.view(self.shape).add_(bias)
        return out

    def for_kernels(self, scores: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
        """Scores as `[R, H, M, K]`, and what is to be added to them, in which all heads are one."""
        rows, kv_heads, shared, count, keys = self.shape
        bias = self.hidden(options.window)
        return scores.view(rows, kv_heads * shared, count, keys), None if bias is None else bias[:, 0]

    def hidden(self, window: int | None) -> Tensor | None:
        """What is added to the scores: 0, or -inf where a query must not see a key; broadcasts to `shape`."""
        if window is None or self.reach < window:
            return self.bias
        if window not in self._windows:
            distance = self.position_RM[:, None, None, :, None] - self.position_RK[:, None, None, None, :]
            near = torch.zeros_like(distance, dtype=torch.float32).masked_fill_(distance >= window, _NEVER)
            self._windows[window] = near if self.bias is None else near + self.bias
        return self._windows[window]

    def real(self, values: Tensor) -> Tensor:
        """The entries of padded queries taken out of `[R * H_kv * r * M, ..]`."""
        return values if self.place is None else values.index_select(0, self.place)


def build_tiles(
    lengths: Sequence[int], parents: Sequence[int], heads: int, kv_heads: int, device: torch.device | str = "cpu",
    asked: Sequence[int] | None = None,
) -> tuple[Tile, ...]:  # fmt: skip
    """The tiles of a forest (see `build_forest`), first those of own keys, in which every token is a query once; with
    `asked` the queries are of these tokens only, in rising order."""
    starts, ends, positions = [0], list[int](), list[Indices]()
    for length, parent in zip(lengths, parents, strict=True):
        first = 0 if parent < 0 else ends[parent]
        ends.append(first + length)
        positions.append(np.arange(first, first + length))
        starts.append(starts[-1] + length)
    position = np.concatenate(positions)
    tokens = range(len(position)) if asked is None else asked
    row_of = np.zeros(len(position), np.int64)  # 0 also for token 0, which stands for padding and need not be asked for
    row_of[list(tokens)] = np.arange(len(tokens))
    queries_of = [tokens[bisect_left(tokens, start) : bisect_left(tokens, end)] for start, end in pairwise(starts)]
    own = [row for start, queries in zip(starts, queries_of, strict=False) for row in _own_rows(start, queries)]
    depth: list[int] = []
    for parent in parents:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    below: list[list[int]] = [[] for _ in lengths]
    for segment in reversed(range(len(lengths))):
        if parents[segment] >= 0:
            below[parents[segment]] += [*queries_of[segment], *below[segment]]
    inherited = [
        row
        for start, length, queries, level in zip(starts, lengths, below, depth, strict=False)
        for row in _inherited_rows(tuple(queries), range(start, start + length), heads, -1 - level)
    ]
    return tuple(
        _tile(rows, (position, row_of), heads, kv_heads, torch.device(device))
        for kind in (own, inherited)
        for rows in _together(sorted(kind, key=lambda row: (row.first, -len(row.keys), -len(row.queries))), heads)
    )


def _own_rows(start: int, queries: Sequence[int]) -> Iterator[_Row]:
    """Runs of queries that follow each other, with the segment's keys up to the last of them."""
    cuts = [i for i in range(1, len(queries)) if queries[i] != queries[i - 1] + 1]
    for begin, end in pairwise([0, *cuts, len(queries)] if queries else []):
        for first in range(begin, end, _QUERIES):
            run = queries[first : min(first + _QUERIES, end)]
            yield _Row(run[0] - start, tuple(run), range(start, run[-1] + 1))


def _inherited_rows(queries: tuple[int, ...], keys: range, heads: int, first: int) -> Iterator[_Row]:
    most = max(16, _SCORES // (heads * len(keys)))
    parts = -(-len(queries) // most)
    for part in range(parts):
        yield _Row(first, queries[len(queries) * part // parts : len(queries) * (part + 1) // parts], keys)


def _together(rows: Sequence[_Row], heads: int) -> Iterator[list[_Row]]:
    """Rows of nearly the same size, as many as make a tile."""
    tile: list[_Row] = []
    for row in rows:
        if tile:
            count, keys = len(tile[0].queries), len(tile[0].keys)
            alike = row.first == tile[0].first and len(row.queries) <= count
            full = len(row.queries) >= _FULL * count and len(row.keys) >= _FULL * keys
            if not (alike and full and (len(tile) + 1) * heads * count * keys <= _SCORES):
                yield tile
                tile = []
        tile.append(row)
    if tile:
        yield tile


def _tile(
    rows: Sequence[_Row], tokens: tuple[Indices, Indices], heads: int, kv_heads: int, device: torch.device
) -> Tile:
    """`tokens`: positions, and which rows of the queries they are. Arrays until here, so that a pass on tensors without
    data finds the same tiles."""
    position, row_of = tokens
    shared, own = heads // kv_heads, rows[0].first >= 0
    count, keys = len(rows[0].queries), len(rows[0].keys)
    query_RM, key_RK = np.zeros((len(rows), count), np.int64), np.zeros((len(rows), keys), np.int64)
    for r, row in enumerate(rows):
        query_RM[r, : len(row.queries)], key_RK[r, : len(row.keys)] = row.queries, row.keys
    shape = (len(rows), kv_heads, shared, count, keys)
    head = np.arange(heads).reshape(1, kv_heads, shared, 1)
    query_index = (row_of[query_RM][:, None, None, :] * heads + head).ravel()
    key_index = (key_RK[:, None, :] * kv_heads + np.arange(kv_heads)[:, None]).ravel()
    lengths = np.array([len(row.queries) for row in rows])
    real = np.arange(count) < lengths[:, None]
    place = None if real.all() else np.flatnonzero(np.broadcast_to(real[:, None, None, :], shape[:4]))
    target = query_index if place is None else query_index[place]
    position_RM, position_RK = position[query_RM], position[key_RK]

    def put(array: Indices) -> Tensor:
        return torch.as_tensor(array, device=device)

    return Tile(
        shape, put(query_index), put(key_index), None if place is None else put(place), put(target), own,
        _causal(rows[0].first, count, keys, device) if own else _padding([len(row.keys) for row in rows], device),
        put(position_RM), put(position_RK), int((position_RM.max(1) - position_RK[:, 0]).max()),
    )  # fmt: skip


def _causal(first: int, count: int, keys: int, device: torch.device) -> Tensor:
    """`[1, 1, 1, M, K]`; it hides padded keys too, because they come last."""
    return torch.full((1, 1, 1, count, keys), _NEVER, device=device).triu_(first + 1)


def _padding(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """`[R, 1, 1, 1, K]`."""
    widest = max(lengths)
    if min(lengths) == widest:
        return None
    hidden = torch.arange(widest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, _NEVER)
    return bias[:, None, None, None, :]


class TiledAttention(torch.autograd.Function):
    """`[N * H, d]` scaled queries, `[N * H_kv, d]` keys and values in, `[N * H, d_v]` out."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None,
        layout: tuple[Sequence[Tile], Options],
    ) -> Tensor:  # fmt: skip
        tiles, options = layout
        wide = wide_dtype(query.dtype)
        out = query.new_empty(query.shape[0], value.shape[1], dtype=wide)
        lse = query.new_empty(query.shape[0], dtype=wide)
        room = _room(tiles, lse)
        for tile in tiles:
            q, k, v = _gather(tile, query, key, value)
            weights, top, total = _weights(tile, q, k, options, room)
            part = _product(weights.to(v.dtype), v)
            part, total, top = (tile.real(x.flatten(0, 1)) for x in (part, total, top))
            if tile.own:
                new = (top + total.log())[:, 0]
                if sinks is not None:
                    new = torch.logaddexp(new, sinks.to(wide)[tile.target % len(sinks)])
                out.index_copy_(0, tile.target, part * (top - new[:, None]).exp_())
            else:
                old = lse.index_select(0, tile.target)
                new = torch.logaddexp(old, (top + total.log())[:, 0])
                before = out.index_select(0, tile.target) * (old - new).exp_()[:, None]
                out.index_copy_(0, tile.target, before.add_(part * (top - new[:, None]).exp_()))
            lse.index_copy_(0, tile.target, new)
        narrow = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, narrow, lse)
        ctx.tiles, ctx.options = tiles, options
        return narrow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        options: Options = ctx.options
        delta = (grad.to(lse.dtype) * out).sum(-1)
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        room, other = _room(ctx.tiles, lse), _room(ctx.tiles, lse)
        for tile in ctx.tiles:
            q, k, v = _gather(tile, query, key, value)
            back = grad.index_select(0, tile.query_index).view(*q.shape[:2], -1)
            change = other[: torch.Size(tile.shape).numel()].view(*q.shape[:2], -1)
            _product(back, v.transpose(1, 2), change)
            weights = _weights_back(tile, q, k, options, room, (change, _lse_of(tile, lse), delta))
            narrow = change.to(q.dtype)
            _add(grads[2], tile.key_index, _product(weights.to(q.dtype).transpose(1, 2), back))
            _add(grads[1], tile.key_index, _product(narrow.transpose(1, 2), q))
            _add(grads[0], tile.query_index, _product(narrow, k))
        grad_sinks = None
        if sinks is not None:
            taken = torch.exp(sinks.to(lse.dtype) - lse.view(-1, len(sinks)))
            grad_sinks = -(taken * delta.view_as(taken)).sum(0).to(sinks.dtype)
        grad_query, grad_key, grad_value = (g.to(query.dtype) for g in grads)
        return grad_query, grad_key, grad_value, grad_sinks, None


def _weights(tile: Tile, query: Tensor, key: Tensor, options: Options, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`exp(scores - top)` in `room`, each query's largest score, and the sum of its weights: `[R * H_kv, r * M, 1]`."""
    kernels = _kernels(options, query, room)
    if kernels is not None:
        weights = tile.products(query, key, room)
        top, total = kernels.softmax_numerator_(*tile.for_kernels(weights, options))
        return weights, top.view(*query.shape[:2], 1), total.view(*query.shape[:2], 1)
    scores = tile.scores(query, key, options, room)
    # Where a window hides everything the maximum is -inf; any finite number gives weights of 0 then.
    top = scores.amax(-1, keepdim=True).clamp_min_(-1e30)
    weights = exp(scores.sub_(top), out=scores)
    return weights, top, weights.sum(-1, keepdim=True)


def _weights_back(
    tile: Tile, query: Tensor, key: Tensor, options: Options, room: Tensor, given: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """`exp(scores - lse)` in `room`. Given are the gradients of these weights, of which it makes those of the scores,
    the queries' log-sum-exps, and `delta` of all queries."""
    change, lse, delta = given
    delta = delta.index_select(0, tile.query_index)
    kernels = _kernels(options, query, room)
    if kernels is not None:
        weights = tile.products(query, key, room)
        scores, bias = tile.for_kernels(weights, options)
        kernels.softmax_numerator_back_(scores, bias, change, lse, delta)
        return weights
    weights = tile.scores(query, key, options, room)
    change.sub_(delta.view(*query.shape[:2], 1))
    if options.softcap is not None:
        # d capped / d score; where a key is hidden the weight below is 0, whatever stands here.
        change.mul_(1 - weights.clamp_min(-options.softcap).div_(options.softcap).square_())
    exp(weights.sub_(lse.view(*query.shape[:2], 1)), out=weights)
    change.mul_(weights)
    return weights


def _kernels(options: Options, query: Tensor, room: Tensor) -> Kernels | None:
    return kernels_for(16 * room.numel(), query) if options.softcap is None else None


def _gather(tile: Tile, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
    """A tile's `[R * H_kv, r * M, d]` queries and `[R * H_kv, K, d]` keys and values."""
    rows, kv_heads, shared, count, keys = tile.shape
    for x, index, length in (
        (query, tile.query_index, shared * count), (key, tile.key_index, keys), (value, tile.key_index, keys),
    ):  # fmt: skip
        yield x.index_select(0, index).view(rows * kv_heads, length, -1)


def _lse_of(tile: Tile, lse: Tensor) -> Tensor:
    """The log-sum-exp of a tile's queries; of padded ones +inf, so that their weights are 0."""
    if tile.place is None:
        return lse.index_select(0, tile.query_index)
    found = torch.full_like(tile.query_index, float("inf"), dtype=lse.dtype)
    return found.index_copy_(0, tile.place, lse.index_select(0, tile.target))


def _room(tiles: Sequence[Tile], like: Tensor) -> Tensor:
    """Memory for the scores of the largest tile."""
    return like.new_empty(max(torch.Size(tile.shape).numel() for tile in tiles))


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A batched matrix product, into `out` where given, which may be wider than the factors."""
    if out is None:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out=out) if out.dtype == a.dtype else out.copy_(torch.bmm(a, b))


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    total.index_add_(0, index, values.flatten(0, 1).to(total.dtype))
