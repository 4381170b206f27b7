"""The attention function that reads a layout, registered with transformers' public `AttentionInterface`.

A model loaded with `attn_implementation=NAME` calls `attend` in every layer. The layout travels as a keyword argument
of the model's forward; a call without one raises, because silently plain attention over a forest would be wrong."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from groupwise.models.hollow import counter
from groupwise.models.layout import Forest
from groupwise.models.tiles import Options, TiledAttention

NAME = "groupwise"
KEYWORD = "groupwise_layout"


class AttentionLayout(Protocol):
    """What can answer an attention call: a training forest, a prefill, a decoding step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """`[B, H, L, d]` queries and `[B, H_kv, L, d]` keys and values in, `[B, L, H, d_v]` out."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Attention over the layout in `keywords`; the signature is transformers'. Returns `[B, L, H, d_v]` and None."""
    layout: AttentionLayout | None = keywords.get(KEYWORD)
    if layout is None:
        raise RuntimeError(f"attention `{NAME}` was called without a layout: the model's forward needs {KEYWORD}")
    scale = keywords.get("scaling")
    options = Options(
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        keywords.get("sliding_window"), keywords.get("softcap"), keywords.get("s_aux"),
    )  # fmt: skip
    return layout.attend(int(module.layer_idx), query, key, value, options), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, attend)


class ForestAttention:
    """Attention over a forest. Counts the layers that called, so that a probe can tell whether all of them did."""

    def __init__(self, forest: Forest) -> None:
        self.forest = forest
        self.calls: list[int] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """See `AttentionLayout`. The stream is one row: `B` is 1 and `L` is `N`."""
        self.calls.append(layer)
        query_N, key_N, value_N = (x[0].transpose(0, 1) for x in (query, key, value))
        # On a GPU the stock kernels win over products of our own, for all the copies of keys that they need.
        stock = query.is_cuda and options.softcap is None and options.sinks is None
        return (_stock if stock else _tiled)(self.forest, query_N, key_N, value_N, options)[None]


def _tiled(forest: Forest, query_N: Tensor, key_N: Tensor, value_N: Tensor, options: Options) -> Tensor:
    """`[N, H, d]` queries and `[N, H_kv, d]` keys and values in, `[N, H, d_v]` out."""
    heads, kv_heads = query_N.shape[1], key_N.shape[1]
    flat = [x.reshape(-1, x.shape[-1]) for x in (query_N * options.scale, key_N, value_N)]
    counting = counter.get()
    if counting is None:
        tiles = forest.tiles(heads, kv_heads)
        out: Tensor = TiledAttention.apply(*flat, options.sinks, (tiles, options))  # type: ignore[no-untyped-call]
    else:
        out = counting.attention(forest, (heads, kv_heads), (*flat, options.sinks), options)
    return out.view(-1, heads, out.shape[-1])


def _stock(forest: Forest, query_N: Tensor, key_N: Tensor, value_N: Tensor, options: Options) -> Tensor:
    """The same by padded rows per depth, in which each output has its ancestors' keys beside its own."""
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
    return torch.cat(parts).index_select(0, forest.gather_N)
