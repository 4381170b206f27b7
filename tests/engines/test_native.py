"""Sampling from the policy's own weights: right distributions, the same draws in any company, no waste."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from groupwise.engines import cache
from groupwise.engines.base import generate
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError, ModelError
from groupwise.models.codec import Codec
from groupwise.models.load import _checkpoint_gradients
from groupwise.models.policy import LayoutName, Policy
from groupwise.models.small import character_tokenizer
from groupwise.types import Completion, Request, Sampling
from tests.engines.policies import ALPHABET, CODEC, PROMPTS, make_policy, requests, sample, tokens, without_end
from tests.tiny_models import clone_of

LAYOUTS: list[LayoutName] = ["shared", "plain"]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def difference(policy: Policy, asked: Sequence[Request], found: Sequence[Sequence[Completion]]) -> float:
    """Largest difference between the log-probs that the sampler recorded and those of the policy's forward."""
    groups = [(r.token_ids, [c.token_ids for c in group]) for r, group in zip(asked, found, strict=True)]
    recorded = torch.tensor([p for group in found for c in group for p in c.sampled_logprobs])
    temperature = asked[0].sampling.temperature
    computed = policy(policy.stream(groups), temperature or 1.0).logprobs_T
    return (computed.cpu() - recorded).abs().max().item()


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
    for number, (uid, index, completion) in enumerate(engine.completed()):
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
    assert list(engine.completed()) == []


@both_layouts
def test_lengths_are_bounded(layout: LayoutName) -> None:
    found = sample(make_policy(layout=layout), requests(n=2, max_tokens=1))
    assert {len(c.token_ids) for group in found for c in group} == {1}
    long = sample(make_policy(layout=layout), requests(n=2, max_tokens=33), without_end())
    assert {len(c.token_ids) for group in long for c in group} == {33}


# --- nothing is computed twice, and what has ended costs nothing ------------------------------------------------------


def test_a_prompt_is_computed_once_and_finished_outputs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = make_policy(), requests(n=5, max_tokens=20)
    engine = NativeEngine(policy, CODEC, max_live=6)
    forwarded: list[int] = []
    hidden = policy.hidden

    def counting(input_ids: Tensor, *rest: Any) -> Tensor:
        forwarded.append(input_ids.numel())
        return hidden(input_ids, *rest)

    monkeypatch.setattr(policy, "hidden", counting)
    begun: list[str] = []
    begin = engine.decoder.begin
    monkeypatch.setattr(engine.decoder, "begin", lambda p: begun.extend(uid for uid, _ in p) or begin(p))  # type: ignore[func-returns-value]
    lengths = [len(c.token_ids) for group in generate(engine, asked) for c in group]
    assert min(lengths) < 10
    assert sorted(begun) == ["r0", "r1", "r2", "r3"]
    assert sum(forwarded) == sum(map(len, PROMPTS)) + sum(n - 1 for n in lengths)


def test_many_prompts_are_computed_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(sample(make_policy(), requests()))
    monkeypatch.setattr(cache, "_PREFILL_TOKENS", 12)
    policy = make_policy()
    widths: list[int] = []
    hidden = policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda ids, *rest: widths.append(ids.shape[1]) or hidden(ids, *rest))
    assert tokens(sample(policy, requests())) == expected
    assert [width for width in widths if width > 1] == [7 + 1 + 4, 11]


def test_slots_refill_while_others_go_on() -> None:
    policy, codec = make_policy(), without_end()
    steps: list[int] = []
    engine = NativeEngine(policy, codec, max_live=4, on_tokens=steps.append)
    lengths = [3, 9, 9, 9, 6, 3]
    for i, length in enumerate(lengths):
        engine.submit(Request(f"r{i}", PROMPTS[0], 1, Sampling(max_tokens=length), i))
    order = [sampled.uid for sampled in engine.completed()]
    assert steps == [4] * 9 + [1] * 3
    assert (order[0], set(order[1:5]), order[5]) == ("r0", {"r1", "r2", "r3", "r4"}, "r5")


def test_plain_decoding_computes_each_prompt_of_a_wave_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(layout="plain")
    forwarded: list[tuple[int, ...]] = []
    policy.model.register_forward_pre_hook(
        lambda module, args, keywords: forwarded.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    found = sample(policy, requests(n=3, max_tokens=8), without_end())
    assert tokens(found)
    assert forwarded == [(4, 11)] + [(12, 1)] * 7


def test_stores_are_reused_and_given_back_on_close() -> None:
    engine = NativeEngine(make_policy(), CODEC, max_live=6)
    first = generate(engine, requests(n=3))
    store = engine.decoder.outputs.layers[0][0]  # type: ignore[attr-defined]
    assert tokens(generate(engine, requests(n=3))) == tokens(first)
    assert engine.decoder.outputs.layers[0][0] is store  # type: ignore[attr-defined]
    assert store.shape[0] == 6
    engine.close()
    assert engine.decoder.outputs.layers == {}  # type: ignore[attr-defined]
    assert tokens(generate(engine, requests(n=3))) == tokens(first)


# --- weights ----------------------------------------------------------------------------------------------------------


@both_layouts
def test_new_weights_are_sampled_from_and_change_back(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    engine = NativeEngine(policy, CODEC)
    old = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    before = generate(engine, requests(temperature=0.0))
    engine.load_weights(((n, t * 1.5 if "mlp" in n else t) for n, t in old.items()), version=3)
    asked = requests(temperature=0.0)
    changed = generate(engine, asked)
    assert tokens(changed) != tokens(before)
    assert difference(policy, asked, changed) < 1e-5
    assert {c.policy_versions for g in changed for c in g} == {((3, len(c.token_ids)),) for g in changed for c in g}
    engine.load_weights(old.items(), version=4)
    assert tokens(generate(engine, requests(temperature=0.0))) == tokens(before)


def test_weights_that_are_the_policys_own_are_not_copied() -> None:
    policy = make_policy()
    engine = NativeEngine(policy, CODEC)
    counters = {name: parameter._version for name, parameter in policy.model.named_parameters()}
    engine.load_weights(policy.model.state_dict(keep_vars=True).items(), version=9)
    assert {name: parameter._version for name, parameter in policy.model.named_parameters()} == counters
    assert engine.version == 9
    with pytest.raises(KeyError, match=r"no\.such"):
        engine.load_weights([("no.such.weight", torch.zeros(1))], version=10)


def test_weights_may_change_under_way_and_each_token_says_which_drew_it() -> None:
    engine = NativeEngine(make_policy(), without_end())
    engine.submit(Request("short", PROMPTS[0], 1, Sampling(max_tokens=4), 1))
    engine.submit(Request("long", PROMPTS[1], 1, Sampling(max_tokens=10), 2))
    versions = {}
    for uid, _, completion in engine.completed():
        versions[uid] = completion.policy_versions
        if uid == "short":
            engine.load_weights([], version=1)
    assert versions == {"short": ((0, 4),), "long": ((0, 4), (1, 6))}


# --- modes, errors and leftovers --------------------------------------------------------------------------------------


@both_layouts
def test_the_policy_is_in_train_mode_whenever_the_consumer_has_the_word(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    engine = NativeEngine(policy, CODEC)
    engine.submit(requests()[0])
    completions = engine.completed()
    next(completions)
    assert policy.training
    assert policy.model.model.layers[0].training
    policy.eval()
    next(completions)
    assert not policy.training, "whatever the mode was, it comes back"


@both_layouts
def test_sampling_leaves_nothing_behind_that_training_trips_over(layout: LayoutName) -> None:
    policy, asked = make_policy(layout=layout), requests(n=2)
    fresh = make_policy(layout=layout)
    stream = policy.stream(
        [(r.token_ids, [c.token_ids for c in g]) for r, g in zip(asked, sample(policy, asked), strict=True)]
    )
    gradients = []
    for one in (policy, fresh):
        one(stream).logprobs_T.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[1])
    assert not any(tensor.is_inference() for tensor in policy.state_dict().values())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_follow_the_length_do_not_trip_it_either(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 8}
    config = clone_of("llama").config
    config.rope_parameters, config.max_position_embeddings = rope, 16
    policy = Policy(type(clone_of("llama"))(config), "plain", make_policy().head)
    asked = [Request("a", (3, 4, 5), 2, Sampling(max_tokens=30), 0)]
    found = sample(policy, asked, without_end())
    policy(policy.stream([((3, 4, 5), [c.token_ids for c in found[0]])])).logprobs_T.sum().backward()
    policy(policy.stream([((3, 4), [(5, 6)])])).logprobs_T.sum().backward()


@both_layouts
def test_gradient_checkpointing_does_not_disturb_sampling(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    expected = tokens(sample(policy, requests()))
    _checkpoint_gradients(policy.model, "a model")
    assert tokens(sample(policy, requests())) == expected


@both_layouts
def test_after_an_error_the_engine_starts_from_nothing(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    expected = tokens(sample(policy, requests()))
    told: list[int] = []

    def fail_once(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            raise KeyboardInterrupt

    engine = NativeEngine(policy, CODEC, max_live=7, on_tokens=fail_once)
    with pytest.raises(KeyboardInterrupt):
        generate(engine, requests())
    assert policy.training
    assert list(engine.completed()) == []
    assert tokens(generate(engine, requests())) == expected


@both_layouts
def test_logits_that_are_not_finite_are_an_error_and_not_a_sample(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite any more"):
        sample(policy, requests())


@both_layouts
def test_cancelling_in_the_middle_leaves_the_others_as_they_were(layout: LayoutName) -> None:
    policy, asked = make_policy(layout=layout), requests(n=3, max_tokens=20)
    expected = dict(zip((r.uid for r in asked), tokens(sample(policy, asked)), strict=True))
    engine = NativeEngine(policy, CODEC, max_live=8)
    for request in asked:
        engine.submit(request)
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for number, (uid, index, completion) in enumerate(engine.completed()):
        found.setdefault(uid, {})[index] = completion.token_ids
        if number == 0:
            engine.cancel("r0")
            engine.cancel("r3")
    for uid in ("r1", "r2"):
        assert [found[uid][i] for i in range(3)] == expected[uid]


def test_progress_counts_every_token_that_was_drawn() -> None:
    told: list[int] = []
    found = sample(make_policy(), requests(), max_live=5, on_tokens=told.append)
    assert sum(told) == sum(len(c.token_ids) for group in found for c in group)
    assert max(told) <= 5


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
