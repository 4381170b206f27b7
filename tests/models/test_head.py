"""The chunked head equals the whole one, and never holds the logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from groupwise.models import head
from groupwise.models.head import HeadShape, chunked_logprobs, dense_logprobs
from tests.tiny_models import GROUPS, policy_of

TOKENS, WIDTH, VOCABULARY = 50, 6, 33
SHAPES = [HeadShape(), HeadShape(scale=0.25), HeadShape(softcap=1.5), HeadShape(scale=3.0, softcap=2.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 1)  # chunks of 16 rows, the least


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


def chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: HeadShape, t: float) -> Any:
    return chunked_logprobs(hidden, weight, bias, target, shape=shape, temperature=t, entropy=True)


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: HeadShape, t: float) -> Any:
    logits = shape.scale * (hidden @ weight.T + (0 if bias is None else bias))
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return dense_logprobs(logits, target, t)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_is_whole_in_values_and_gradients(shape: HeadShape, with_bias: bool, temperature: float) -> None:
    results = []
    for function in (chunked, whole):
        hidden, weight, bias, target = inputs()
        logprobs, entropy = function(hidden, weight, bias if with_bias else None, target, shape, temperature)
        (logprobs * torch.linspace(-1, 2, TOKENS)).sum().backward()
        results.append([logprobs, entropy, hidden.grad, weight.grad, bias.grad if with_bias else bias])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_dense_log_probs_and_entropy_are_the_formulas() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64)
    logprobs, entropy = dense_logprobs(logits, torch.tensor([1]), temperature=0.5)
    p = torch.tensor([1.0, torch.e**2, torch.e**-2], dtype=torch.float64)
    p /= p.sum()
    assert logprobs.item() == pytest.approx(p[1].log().item(), abs=1e-12)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-12)


def test_a_tied_matrix_gets_both_its_gradients() -> None:
    results = []
    for function in (chunked, whole):
        _, weight, _, target = inputs()
        hidden = torch.tanh(weight[target.roll(1)])
        function(hidden, weight, None, target, HeadShape(), 1.0)[0].sum().backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


def test_the_entropy_has_no_gradient_and_is_left_out_unless_asked_for() -> None:
    hidden, weight, bias, target = inputs()
    _, entropy = chunked_logprobs(hidden, weight, bias, target, entropy=True)
    assert entropy is not None
    assert not entropy.requires_grad
    assert chunked_logprobs(hidden, weight, bias, target)[1] is None


def test_half_precision_gives_log_probs_in_float32_and_gradients_in_its_own() -> None:
    hidden, weight, bias, target = inputs(torch.bfloat16)
    logprobs, _ = chunked_logprobs(hidden, weight, bias, target)
    logprobs.sum().backward()
    assert (logprobs.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    exact_hidden, exact_weight, exact_bias, _ = (
        *(x.detach().double().requires_grad_() for x in (hidden, weight, bias)), target,
    )  # fmt: skip
    exact = whole(exact_hidden, exact_weight, exact_bias, target, HeadShape(), 1.0)[0]
    exact.sum().backward()
    torch.testing.assert_close(logprobs.double(), exact, atol=0.05, rtol=0)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=0.15, rtol=0.05)


def test_frozen_weights_get_no_gradient() -> None:
    hidden, weight, _, target = inputs()
    weight.requires_grad_(False)
    chunked_logprobs(hidden, weight, None, target)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(scale=0.5)], ids=str)
def test_impossible_tokens_make_neither_entropy_nor_gradient_nan(shape: HeadShape) -> None:
    hidden, weight, bias, target = inputs()
    closed = torch.arange(VOCABULARY) % 5 == 0
    bias = bias.detach().masked_fill(closed, float("-inf")).requires_grad_()
    target = torch.where(closed[target], target + 1, target)
    logprobs, entropy = chunked_logprobs(hidden, weight, bias, target, shape=shape, entropy=True)
    dense, dense_entropy = whole(hidden, weight, bias, target, shape, 1.0)
    open_ = ~closed
    left, _ = chunked_logprobs(
        hidden, weight[open_], bias[open_], open_.cumsum(0)[target] - 1, shape=shape, entropy=True
    )
    torch.testing.assert_close(logprobs, left, atol=1e-12, rtol=0)
    torch.testing.assert_close(logprobs, dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(entropy, dense_entropy, atol=1e-12, rtol=0)
    assert bool(torch.isfinite(entropy).all())
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight, bias))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert gradients[2][closed].abs().max() == 0


def test_no_tokens_are_no_error() -> None:
    hidden, weight, bias, target = inputs()
    logprobs, entropy = chunked_logprobs(hidden[:0], weight, bias, target[:0], entropy=True)
    assert (logprobs.shape, entropy.shape) == ((0,), (0,))
    logprobs.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_of_all_tokens_are_never_held() -> None:
    tokens, vocabulary = 400, 200
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    target = torch.randint(0, vocabulary, (tokens,))
    for function, most in ((chunked, 16), (whole, tokens)):
        with Largest() as seen:
            function(hidden, weight, None, target, HeadShape(), 1.0)[0].sum().backward()
        assert seen.elements == most * vocabulary


def test_a_policy_never_holds_them_either() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=1, **sizes)
    policy = policy_of(LlamaForCausalLM(config), "shared")
    stream = policy.stream(list(GROUPS) * 8)
    with Largest() as seen:
        policy(stream, entropy=True).logprobs_T.sum().backward()
    assert seen.elements == 16 * 512 < len(stream.target_T) * 512


def test_chunks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 100 * VOCABULARY)
    chunks = head._chunks(250, torch.empty(VOCABULARY, WIDTH))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(250))
    assert [chunk.stop - chunk.start for chunk in chunks] == [100, 100, 50]


def test_a_chunk_is_at_least_a_quarter_of_the_matrix() -> None:
    chunks = head._chunks(250, torch.empty(VOCABULARY, 4 * 60))
    assert [chunk.stop - chunk.start for chunk in chunks] == [60, 60, 60, 60, 10]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_slope_that_is_known_beforehand_gives_the_same_gradients(shape: HeadShape, temperature: float) -> None:
    slope = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    results = []
    for known in (None, slope):
        hidden, weight, bias, target = inputs()
        logprobs, entropy = chunked_logprobs(
            hidden, weight, bias, target, shape=shape, temperature=temperature, entropy=True, grad_logprobs_T=known
        )
        logprobs.backward(slope if known is None else torch.full_like(slope, float("nan")))  # not looked at
        results.append([logprobs, entropy, hidden.grad, weight.grad, bias.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_known_slope_costs_three_products_in_place_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    logits = head._logits
    monkeypatch.setattr(head, "_logits", lambda *inputs: made.append(1) or logits(*inputs))
    for slope, products in ((None, 8), (torch.ones(TOKENS, dtype=torch.float64), 4)):
        made.clear()
        hidden, weight, _, target = inputs()
        logprobs, _ = chunked_logprobs(hidden, weight, None, target, grad_logprobs_T=slope)
        logprobs.sum().backward()
        assert len(made) == products  # four chunks of 16 rows


def test_without_a_gradient_a_slope_costs_nothing() -> None:
    hidden, weight, _, target = inputs()
    with torch.no_grad():
        logprobs, _ = chunked_logprobs(
            hidden, weight, None, target, grad_logprobs_T=torch.ones(TOKENS, dtype=torch.float64)
        )
    assert not logprobs.requires_grad
