"""Tiles against attention with a dense mask, in values and gradients, whatever their size."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from groupwise.models import tiles
from groupwise.models.attention import _stock, _tiled
from groupwise.models.layout import build_forest
from groupwise.models.tiles import Options, build_tiles
from tests.models.test_layout import LENGTHS, PARENTS, by_definition

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
CASES: dict[str, dict[str, float | int]] = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 0.8},
    "both": {"window": 3, "softcap": 2.0},
}
RAGGED = ([40, 3, 30, 17, 1, 9, 64, 5, 70, 2, 33], [-1, 0, 0, 0, 2, 2, -1, 6, 6, 8, -1])


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, options: Options) -> Tensor:
    """`[N, H, d]` queries over all keys of the stream, hidden ones at -inf."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        scores = torch.cat([scores, options.sinks[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hnm,mhd->nhd", torch.softmax(scores, -1)[..., : len(k)], v)


def compare(
    lengths: Sequence[int], parents: Sequence[int], heads: int, kv_heads: int, options: Options, values: int = 6
) -> None:
    """Values and gradients of tiled attention are those of a dense mask, in float64."""
    torch.manual_seed(0)
    total = sum(lengths)
    position, visible = by_definition(list(lengths), list(parents))
    if options.window is not None:
        visible &= position[:, None] - position < options.window
    shapes = [(total, heads, 6), (total, kv_heads, 6), (total, kv_heads, values)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if options.sinks is not None:
        options.sinks = options.sinks.clone().requires_grad_()
        inputs.append(options.sinks)
    expected = dense(*inputs[:3], visible, options)
    found = _tiled(build_forest(lengths, parents), *inputs[:3], options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad(out, inputs, weight) for out in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("size", [1, 300, 1 << 19])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("forest", [(LENGTHS, PARENTS), RAGGED], ids=["small", "ragged"])
def test_tiles_of_any_size_are_dense_attention(
    monkeypatch: pytest.MonkeyPatch, forest: tuple[list[int], list[int]], case: str, size: int
) -> None:
    monkeypatch.setattr(tiles, "_SCORES", size)
    monkeypatch.setattr(tiles, "_QUERIES", 16)
    compare(*forest, 4, 2, Options(0.6, **CASES[case]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_may_share_keys_and_sinks_have_gradients(kv_heads: int) -> None:
    compare(LENGTHS, PARENTS, 4, kv_heads, Options(0.4, window=5, sinks=SINKS), values=3)


def test_a_token_meets_one_ancestor_of_a_tile() -> None:
    """Keys of prompt and output are of like length and would fit one tile, in which a continuation stood twice."""
    forest = ([10, 9, 60], [-1, 0, 1])
    compare(*forest, 4, 2, Options(0.6))
    for tile in build_tiles(*forest, 2, 1):
        assert len(set(tile.target.tolist())) == len(tile.target)


ASKED = {
    "the ends of prompts, and outputs": [39, *range(40, 107), 170, *range(171, 200)],
    "scattered": [0, 2, 3, 41, 42, 60, 90, 91, 92, 105, 106, 150, 240],
    "one": [200],
}


@pytest.mark.parametrize("stock", [False, True], ids=["tiles", "stock kernels"])
@pytest.mark.parametrize("case", ["plain", "window"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_queries_of_some_tokens_get_what_they_get_among_all(asked: list[int], case: str, stock: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(sum(RAGGED[0]), h, 6, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    query, key, value = inputs
    options = Options(0.6, **CASES[case])  # type: ignore[arg-type]
    expected = _tiled(build_forest(*RAGGED), query, key, value, options)[asked]
    attend = _stock if stock else _tiled
    found = attend(build_forest(*RAGGED, asked=asked), query[asked], key, value, options)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad(out, inputs, weight) for out in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_a_prompt_of_which_only_the_end_is_asked_costs_one_query() -> None:
    found = build_tiles([50] + [20] * 8, [-1] + [0] * 8, 2, 2, asked=range(49, 210))
    assert {tile.shape for tile in found} == {(8, 2, 1, 20, 20), (1, 2, 1, 1, 50), (1, 2, 1, 160, 50)}


def test_every_token_is_a_query_of_its_own_keys_once_and_these_come_first() -> None:
    found = build_tiles(*RAGGED, 2, 1)
    kinds = [tile.own for tile in found]
    assert kinds == sorted(kinds, reverse=True)
    own = torch.cat([tile.target for tile in found if tile.own])
    assert sorted(own.tolist()) == list(range(2 * sum(RAGGED[0])))


def test_a_prompt_is_read_once_for_all_its_outputs() -> None:
    found = build_tiles([50] + [20] * 8, [-1] + [0] * 8, 2, 2)
    assert {tile.shape for tile in found} == {(8, 2, 1, 20, 20), (1, 2, 1, 50, 50), (1, 2, 1, 160, 50)}


def test_lengths_that_differ_much_do_not_share_a_tile() -> None:
    rng = random.Random(0)
    lengths = [min(256, int(rng.lognormvariate(3.5, 0.9)) + 1) for _ in range(60)]
    found = build_tiles(lengths, [-1] * 60, 1, 1)
    used = sum(tile.shape[0] * tile.shape[3] * tile.shape[4] for tile in found)
    assert used < 1.5 * sum(n * n for n in lengths)


def test_half_precision_keeps_scores_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(RAGGED[0]), heads, 8).bfloat16().requires_grad_() for heads in (4, 2, 2))
    forest, options = build_forest(*RAGGED), Options(0.3, window=20)
    exact = _tiled(forest, q.double(), k.double(), v.double(), options)
    found = _tiled(forest, q, k, v, options)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, atol=0.03, rtol=0)
    exact_grad = torch.autograd.grad(exact.square().sum(), q)[0]
    found_grad = torch.autograd.grad(found.double().square().sum(), q)[0]
    torch.testing.assert_close(found_grad, exact_grad, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("window", [None, 7])
def test_stock_kernels_on_padded_rows_give_the_same(window: int | None) -> None:
    """What a GPU uses."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    forest, options = build_forest(LENGTHS, PARENTS), Options(0.5, window=window)
    torch.testing.assert_close(_stock(forest, q, k, v, options), _tiled(forest, q, k, v, options), atol=1e-12, rtol=0)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(sum(LENGTHS), h, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
    forest, options = build_forest(LENGTHS, PARENTS), Options(0.5, softcap=3.0)
    assert torch.autograd.gradcheck(lambda q, k, v: _tiled(forest, q, k, v, options), inputs)
