"""Decoding with the model's own cache, or without any, gives the policy's own log-probs."""

from __future__ import annotations

import pytest
import torch

from groupwise.engines.native.plain_decoder import PlainDecoder
from tests.engines.policies import (
    ALIGNED,
    PROMPTS,
    UNCACHED,
    difference,
    make_policy,
    requests,
    sample,
    tokens,
    without_end,
)

CACHED = (
    "bloom",
    "gptj",
    "stablelm",
    "falcon",
    "mistral",
    "gemma2",
    "gpt_oss",
    "gpt2",
    "opt",
    "mpt",
    "mamba",
    "qwen3_next",
)


@pytest.mark.parametrize("kind", [*CACHED, *sorted(UNCACHED | ALIGNED)])
@pytest.mark.parametrize("max_live", [5, 64])
def test_recorded_log_probs_are_the_policys(kind: str, max_live: int) -> None:
    policy, asked = make_policy(kind, "plain"), requests(n=3, max_tokens=14)
    assert difference(policy, asked, sample(policy, asked, max_live=max_live)) < 5e-5


@pytest.mark.parametrize("kind", ["bloom", "gptj", "mistral"])
def test_with_a_cache_a_step_sees_one_token_per_row(kind: str) -> None:
    policy = make_policy(kind, "plain")
    widths = watched(policy.model)
    sample(policy, requests(n=2, max_tokens=5), without_end())
    assert widths == [11, 1, 1, 1, 1]


def test_rows_that_must_begin_at_position_0_have_a_cache_per_length() -> None:
    policy = make_policy("llama4_text", "plain")
    widths = watched(policy.model)
    lengths = sorted({len(prompt) for prompt in PROMPTS})
    sample(policy, requests(n=2, max_tokens=3), without_end())
    assert widths == [*lengths, *[1] * 2 * len(lengths)]


def test_padding_would_have_moved_what_they_compute() -> None:
    policy, asked = make_policy("llama4_text", "plain"), requests(n=2, max_tokens=8)
    policy.aligned = False
    assert difference(policy, asked, sample(policy, asked)) > 0.01


def test_where_the_cache_cannot_be_used_rows_run_again() -> None:
    policy = make_policy("minimax", "plain")
    widths = watched(policy.model)
    sample(policy, requests(n=2, max_tokens=3, prompts=PROMPTS[:2]), without_end())
    assert sorted(set(widths)) == [1, 2, 3, 7, 8, 9]


def test_with_or_without_a_cache_the_draws_are_the_same() -> None:
    policy, asked = make_policy("llama", "plain"), requests(n=2)
    expected = tokens(sample(policy, asked))
    policy.cached = False
    assert tokens(sample(policy, asked)) == expected


@pytest.mark.parametrize("cached", [True, False])
def test_logits_of_a_prompt_are_not_made_for_its_last_token_to_be_read(cached: bool) -> None:
    policy = make_policy("llama", "plain")
    policy.cached = cached
    shapes: set[int] = set()
    policy.model.lm_head.register_forward_hook(lambda module, args, out: shapes.add(out.shape[1]))
    sample(policy, requests())
    assert shapes == {1}


def test_rows_that_are_dropped_leave_the_cache() -> None:
    decoder = PlainDecoder(make_policy("llama", "plain"))
    with torch.no_grad():
        decoder.policy.eval()
        decoder.begin([("a", (3, 4, 5)), ("b", (6,))])
        logits = decoder.attach(["a", "a", "b"], 5)
        assert torch.equal(logits[0], logits[1])
        decoder.step(torch.tensor([7, 8, 9]))
        decoder.keep([2, 1])
        after = decoder.step(torch.tensor([10, 11]))
    assert decoder.cache is not None
    [part] = decoder.cache.parts
    assert part.cache.layers[0].keys.shape[0] == 2
    expected = [
        decoder.policy.model(input_ids=torch.tensor([row])).logits[0, -1] for row in ([6, 9, 10], [3, 4, 5, 8, 11])
    ]
    torch.testing.assert_close(after, torch.stack(expected), atol=1e-5, rtol=0)
    decoder.keep([])
    assert decoder.cache is None, "a cache that nothing decodes from is given back"


def watched(model: torch.nn.Module) -> list[int]:
    """The widths of the forward passes to come."""
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: widths.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    return widths
