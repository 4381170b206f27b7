"""Sampling from inside outputs: the same draws as from each full prefix, and nothing shared is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.engines.base import finished
from groupwise.engines.native.engine import NativeEngine
from groupwise.engines.native.graphs import Graphs
from groupwise.engines.native.shared_decoder import SharedDecoder
from groupwise.engines.scripted import ScriptedEngine
from groupwise.models.policy import LayoutName
from groupwise.types import Branch, Completion, Request, Sampling, Tree
from tests.engines.native.test_graphs import again
from tests.engines.policies import (
    CODEC,
    both_layouts,
    counted_tokens,
    generate,
    make_policy,
    requests,
    sample,
    tokens,
    without_end,
)

TREES = (
    Tree("t0", (3, 9, 4, 7, 11, 2, 8), ((5, 8, 2, 6, 12, 30, 2, 2, 9), (6,), (3, 3, 20, 4))),
    Tree("t1", (10,), ((7, 3, 3), (4, 9, 9, 22, 17, 18, 19, 21, 5, 5, 6, 14, 15))),
    Tree("t2", (2, 2, 31, 5), ((9, 2, 3, 29),)),
)
CUTS = {"t0": [(0, 2), (0, 5), (0, 9), (1, 1), (2, 3)], "t1": [(0, 3), (1, 4), (1, 12)], "t2": [(0, 1)]}
"""Output and cut: nested prefixes, whole outputs, one of which stops before its end, ragged everywhere."""


def branches(n: int = 3, trees: Sequence[Tree] = TREES, **sampling: Any) -> list[Request]:
    """A request per branch, their seeds far apart."""
    found = [Branch(tree, *cut) for tree in trees for cut in CUTS[tree.uid]]
    settings = Sampling(**{"max_tokens": 12, **sampling})
    return [
        Request(f"{b.tree.uid}/{b.output}/{b.cut}", b.token_ids, n, settings, 1000 * i, b) for i, b in enumerate(found)
    ]


def alone(asked: Sequence[Request]) -> list[Request]:
    """The same with each full prefix as a prompt of its own."""
    return [replace(request, branch=None) for request in asked]


def assert_same(found: Sequence[Sequence[Completion]], expected: Sequence[Sequence[Completion]]) -> None:
    assert tokens(found) == tokens(expected)
    for one, other in zip((c for g in found for c in g), (c for g in expected for c in g), strict=True):
        assert one.sampled_logprobs == pytest.approx(other.sampled_logprobs, abs=1e-5)
        assert one.finish == other.finish


KINDS = ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3")
"""Among them windows of a few tokens, soft caps, sinks, learned positions, values of another width."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_live", [4, 64])
def test_continuations_are_those_of_each_full_prefix(kind: str, max_live: int) -> None:
    policy, asked = make_policy(kind), branches()
    assert_same(sample(policy, asked, max_live=max_live), sample(policy, alone(asked), max_live=max_live))


@both_layouts
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_so_they_are_in_each_layout_and_with_stop_strings(layout: LayoutName, temperature: float) -> None:
    policy, asked = make_policy(layout=layout), branches(temperature=temperature, stop=("e", "a"), max_tokens=20)
    found = sample(policy, asked, max_live=5)
    assert_same(found, sample(policy, alone(asked), max_live=5))
    assert_same(found, sample(make_policy(), asked))


def test_trees_and_prompts_run_together() -> None:
    policy = make_policy("mistral")
    mixed = [r for pair in zip(branches(), requests(n=2), strict=False) for r in pair]
    mixed += branches()[len(mixed) // 2 :]
    assert_same(sample(policy, mixed, max_live=6), sample(policy, alone(mixed)))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_captured_steps_draw_the_same(kind: str) -> None:
    policy = make_policy(kind)
    mixed = [*requests(n=2), *branches(max_tokens=20)]
    engine = NativeEngine(policy, CODEC, max_live=5)
    assert isinstance(engine.decoder, SharedDecoder)
    graphs = engine.decoder.graphs = Graphs(policy, again)
    assert_same(generate(engine, mixed), sample(policy, alone(mixed)))
    assert {len(bucket.folds) for bucket in graphs._steps} <= {1, 2}
    assert graphs._steps


@pytest.mark.parametrize("max_live", [1, 5, 64])
def test_no_token_of_a_tree_is_computed_twice(max_live: int) -> None:
    policy, asked = make_policy(), branches(n=4)
    forwarded = counted_tokens(policy)
    drawn = [len(c.token_ids) for group in sample(policy, asked, max_live=max_live) for c in group]
    # Outputs as far as the last branch: 9, 1 and 3 tokens of the first tree, 3 and 12 of the second, 1 of the third.
    assert sum(forwarded) == (7 + 9 + 1 + 3) + (1 + 3 + 12) + (4 + 1) + sum(n - 1 for n in drawn)


def test_what_has_ended_is_forgotten() -> None:
    engine = NativeEngine(make_policy(), CODEC, max_live=5)
    generate(engine, branches())
    decoder = engine.decoder
    assert isinstance(decoder, SharedDecoder)
    assert (decoder.prompts.names, decoder.trunks.names, decoder.starts) == ([], [], {})
    assert not decoder._users
    assert not engine._of_tree


def test_an_output_is_freed_before_its_tree() -> None:
    engine, (short, long) = NativeEngine(make_policy(), without_end()), branches(n=1, trees=TREES[:1])[:4:3]
    engine.submit(replace(short, sampling=Sampling(max_tokens=2)))
    engine.submit(long)
    next(finished(engine))
    decoder = engine.decoder
    assert isinstance(decoder, SharedDecoder)
    assert decoder.prompts.names == [("t0", 0)]
    assert decoder.trunks.names == [("t0", 0, 1)]
    assert len(list(finished(engine))) == 1


def test_outputs_of_a_wide_tree_that_wait_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, wide = make_policy(), Tree("w", (3, 9), tuple((i % 29 + 2, 5, 7) for i in range(20)))
    asked = [
        Request(f"w/{i}", branch.token_ids, 4, Sampling(max_tokens=9), 1000 * i, branch)
        for i, branch in enumerate(Branch(wide, i, 1 + i % 3) for i in range(20))
    ]
    folds: list[tuple[int, ...]] = []
    engine = NativeEngine(policy, CODEC, max_live=8)
    decoder = engine.decoder
    assert isinstance(decoder, SharedDecoder)
    looked_at = decoder._looked_at

    def noted(device: torch.device) -> Any:
        levels = looked_at(device)
        folds.append(tuple(levels[1].fold.row_QM.shape))
        return levels

    monkeypatch.setattr(decoder, "_looked_at", noted)
    assert_same(generate(engine, asked), sample(policy, alone(asked)))
    assert max(entries for entries, _ in folds) <= 8 < 20
    assert max(width for _, width in folds) <= 4


def test_cancelled_branches_leave_the_others_alone() -> None:
    policy, asked = make_policy(), branches()
    expected = dict(zip([r.uid for r in asked], tokens(sample(policy, asked)), strict=True))
    engine = NativeEngine(policy, CODEC, max_live=4)
    for request in asked:
        engine.submit(request)
    engine.cancel("t0/0/5")  # before its tree has begun
    seen: dict[str, list[tuple[int, ...]]] = {}
    for number, (uid, _, completion) in enumerate(finished(engine)):
        if number == 0:
            engine.cancel("t0/2/3")  # begun, and nothing drawn yet
            engine.cancel("t2/0/1")
        seen.setdefault(uid, []).append(completion.token_ids)
    assert {"t0/0/5", "t0/2/3", "t2/0/1"}.isdisjoint(seen)
    assert {uid: sorted(found) for uid, found in seen.items()} == {uid: sorted(expected[uid]) for uid in seen}
    assert len(seen) == len(asked) - 3


def test_who_comes_late_has_the_tree_computed_again() -> None:
    policy = make_policy()
    first, *others = asked = branches(trees=TREES[:1])
    engine = NativeEngine(policy, CODEC, max_live=64)
    engine.submit(first)
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for number, (uid, index, completion) in enumerate(finished(engine)):
        found.setdefault(uid, {})[index] = completion.token_ids
        if number == 0:
            for request in others:
                engine.submit(request)
    expected = tokens(sample(policy, alone(asked)))
    assert [[found[r.uid][i] for i in range(3)] for r in asked] == expected


def test_a_request_that_leaves_its_tree_is_refused() -> None:
    engine = NativeEngine(make_policy(), CODEC)
    with pytest.raises(AssertionError, match="leaves its tree"):
        engine.submit(replace(branches()[0], token_ids=(1, 2, 3)))


def test_a_script_reads_the_whole_prefix() -> None:
    asked = branches(n=1, trees=TREES[2:])
    engine = ScriptedEngine({(2, 2, 31, 5, 9): ["yes"]}, CODEC)
    assert [[c.text for c in group] for group in generate(engine, asked)] == [["yes"]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_on_cuda_the_same(kind: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    policy, asked = make_policy(kind).to("cuda"), branches(n=4, max_tokens=30)
    found, expected = (sample(policy, one, max_live=8) for one in (asked, alone(asked)))
    assert tokens(found) == tokens(expected)
    left, right = (Tensor([p for g in group for c in g for p in c.sampled_logprobs]) for group in (found, expected))
    assert (left - right).abs().max() < 1e-4
