"""Products over laid-out copies: plain products in every way but time, of the weights as they are now."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from groupwise.cpu import packed
from groupwise.cpu.packed import PackedLinear, bytes_of_copies
from tests.engines.policies import difference, make_policy, requests, sample, tokens

needs_the_kernel = pytest.mark.skipif(
    not packed._kernel_agrees(torch.float32), reason="this build of torch has no such kernel"
)


def matrix(rows: int = 512, columns: int = 513, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def inputs(rows: int, weight: Tensor) -> Tensor:
    return torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def every_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of small ones too: tiny models have no others."""
    monkeypatch.setattr(packed, "_SMALLEST", 1)


@needs_the_kernel
@pytest.mark.parametrize("rows", [1, 3, 64, 65, 200])
def test_a_product_is_the_plain_one(rows: int) -> None:
    weight, bias, products = matrix(), torch.linspace(-1, 1, 512), PackedLinear()
    x = inputs(rows, weight)
    with torch.inference_mode():
        for b in (None, bias):
            expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            torch.testing.assert_close(products(x, (weight, b)).double(), expected, atol=1e-4, rtol=1e-5)
    assert len(products) == 1


@needs_the_kernel
@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)])
def test_parts_are_laid_out_as_one(biases: tuple[bool, bool]) -> None:
    parts = [(matrix(512, 513, n), torch.full((512,), float(n + 1)) if biases[n] else None) for n in range(2)]
    products = PackedLinear()
    with torch.no_grad():
        x = inputs(5, parts[0][0])
        for _ in range(2):
            expected = torch.cat([nn.functional.linear(x, weight, bias) for weight, bias in parts], -1)
            torch.testing.assert_close(products(x, *parts), expected, atol=1e-4, rtol=1e-5)
            changed = parts[1][1] if biases[1] else parts[1][0]
            assert changed is not None
            changed.add_(1)  # whatever of them changes
    assert len(products) == 1


@needs_the_kernel
def test_a_matrix_that_changes_is_laid_out_again() -> None:
    weight, products = matrix(), PackedLinear()
    x = inputs(5, weight)
    with torch.no_grad():
        before = products(x, (weight, None))
        weight.mul_(-2)
        torch.testing.assert_close(products(x, (weight, None)), -2 * before)
        weight.copy_(matrix(seed=1))
        torch.testing.assert_close(products(x, (weight, None)), nn.functional.linear(x, weight), atol=1e-4, rtol=1e-5)
    assert len(products) == 1


@needs_the_kernel
def test_a_copied_policy_uses_its_own_weights() -> None:
    ours = PackedLinear(), matrix()
    x = inputs(5, ours[1])
    with torch.no_grad():
        before = ours[0](x, (ours[1], None))
        theirs = copy.deepcopy(ours)
        theirs[1].zero_()
        assert not theirs[0](x, (theirs[1], None)).any()
        torch.testing.assert_close(ours[0](x, (ours[1], None)), before, atol=0, rtol=0)


def test_small_matrices_and_gradients_are_left_to_torch() -> None:
    products, small = PackedLinear(), matrix(8, 16)
    with torch.no_grad():
        products(inputs(2, small), (small, None))
    large = matrix()
    products(inputs(2, large), (large, None)).sum().backward()
    assert large.grad is not None
    assert len(products) == 0
    assert bytes_of_copies([[(small, None)]], torch.float32) == 0


def test_a_build_without_the_kernel_computes_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> Tensor:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(packed, "_product", missing)
    packed._kernel_agrees.cache_clear()
    try:
        weight, products = matrix(), PackedLinear()
        with torch.no_grad():
            x = inputs(3, weight)
            torch.testing.assert_close(products(x, (weight, None)), nn.functional.linear(x, weight), atol=0, rtol=0)
        assert len(products) == 0
        assert bytes_of_copies([[(weight, None)]], torch.float32) == 0
    finally:
        packed._kernel_agrees.cache_clear()


def test_a_kernel_that_says_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_product", lambda x, laid_out, bias: 1.001 * nn.functional.linear(x, laid_out, bias))
    monkeypatch.setattr(packed, "_lay_out", lambda weight: weight)
    packed._kernel_agrees.cache_clear()
    try:
        assert not packed._kernel_agrees(torch.float32)
    finally:
        packed._kernel_agrees.cache_clear()


def test_what_copies_take_is_told(every_matrix: None) -> None:
    policy = make_policy("llama", direct=True)
    assert policy.direct is not None
    matrices = [weight for parts in policy.direct.products() for weight, _ in parts]
    large = {id(p): p.numel() for p in [*matrices, policy.head_parameters()[0]]}
    expected = 4 * sum(large.values()) if packed._kernel_agrees(torch.float32) else 0
    assert policy.bytes_of_copies(torch.float32) == expected
    assert policy.bytes_of_copies(torch.float64) == 0, "the kernel does not know it"


def test_small_ones_that_are_multiplied_together_lie_side_by_side() -> None:
    products = PackedLinear()
    parts = [(matrix(8, 16), None), (matrix(4, 16), torch.ones(4))]
    x = inputs(3, parts[0][0])
    with torch.no_grad():
        found = products(x, *parts)
        torch.testing.assert_close(found, torch.cat([x @ parts[0][0].T, x @ parts[1][0].T + 1], -1))
        assert len(products) == 1
        parts[1][0].zero_()
        assert (products(x, *parts)[:, 8:] == 1).all(), "what has changed is copied again"
    assert bytes_of_copies([parts], torch.float32) == 4 * 12 * 16


@needs_the_kernel
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
def test_sampling_over_copies_draws_what_it_draws_without(
    kind: str, every_matrix: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, asked, made = make_policy(kind, direct=True), requests(n=3, max_tokens=20), list[int]()
    release = PackedLinear.release

    def counted(self: PackedLinear) -> None:
        made.append(len(self))
        release(self)

    monkeypatch.setattr(PackedLinear, "release", counted)
    found = sample(policy, asked)
    assert made[-1] == (1 + 4 * 2 if policy.direct is not None else 1)
    assert len(policy.packed) == 0, "the copies are given back"
    assert difference(policy, asked, found) < 1e-5
    monkeypatch.setattr(packed, "_SMALLEST", 1 << 40)
    assert tokens(sample(policy, asked)) == tokens(found)
