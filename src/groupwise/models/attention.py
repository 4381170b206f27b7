"""The attention function that reads a layout, registered with transformers' public `AttentionInterface`.

A model loaded with `attn_implementation=NAME` calls `attend` in every layer. The layout travels as a keyword argument
of the model's forward; a call without one raises, because silently plain attention over a forest would be wrong."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from groupwise.models.layout import Forest, Level
from groupwise.models.precision import wide

NAME = "groupwise"
KEYWORD = "groupwise_layout"


class AttentionLayout(Protocol):
    """What can answer an attention call: a training forest, a prefill, a decoding step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """`[B, H, L, d]` queries and `[B, H_kv, L, d]` keys and values in, `[B, L, H, d_v]` out."""


class Options:
    """What a layer asks of attention besides its tensors: score scale, window in positions, soft cap, sinks `[H]`."""

    __slots__ = ("scale", "sinks", "softcap", "window")

    def __init__(
        self, scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> None:
        self.scale, self.window, self.softcap, self.sinks = scale, window, softcap, sinks


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
        parts = [self._level(level, query_N, key_N, value_N, options) for level in self.forest.levels]
        return torch.cat(parts).index_select(0, self.forest.gather_N)[None]

    @staticmethod
    def _level(level: Level, query_N: Tensor, key_N: Tensor, value_N: Tensor, options: Options) -> Tensor:
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for x, index in ((query_N, level.query_RL), (key_N, level.key_RK), (value_N, level.key_RK))
        )
        mask = level.mask(options.window)
        if options.softcap is None and options.sinks is None:
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = explicit_attention(q, k, v, mask, options)
        return out.transpose(1, 2).flatten(0, 1)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """Attention written out, for what stock kernels lack (soft cap, sinks). `[R, H, L, d]`; mask True = visible."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = wide(q @ k.transpose(-1, -2)) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if options.sinks is not None:
        sink = options.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v
