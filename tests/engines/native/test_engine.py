"""Sampling from the policy's own weights: the right distribution, the same draws in any company, the right ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from groupwise.demo.model import character_tokenizer
from groupwise.engines.base import finished
from groupwise.engines.native.engine import NativeEngine
from groupwise.errors import ConfigError
from groupwise.models.policy import LayoutName
from groupwise.tokenizer.codec import Codec
from groupwise.types import Completion, Request, Sampling
from tests.engines.policies import (
    ALPHABET,
    CODEC,
    LAYOUTS,
    PROMPTS,
    both_layouts,
    difference,
    make_policy,
    requests,
    sample,
    tokens,
    without_end,
)  # fmt: skip
from tests.tiny_models import clone_of

# --- the distribution is the policy's ---------------------------------------------------------------------------------


@both_layouts
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("max_live", [2, 64])
def test_recorded_log_probs_are_the_policys(layout: LayoutName, temperature: float, max_live: int) -> None:
    policy, asked = make_policy(layout=layout), requests(n=3, temperature=temperature)
    assert difference(policy, asked, sample(policy, asked, max_live=max_live)) < 1e-5


SHARED_KINDS = (
    "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "phi", "cohere", "gpt2", "opt", "deepseek_v3",
    "qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("kind", SHARED_KINDS)
def test_so_they_are_for_every_kind_of_attention(kind: str) -> None:
    policy, asked = make_policy(kind), requests(n=3, max_tokens=16)
    assert difference(policy, asked, sample(policy, asked, max_live=7)) < 3e-5


@both_layouts
def test_half_precision_is_sampled_from_as_well(layout: LayoutName) -> None:
    policy, asked = make_policy(layout=layout, dtype=torch.bfloat16), requests(n=3)
    assert difference(policy, asked, sample(policy, asked)) < 0.1


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_steps_past_the_modules_draw_what_steps_through_them_draw(kind: str) -> None:
    direct, stock = (make_policy(kind, direct=choice) for choice in (True, False))
    assert direct.direct is not None
    assert stock.direct is None
    asked = requests(n=3, max_tokens=20)
    found, expected = sample(direct, asked), sample(stock, asked)
    assert tokens(found) == tokens(expected)
    assert difference(direct, asked, found) < 1e-5


@both_layouts
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_greedy_is_the_librarys_generate(kind: str, layout: LayoutName) -> None:
    found = sample(make_policy(kind, layout), requests(n=2, temperature=0.0, max_tokens=20))
    stock = clone_of(kind).eval()
    settings = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=1, pad_token_id=0)
    for prompt, group in zip(PROMPTS, found, strict=True):
        row = stock.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        assert [list(completion.token_ids) for completion in group] == [row] * 2


@both_layouts
def test_frequencies_are_the_policys_probabilities(layout: LayoutName) -> None:
    policy, count = make_policy(layout=layout), 2000
    asked = [Request("a", (3, 9, 4), count, Sampling(max_tokens=1), 0)]
    drawn = torch.tensor([c.token_ids[0] for c in sample(policy, asked, max_live=1000)[0]])
    with torch.no_grad():
        probs = torch.softmax(clone_of("llama")(input_ids=torch.tensor([[3, 9, 4]])).logits[0, -1], -1)
    likely = probs > 0.005
    observed = torch.bincount(drawn, minlength=32)[likely]
    chi_square = ((observed - count * probs[likely]) ** 2 / (count * probs[likely])).sum().item()
    assert chi_square < 58  # at most 31 degrees of freedom, 0.3 %


# --- draws depend on nothing but seed, token and distribution ---------------------------------------------------------


@both_layouts
def test_company_order_and_room_change_no_token(layout: LayoutName) -> None:
    policy, asked = make_policy(layout=layout), requests(n=3)
    together = tokens(sample(policy, asked, max_live=64))
    assert tokens(sample(policy, asked, max_live=1)) == together
    assert tokens(sample(policy, asked, max_live=5)) == together
    assert tokens(sample(policy, asked[::-1], max_live=4))[::-1] == together
    for request, group in zip(asked, together, strict=True):
        assert tokens(sample(policy, [request])) == [group]


def test_both_layouts_draw_the_same() -> None:
    found = [tokens(sample(make_policy(layout=layout), requests(n=3))) for layout in LAYOUTS]
    assert found[0] == found[1]


@both_layouts
def test_output_i_draws_with_seed_plus_i(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)

    def outputs(uid: str, n: int, seed: int) -> Request:
        return Request(uid, PROMPTS[0], n, Sampling(max_tokens=12), seed)

    first, second, same, other = tokens(
        sample(policy, [outputs("a", 4, 10), outputs("b", 2, 12), outputs("c", 4, 10), outputs("d", 4, 99)])
    )
    assert first[2:] == second
    assert same == first
    assert other != first
    assert len(set(first)) == 4


@both_layouts
def test_requests_with_unlike_settings_are_drawn_as_if_alone(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 0.5}, {}, {"top_k": 3}, {"top_p": 0.5, "max_tokens": 3}, {"min_p": 0.2},
        {"min_tokens": 9}, {"max_tokens": 1}, {"stop": ("e", "a")},
    ]  # fmt: skip
    asked = [Request(f"r{i}", PROMPTS[i % 4], 2, Sampling(**{"max_tokens": 14, **k}), i) for i, k in enumerate(kinds)]
    together = sample(policy, asked, max_live=8)
    for request, group in zip(asked, together, strict=True):
        (alone,) = sample(policy, [request])
        assert tokens([alone]) == tokens([group])
        for one, other in zip(alone, group, strict=True):
            assert one.sampled_logprobs == pytest.approx(other.sampled_logprobs, abs=1e-5)


@both_layouts
def test_a_longer_prompt_may_come_while_shorter_ones_are_decoded(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    long = Request("long", tuple(i % 30 + 2 for i in range(40)), 2, Sampling(max_tokens=30), 5)
    short = Request("short", (4, 5), 4, Sampling(max_tokens=12), 8)
    engine = NativeEngine(policy, CODEC, max_live=5)
    engine.submit(short)
    found: dict[str, dict[int, Completion]] = {"short": {}, "long": {}}
    for number, (uid, index, completion) in enumerate(finished(engine)):
        found[uid][index] = completion
        if number == 0:
            engine.submit(long)
    expected = {
        r.uid: dict(enumerate(group)) for r, group in zip((short, long), sample(policy, [short, long]), strict=True)
    }
    for uid, group in expected.items():
        assert {i: c.token_ids for i, c in found[uid].items()} == {i: c.token_ids for i, c in group.items()}


# --- ends -------------------------------------------------------------------------------------------------------------


@both_layouts
def test_any_of_the_end_tokens_ends_an_output(layout: LayoutName) -> None:
    ends = {1, 5, 9, 20}
    codec = Codec(character_tokenizer(ALPHABET), end_token_ids=ends)
    found = [c for group in sample(make_policy(layout=layout), requests(n=6, max_tokens=30), codec) for c in group]
    last = {c.token_ids[-1] for c in found if c.finish == "stop"}
    assert len(last) > 1
    assert last <= ends
    for completion in found:
        assert not ends & set(completion.token_ids[:-1])
        assert (completion.finish == "length") == (completion.token_ids[-1] not in ends)


@both_layouts
def test_no_end_token_is_drawn_before_the_minimum_length(layout: LayoutName) -> None:
    codec = Codec(character_tokenizer(ALPHABET), end_token_ids=range(1, 12))
    policy = make_policy(layout=layout)
    short = {len(c.token_ids) for g in sample(policy, requests(n=8, max_tokens=30), codec) for c in g}
    assert min(short) < 5
    found = [c for g in sample(policy, requests(n=8, max_tokens=30, min_tokens=5), codec) for c in g]
    assert min(len(c.token_ids) for c in found) == 5, "the end token counts, and may be the last of the five"
    for completion in found:
        assert not set(range(1, 12)) & set(completion.token_ids[:-1])


@both_layouts
def test_a_stop_string_ends_an_output_where_it_is_complete(layout: LayoutName) -> None:
    policy, codec = make_policy(layout=layout), without_end()
    whole = [c for g in sample(policy, requests(n=2, max_tokens=40), codec) for c in g]
    stop = (text_of(whole[0].token_ids)[10:13], text_of(whole[3].token_ids)[7:9])
    found = [c for g in sample(policy, requests(n=2, max_tokens=40, stop=stop), codec) for c in g]
    for completion, uncut in zip(found, whole, strict=True):
        end = first_end(uncut.token_ids, stop)
        assert completion.token_ids == uncut.token_ids[:end]
        assert completion.finish == ("length" if end is None else "stop")
        assert len(completion.sampled_logprobs) == len(completion.token_ids)
    assert {c.finish for c in found} == {"stop", "length"}


def text_of(token_ids: Sequence[int]) -> str:
    return CODEC.decode(token_ids, skip_special_tokens=False)


def first_end(token_ids: Sequence[int], stop: Sequence[str], after: int = 0) -> int | None:
    """How many tokens there are when one of them, not before number `after`, completes a stop string."""
    for count in range(max(after, 1), len(token_ids) + 1):
        before, now = (text_of(token_ids[:c]) for c in (count - 1, count))
        if any(now.count(s) > before.count(s) for s in stop):
            return count
    return None


def test_a_stop_string_waits_for_the_minimum_length() -> None:
    policy, codec = make_policy(), without_end()
    ((whole,),) = sample(policy, requests(n=1, prompts=PROMPTS[:1], max_tokens=40), codec)
    stop = (text_of(whole.token_ids[3:4]),)
    asked = requests(n=1, prompts=PROMPTS[:1], max_tokens=40, min_tokens=10, stop=stop)
    ((found,),) = sample(policy, asked, codec)
    assert found.token_ids == whole.token_ids[: first_end(whole.token_ids, stop, after=10)]
    assert len(found.token_ids) >= 10


def test_an_empty_stop_string_is_refused_before_anything_runs() -> None:
    engine = NativeEngine(make_policy(), CODEC)
    with pytest.raises(ConfigError, match="stop string is empty"):
        engine.submit(requests(stop=("a", ""))[0])
    assert list(finished(engine)) == []


@both_layouts
def test_lengths_are_bounded(layout: LayoutName) -> None:
    found = sample(make_policy(layout=layout), requests(n=2, max_tokens=1))
    assert {len(c.token_ids) for group in found for c in group} == {1}
    long = sample(make_policy(layout=layout), requests(n=2, max_tokens=33), without_end())
    assert {len(c.token_ids) for group in long for c in group} == {33}


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_layouts
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_on_cuda_recorded_log_probs_are_the_policys(
    kind: str, dtype: torch.dtype, tolerance: float, layout: LayoutName
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    policy, asked = make_policy(kind, layout, dtype).to("cuda"), requests(n=4, max_tokens=16)
    found = sample(policy, asked, max_live=6)
    assert difference(policy, asked, found) < tolerance
    if dtype == torch.float32:
        assert tokens(found) == tokens(sample(make_policy(kind, layout), asked))
