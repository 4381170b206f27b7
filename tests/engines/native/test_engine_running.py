"""How the native engine runs: nothing computed twice, weights that change, modes, errors, cancelling, progress."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from groupwise.engines.base import finished
from groupwise.engines.native import shared_decoder
from groupwise.engines.native.engine import NativeEngine
from groupwise.errors import ModelError
from groupwise.models.load import checkpoint_gradients
from groupwise.models.policy import LayoutName, Policy
from groupwise.types import Request, Sampling
from tests.engines.policies import (
    CODEC,
    PROMPTS,
    both_layouts,
    counted_tokens,
    difference,
    generate,
    make_policy,
    requests,
    sample,
    tokens,
    without_end,
)  # fmt: skip
from tests.tiny_models import clone_of

# --- nothing is computed twice, and what has ended costs nothing ------------------------------------------------------


def test_a_prompt_is_computed_once_and_finished_outputs_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = make_policy(), requests(n=5, max_tokens=20)
    engine = NativeEngine(policy, CODEC, max_live=6)
    forwarded = counted_tokens(policy)
    begun: list[str] = []
    begin = engine.decoder.begin

    def noted(prompts: Any, branches: Any) -> None:
        begun.extend(uid for uid, _ in prompts)
        begin(prompts, branches)

    monkeypatch.setattr(engine.decoder, "begin", noted)
    lengths = [len(c.token_ids) for group in generate(engine, asked) for c in group]
    assert min(lengths) < 10
    assert sorted(begun) == ["r0", "r1", "r2", "r3"]
    assert sum(forwarded) == sum(map(len, PROMPTS)) + sum(n - 1 for n in lengths)


def test_many_prompts_are_computed_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(sample(make_policy(), requests()))
    monkeypatch.setattr(shared_decoder, "_PREFILL_TOKENS", 12)
    policy = make_policy()
    forwarded = counted_tokens(policy)
    assert tokens(sample(policy, requests())) == expected
    assert forwarded[:2] == [7 + 1 + 4, 11], "prompts come first"


def test_slots_refill_while_others_go_on() -> None:
    policy, codec = make_policy(), without_end()
    steps: list[int] = []
    engine = NativeEngine(policy, codec, max_live=4, on_tokens=steps.append)
    lengths = [3, 9, 9, 9, 6, 3]
    for i, length in enumerate(lengths):
        engine.submit(Request(f"r{i}", PROMPTS[0], 1, Sampling(max_tokens=length), i))
    order = [sampled.uid for sampled in finished(engine)]
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
    [short] = engine.poll()
    engine.load_weights([], version=1, in_flight="continue")
    [long] = engine.poll()
    assert (short.uid, short.completion.policy_versions) == ("short", ((0, 4),))
    assert (long.uid, long.completion.policy_versions) == ("long", ((0, 4), (1, 6)))


# --- modes, errors and leftovers --------------------------------------------------------------------------------------


@both_layouts
def test_the_policy_is_in_train_mode_whenever_the_consumer_has_the_word(layout: LayoutName) -> None:
    policy = make_policy(layout=layout)
    engine = NativeEngine(policy, CODEC)
    engine.submit(requests()[0])
    completions = finished(engine)
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
    checkpoint_gradients(policy.model, "a model")
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
    assert list(finished(engine)) == []
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
    for number, (uid, index, completion) in enumerate(finished(engine)):
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


@both_layouts
def test_new_weights_leave_the_decoder_and_its_memory_where_they_are(layout: LayoutName) -> None:
    """Also where something is in flight and begins again: stores and captured steps were paid for."""
    policy = make_policy(layout=layout)
    engine = NativeEngine(policy, CODEC, max_live=4)
    expected = tokens(generate(engine, requests(n=3)))
    decoder = engine.decoder
    for request in requests(n=3):
        engine.submit(request)
    seen = {(one.uid, one.output): one.completion.token_ids for one in engine.poll()}
    engine.load_weights([], version=1)
    seen |= {(one.uid, one.output): one.completion.token_ids for one in finished(engine)}
    engine.load_weights([], version=2)
    assert engine.decoder is decoder
    assert [[seen[f"r{i}", j] for j in range(3)] for i in range(4)] == expected
    assert tokens(generate(engine, requests(n=3))) == expected
