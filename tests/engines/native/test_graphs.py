"""Captured decoding steps. Here a replay calls the step again, on the fixed shapes and places that a GPU would see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.native.graphs import Graphs, Run, rounded
from groupwise.engines.native.shared_decoder import SharedDecoder
from groupwise.engines.native.stores import PromptFold
from groupwise.models.policy import Policy
from groupwise.types import Completion, Request
from tests.engines.policies import (
    CODEC,
    PROMPTS,
    difference,
    generate,
    make_policy,
    requests,
    sample,
    tokens,
    without_end,
)


def again(run: Run) -> tuple[Callable[[], object], Tensor]:
    """A capture whose replay is the step itself, its result always in the same place."""
    result = run().clone()
    return lambda: result.copy_(run()), result


def captured(policy: Policy, **options: int) -> tuple[NativeEngine, Graphs]:
    engine = NativeEngine(policy, options.pop("codec", CODEC), **options)  # type: ignore[arg-type]
    assert isinstance(engine.decoder, SharedDecoder)
    engine.decoder.graphs = Graphs(policy, again)
    return engine, engine.decoder.graphs


def drawn(engine: NativeEngine, asked: list[Request]) -> list[tuple[Completion, ...]]:
    return generate(engine, asked)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("max_live", [3, 64])
def test_replayed_steps_draw_what_steps_draw(kind: str, max_live: int) -> None:
    """Ragged prompts and groups, refill, windows, soft caps, sinks."""
    policy, asked = make_policy(kind), requests(n=3, max_tokens=20)
    engine, graphs = captured(policy, max_live=max_live)
    found = drawn(engine, asked)
    assert tokens(found) == tokens(sample(policy, asked, max_live=max_live))
    assert difference(policy, asked, found) < 3e-5
    assert graphs._steps
    assert not graphs.refused


def test_stores_that_grow_take_their_captured_steps_with_them() -> None:
    policy = make_policy()
    engine, graphs = captured(policy, codec=without_end())  # type: ignore[arg-type]
    asked = requests(n=2, max_tokens=150)
    found = drawn(engine, asked)
    assert {len(c.token_ids) for group in found for c in group} == {150}
    assert difference(policy, asked, found) < 3e-5
    assert {bucket.reach for bucket in graphs._steps} == {150}, "those of 64 and 128 went with the smaller stores"


def test_few_steps_are_captured() -> None:
    made = []

    def counted(run: Run) -> tuple[Callable[[], object], Tensor]:
        made.append(1)
        return again(run)

    policy = make_policy()
    engine, graphs = captured(policy)
    graphs.capture = counted
    found = drawn(engine, requests(n=8, max_tokens=40))
    assert sum(len(c.token_ids) for group in found for c in group) > 200
    assert len(made) < 25


def test_a_class_that_cannot_be_captured_is_decoded_all_the_same() -> None:
    def refuse(run: Run) -> tuple[Callable[[], object], Tensor]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    policy, asked = make_policy(), requests(n=3)
    engine, graphs = captured(policy)
    graphs.capture = refuse
    with pytest.warns(RuntimeWarning, match="cannot be captured.*not permitted") as told:
        assert tokens(drawn(engine, asked)) == tokens(sample(policy, asked))
    assert len(told) == 1
    assert "not permitted" in graphs.refused


@pytest.mark.parametrize(
    ("count", "up"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (13, 16), (100, 128)]
)
def test_buckets_add_at_most_a_third(count: int, up: int) -> None:
    assert rounded(count) == up


def test_a_fold_tells_its_places_in_a_wider_one() -> None:
    fold = PromptFold.of([0, 1, 1, 0, 1], 2, torch.device("cpu"))
    assert fold.row_QM.tolist() == [[0, 3, 0], [1, 2, 4]]
    assert fold.place_R.tolist() == [0, 3, 4, 1, 5]
    assert fold.place_of(4).tolist() == [0, 4, 5, 1, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2"])
def test_on_cuda_steps_are_captured_and_draw_the_same(kind: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    policy, asked = make_policy(kind).to("cuda"), requests(n=4, prompts=PROMPTS, max_tokens=70)
    engine = NativeEngine(policy, CODEC, max_live=6)
    assert isinstance(engine.decoder, SharedDecoder)
    graphs = engine.decoder.graphs
    assert graphs is not None
    found = drawn(engine, asked)
    assert not graphs.refused, graphs.refused
    assert difference(policy, asked, found) < 1e-4
