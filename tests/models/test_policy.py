"""Shared stream = plain stream = the stock model, one output at a time: in log-probs and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from groupwise.models.attention import ForestAttention
from groupwise.models.head import HeadShape
from groupwise.models.layout import build_forest
from groupwise.models.load import checkpoint_gradients
from groupwise.models.policy import LayoutName, Policy, silence_dropout
from tests.tiny_models import (
    GROUPS,
    KEYS,
    clone_of,
    exact_model,
    gradients,
    largest_difference,
    policy_of,
    stock_logprobs,
)

LAYOUTS: list[LayoutName] = ["shared", "plain"]
OTHERS = {
    "mistral": HeadShape(), "gemma2": HeadShape(softcap=30.0), "gpt_oss": HeadShape(), "phi": HeadShape(),
    "cohere": HeadShape(scale=0.0625), "granite": HeadShape(), "gpt2": HeadShape(), "opt": HeadShape(),
    "deepseek_v3": HeadShape(), "gemma3_text": HeadShape(),
}  # fmt: skip


def assert_agreement(
    policy: Policy, model: PreTrainedModel, logprobs: float, gradient: float, *, partial: bool = False
) -> None:
    """Log-probs and gradients of a policy are those of the stock model, within so much."""
    expected, _ = stock_logprobs(model, GROUPS)
    found = policy(policy.stream(GROUPS)).logprobs_T
    torch.testing.assert_close(found, expected, atol=logprobs, rtol=0)
    left, right = gradients(policy.model, found, partial=partial), gradients(model, expected, partial=partial)
    assert largest_difference(left, right) < gradient


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KEYS)
def test_log_probs_and_gradients_are_the_stock_models(kind: str, layout: LayoutName, checkpointing: bool) -> None:
    model = exact_model(kind, tied=kind == "qwen3")
    policy = policy_of(model, layout)
    if checkpointing:
        checkpoint_gradients(policy.model, "a model")
    assert policy(policy.stream(GROUPS)).logprobs_T.dtype == torch.float64
    assert_agreement(policy, model, 1e-10, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KEYS)
def test_in_float32_they_agree_to_five_digits(kind: str, layout: LayoutName) -> None:
    model = clone_of(kind)
    assert_agreement(policy_of(model, layout), model, 1e-5, 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("kind", KEYS)
def test_so_they_are_past_the_modules(kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_model(kind, tied=kind == "qwen3")
    policy = policy_of(model, "shared", direct=True)
    if checkpointing:
        checkpoint_gradients(policy.model, "a model")
    monkeypatch.setattr(policy.model.base_model, "forward", None)
    calls = count_layers(policy, monkeypatch)
    assert_agreement(policy, model, 1e-10, 1e-10)
    assert calls == [0, 1] + [1, 0] * checkpointing, "layers are computed again where that was asked for"


def count_layers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that a policy computes past the modules, in order."""
    assert policy.direct is not None
    layer, calls = policy.direct._layer, list[int]()

    def counted(index: int, *rest: Any) -> Tensor:
        calls.append(index)
        return layer(index, *rest)

    monkeypatch.setattr(policy.direct, "_layer", counted)
    return calls


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_past_the_modules_they_agree_to_five_digits_in_float32(kind: str) -> None:
    model = clone_of(kind)
    policy = policy_of(model, "shared", direct=True)
    assert policy.direct is not None
    assert_agreement(policy, model, 1e-5, 1e-4)


def test_half_precision_past_the_modules_is_as_near_as_through_them() -> None:
    model = clone_of("qwen3")
    expected, _ = stock_logprobs(model, GROUPS)
    errors = []
    for direct in (True, False):
        policy = policy_of(model, "shared", direct=direct).to(torch.bfloat16)
        errors.append((policy(policy.stream(GROUPS)).logprobs_T - expected).abs().max().item())
    assert errors[0] < max(0.02, 1.5 * errors[1])


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "modules"])
def test_hidden_states_may_be_asked_for_of_some_tokens(direct: bool) -> None:
    policy = policy_of(exact_model("qwen2"), "shared", direct=direct)
    ids, lengths = torch.arange(20), (6, 5, 4, 5)
    asked = [0, 3, 5, 7, 8, 9, 14, 19]
    forest = build_forest(lengths, (-1, 0, 1, 0), asked=asked)
    whole = policy.hidden(ids, forest.position_N, ForestAttention(build_forest(lengths, (-1, 0, 1, 0))))
    found = policy.hidden(ids, forest.position_N, ForestAttention(forest), forest.asked_K)
    torch.testing.assert_close(found, whole[asked], atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_agree_too(kind: str, layout: LayoutName) -> None:
    model = clone_of(kind)
    # A router's unchosen experts and unused position tables get no gradient.
    assert_agreement(policy_of(model, layout, OTHERS[kind]), model, 1e-4, 1e-3, partial=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_temperature_divides_the_logits_and_entropy_comes_on_request(layout: LayoutName) -> None:
    model = exact_model("llama")
    policy = policy_of(model, layout)
    expected, entropy = stock_logprobs(model, GROUPS, temperature=0.7)
    found = policy(policy.stream(GROUPS), temperature=0.7, entropy=True)
    torch.testing.assert_close(found.logprobs_T, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.entropy_T, entropy, atol=1e-10, rtol=0)
    assert policy(policy.stream(GROUPS)).entropy_T is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_is_more_than_a_matrix_is_the_models_own(layout: LayoutName) -> None:
    model = clone_of("cohere")  # as if its scale were unknown
    policy = policy_of(model, layout, head=None)
    expected, entropy = stock_logprobs(model, GROUPS, temperature=0.7)
    found = policy(policy.stream(GROUPS), temperature=0.7, entropy=True)
    torch.testing.assert_close(found.logprobs_T, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy_T, entropy, atol=1e-5, rtol=0)
    assert largest_difference(gradients(policy.model, found.logprobs_T), gradients(model, expected)) < 1e-4


def test_a_prompt_is_computed_once_per_group() -> None:
    policies = {layout: policy_of(exact_model("llama"), layout) for layout in LAYOUTS}
    tokens = {layout: policy.stream(GROUPS[:1]).tokens for layout, policy in policies.items()}
    assert tokens == {"shared": 7 + 8 + 0 + 1, "plain": 3 * (7 + 8)}


def test_checkpointing_recomputes_the_layers_though_nothing_is_dropped() -> None:
    policy = policy_of(exact_model("llama"), "shared")
    checkpoint_gradients(policy.model, "a model")
    calls = []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    policy(policy.stream(GROUPS)).logprobs_T.sum().backward()
    assert len(calls) == 2, "in eval mode, checkpointing would switch itself off"


DROPOUTS: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5},
    "llama": {"attention_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.1, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DROPOUTS)
def test_there_is_no_chance_in_train_mode_and_the_config_keeps_its_dropout(kind: str, layout: LayoutName) -> None:
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 48, "num_local_experts": 4} if kind in ("llama", "mixtral") else {}
    small |= {"ffn_dim": 48, "word_embed_proj_dim": 32} if kind == "opt" else {}
    config = CONFIG_MAPPING[kind](**small, **DROPOUTS[kind])
    written = config.to_dict()
    model = AutoModelForCausalLM.from_config(config)
    expected, _ = stock_logprobs(model.eval(), GROUPS)
    policy = policy_of(model, layout)
    stream = policy.stream(GROUPS)
    assert policy.training
    assert policy.model.training
    first, second = policy(stream).logprobs_T, policy(stream).logprobs_T
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    kept = policy.model.config.to_dict()
    assert {k: v for k, v in kept.items() if "attn_impl" not in k} == written


def test_silenced_modules_stay_silent_and_nothing_else_changes() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.resid_pdrop, self.layerdrop = torch.nn.Dropout(0.5), 0.1, 0.2
            self.scale, self.dropouts = 0.3, 4

    layer = Layer()
    silence_dropout(layer)
    assert (layer.inner.p, layer.resid_pdrop, layer.layerdrop, layer.scale, layer.dropouts) == (0.0, 0.0, 0.0, 0.3, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("kind", [*KEYS, "mistral", "gemma2", "gpt_oss"])
def test_on_cuda_the_layouts_agree(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = clone_of(kind)
    expected, _ = stock_logprobs(model, GROUPS)
    head = OTHERS.get(kind, HeadShape())
    shared, plain = (policy_of(model, layout, head) for layout in LAYOUTS)
    policies: list[Policy] = [
        q.to("cuda", dtype) for q in (policy_of(model, "shared", head, direct=True), shared, plain)
    ]
    logprobs = [policy(policy.stream(GROUPS)).logprobs_T for policy in policies]
    assert {found.dtype for found in logprobs} == {torch.float32}
    for found in logprobs[:2]:
        torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(found, logprobs[2], atol=tolerance, rtol=0)
    if dtype == torch.float32:
        for found in logprobs:
            (found * torch.linspace(-1, 2, len(found), device="cuda")).sum().backward()
        *ours, right = ({n: p.grad for n, p in q.named_parameters() if p.grad is not None} for q in policies)
        for left in ours:
            assert largest_difference(left, right) < 1e-3
