"""The attention function that reads a layout, registered with transformers' public `AttentionInterface`.

A model loaded with `attn_implementation=NAME` calls `attend` in every layer. The layout travels as a keyword argument
of the model's forward; a call without one raises, because silently plain attention over a forest would be wrong."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from groupwise.models.layout import Forest
from groupwise.models.tiles import Options, TiledAttention
from groupwise.models.tracing import counter

ATTENTION_NAME = "groupwise"
LAYOUT_KEYWORD = "groupwise_layout"


class AttentionLayout(Protocol):
    """What can answer an attention call: a training forest, a prefill, a decoding step."""

    def attend(self, layer: int, query_N: Tensor, key_N: Tensor, value_N: Tensor, options: Options) -> Tensor:
        """`[N, H, d]` queries and `[N, H_kv, d]` keys and values of `N` tokens in, `[N, H, d_v]` out.

        Queries may be fewer than keys: those of the tokens that the layout was told of.
        """


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Attention over the layout in `keywords`; the signature is transformers'. Returns `[B, L, H, d_v]` and None."""
    layout: AttentionLayout | None = keywords.get(LAYOUT_KEYWORD)
    if layout is None:
        raise RuntimeError(
            f"attention `{ATTENTION_NAME}` was called without a layout: the model's forward needs {LAYOUT_KEYWORD}"
        )
    scale = keywords.get("scaling")
    options = Options(
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        keywords.get("sliding_window"), keywords.get("softcap"), keywords.get("s_aux"),
    )  # fmt: skip
    query_N, key_N, value_N = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    found = layout.attend(int(module.layer_idx), query_N, key_N, value_N, options)  # type: ignore[arg-type]
    return found.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(ATTENTION_NAME, attend)


class ForestAttention:
    """Attention over a forest, of all its tokens' queries or of those that it was built to ask for.

    Counts the layers that called, so that a probe can tell whether all of them did.
    """

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self.calls: list[int] = []

    def attend(self, layer: int, query_N: Tensor, key_N: Tensor, value_N: Tensor, options: Options) -> Tensor:
        """See `AttentionLayout`."""
        self.calls.append(layer)
        # On a GPU the stock kernels win over matmuls of our own, for all the copies of keys that they need.
        stock = query_N.is_cuda and options.softcap is None and options.sinks is None
        return (_stock if stock else _tiled)(self.forest, query_N, key_N, value_N, options)


def _tiled(forest: Forest, query_N: Tensor, key_N: Tensor, value_N: Tensor, options: Options) -> Tensor:
    """See `AttentionLayout`."""
    kind = (query_N.shape[1], key_N.shape[1], len(query_N) < len(key_N))
    flat = [x.reshape(-1, x.shape[-1]) for x in (query_N * options.scale, key_N, value_N)]
    counting = counter.get()
    if counting is None:
        tiles = forest.tiles(*kind)
        out: Tensor = TiledAttention.apply(*flat, options.sinks, (tiles, options))  # type: ignore[no-untyped-call]
    else:
        out = counting.attention(forest, kind, (*flat, options.sinks), options)
    return out.view(-1, kind[0], out.shape[-1])


def _stock(forest: Forest, query_N: Tensor, key_N: Tensor, value_N: Tensor, options: Options) -> Tensor:
    """The same by padded rows per depth, in which each output has its ancestors' keys beside its own."""
    asked_K = forest.asked_K if len(query_N) < len(key_N) else None
    if asked_K is not None:
        query_N = query_N.new_zeros(len(key_N), *query_N.shape[1:]).index_copy(0, asked_K, query_N)
    parts = []
    for level in forest.levels:
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for x, index in ((query_N, level.query_RL), (key_N, level.key_RK), (value_N, level.key_RK))
        )
        mask = level.mask(options.window)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    gather = forest.gather_N if asked_K is None else forest.gather_N[asked_K]
    return torch.cat(parts).index_select(0, gather)
