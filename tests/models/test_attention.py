"""The registered attention function against formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from groupwise.models.attention import LAYOUT_KEYWORD, ForestAttention, attend
from groupwise.models.layout import build_forest
from groupwise.models.tiles import Options
from tests.tiny_models import clone_of, policy_of


class Layer(torch.nn.Module):
    layer_idx = 3


def tensors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, heads, kv_heads, length, width = shape
    return [torch.randn(rows, h, length, width, generator=generator, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Causal attention, one query and one head at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    per_key = q.shape[1] // k.shape[1]
    for r in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                first = 0 if options.window is None else max(0, t + 1 - options.window)
                keys, values = k[r, h // per_key, first : t + 1], v[r, h // per_key, first : t + 1]
                scores = [float(q[r, h, t] @ key) * options.scale for key in keys]
                if options.softcap is not None:
                    scores = [options.softcap * math.tanh(score / options.softcap) for score in scores]
                total = sum(map(math.exp, scores))
                if options.sinks is not None:
                    total += math.exp(float(options.sinks[h]))
                for score, value in zip(scores, values, strict=True):
                    out[r, h, t] += math.exp(score) / total * value
    return out


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
CASES = {
    "plain": Options(0.4),
    "window": Options(0.4, window=2),
    "softcap": Options(0.4, softcap=0.8),
    "sinks": Options(0.4, sinks=SINKS),
    "all": Options(0.4, window=3, softcap=0.8, sinks=SINKS),
}


def over_one_root(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))
    found = ForestAttention(build_forest([query.shape[2]], [-1])).attend(0, *tokens, options)
    return found.transpose(0, 1)[None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_forest_of_one_root_is_causal_attention(case: str, kv_heads: int) -> None:
    q, k, v = tensors(1, 4, kv_heads, 5, 3)
    found = over_one_root(q, k, v, CASES[case])
    torch.testing.assert_close(found, by_hand(q, k, v, CASES[case]), atol=1e-12, rtol=0)


def test_values_may_be_narrower_than_keys() -> None:
    q, k, v = tensors(1, 4, 2, 5, 6)
    for options in (Options(0.4), Options(0.4, softcap=2.0)):
        found = over_one_root(q, k, v[..., :4], options)
        torch.testing.assert_close(found, by_hand(q, k, v[..., :4], options), atol=1e-12, rtol=0)


def test_a_call_without_a_layout_raises() -> None:
    q, k, v = tensors(1, 4, 2, 5, 8)
    with pytest.raises(RuntimeError, match=LAYOUT_KEYWORD):
        attend(Layer(), q, k, v, None)
    model = policy_of(clone_of("llama"), "shared").model
    with pytest.raises(RuntimeError, match=LAYOUT_KEYWORD):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_what_a_layer_asks_for_reaches_the_layout() -> None:
    asked = []

    class Recorder:
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
            asked.append((layer, options.scale, options.window, options.softcap, options.sinks))
            return query

    q, k, v = tensors(1, 4, 2, 5, 16)
    attend(Layer(), q, k, v, None, **{LAYOUT_KEYWORD: Recorder()}, dropout=0.5)
    attend(
        Layer(), q, k, v, None, **{LAYOUT_KEYWORD: Recorder()}, scaling=2.0, sliding_window=7, softcap=3.0, s_aux=SINKS
    )
    assert asked == [(3, 0.25, None, None, None), (3, 2.0, 7, 3.0, SINKS)]


def test_every_layer_is_counted() -> None:
    attention = ForestAttention(build_forest([3], [-1]))
    policy = policy_of(clone_of("llama"), "shared")
    policy.hidden(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]), attention)
    assert attention.calls == [0, 1]
