"""What a pass without data leaves out, against passes that leave out nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from groupwise.models.head import HeadShape
from groupwise.models.tiles import TiledAttention
from groupwise.models.tracing import counter
from groupwise.planning import trace
from groupwise.planning.meter import Cost, Meter
from groupwise.planning.repeats import Counting, Rounds
from groupwise.planning.sampling import sampling_costs
from groupwise.planning.trace import Shape, TracedModel

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma2": {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 40},  # a window, a soft cap
}
# Prompts of 200 are cut into two rows of queries; unlike counts give tiles of several kinds.
SHAPE, PART = Shape(groups=3, outputs=6, prompt=200, length=40), (6, 6, 2)


class Everything(Counting):
    """Leaves out nothing."""

    def rounds(self, items: Sequence[Any], kind: Callable[[Any], Hashable]) -> Sequence[Any]:
        return items

    def attention(self, forest: Any, heads: Any, inputs: Any, options: Any) -> Any:
        return TiledAttention.apply(*inputs, (forest.tiles(*heads), options))  # type: ignore[no-untyped-call]


def a_config(kind: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[kind](**SIZES | KINDS[kind])


def costs(kind: str, dtype: torch.dtype) -> list[Cost]:
    traced = TracedModel(a_config(kind), "shared", HeadShape(), dtype, direct=kind == "qwen3")
    passes = [traced.training(SHAPE, PART, checkpointing) for checkpointing in (False, True)]
    sampling = sampling_costs(traced, SHAPE, 8, cached=True, parameters=0)
    return [*passes, traced.scoring(SHAPE, PART), sampling.prefill, sampling.longest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_counted(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    short = costs(kind, dtype)
    monkeypatch.setattr(trace, "Counting", Everything)
    # Windows are made once, and what making them computes is not counted.
    close = 0.01 if kind == "qwen3" else 0.1
    for found, full in zip(short, costs(kind, dtype), strict=True):
        assert found.kept == pytest.approx(full.kept, rel=0.002)
        assert found.peak == pytest.approx(full.peak, rel=0.002)
        assert found.flops == full.flops
        assert found.moved == pytest.approx(full.moved, rel=close)
        assert found.operations == pytest.approx(full.operations, rel=close)


def test_attention_is_run_once_for_all_layers_and_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    real = TiledAttention.forward
    monkeypatch.setattr(TiledAttention, "forward", staticmethod(lambda *a: runs.append(1) or real(*a)))
    traced = TracedModel(a_config("qwen3"), "shared", HeadShape(), torch.float32)
    for checkpointing in (False, True):
        traced.training(SHAPE, PART, checkpointing)
    assert len(runs) == 1
    traced.scoring(SHAPE, PART)  # without gradient it keeps less
    assert len(runs) == 2


def test_rounds_are_counted_as_often_as_their_kind_is_there() -> None:
    """Four rounds of 2 x 2 and one of 3 x 3: 4 * 16 + 54 FLOPs, though the former are run twice."""
    factors = {size: torch.ones(size, size) for size in (2, 3)}
    with Meter() as meter:
        rounds = Rounds.of([2, 2, 3, 2, 2], lambda size: size, meter)
        seen = [(size, factors[size] @ factors[size])[0] for size in rounds]
    assert (seen, len(rounds), meter.times) == ([2, 2, 3], 5, 1)
    assert (meter.flops, meter.operations) == (4 * 16 + 54, 5)


def test_a_loop_that_is_left_counts_once_again() -> None:
    meter = Meter()
    with pytest.raises(ValueError, match="left"):
        leave(Rounds.of([1, 1, 1], lambda _: 0, meter), meter)
    assert meter.times == 1


def leave(rounds: Rounds[int], meter: Meter) -> None:
    for _ in rounds:
        if meter.times > 1:
            raise ValueError("left")


def test_nobody_counts_where_tensors_have_data() -> None:
    assert counter.get() is None
    TracedModel(a_config("qwen3"), "shared", HeadShape(), torch.float32).scoring(SHAPE, PART)
    assert counter.get() is None


def test_a_span_that_is_counted_again_adds_up() -> None:
    """40 bytes are there. A span of a 16-byte result and a 16-byte one that is gone: 72 at most; replayed, 56 + 32."""
    before = torch.ones(4)
    alone = Meter()
    with alone:
        result = before.exp().exp()
    span = alone.span()
    assert (span.stays, span.peaks, span.moved, span.operations) == ((16, 0), (32, 0), 64, 2)
    with Meter() as meter:
        held = before.new_empty(10)
        meter.replay(span)
    assert (meter.peak, meter.live, meter.operations) == (40 + 32, 40, 3)
    assert len(held) + len(result) == 14
