"""What C cannot read is computed by torch, and never crashes the process: each wrapper, each kind of tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from groupwise.cpu import kernels, kernels_torch, packed
from groupwise.cpu.kernels import Kernels, KeyRange, KeyRanges, compiled, is_plain
from groupwise.cpu.packed import PackedLinear
from tests.engines.policies import make_policy, requests, sample
from tests.tiny_models import GROUPS

needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, kernels._COMPILERS)), reason="no C compiler")


class Sharded(Tensor):
    """A tensor whose numbers are somewhere else, as those of a DTensor are: it has a shape, and no memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Sharded:
        made: Sharded = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Sharded, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Sharded, func(*args, **kwargs))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 1e9)], -1)[..., 0]


def negated_view(x: Tensor) -> Tensor:
    """The same numbers, of which the memory has the negatives."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


FAKE = FakeTensorMode(allow_non_fake_inputs=True)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sharded": lambda x: Sharded(x.clone()),
    "gaps": with_gaps,
    "double": Tensor.double,
    "negated": negated_view,
    "meta": lambda x: x.to("meta"),
    "fake": FAKE.from_tensor,
}


def attend(made: Kernels, *tensors: Tensor, end: Tensor | None = None) -> tuple[Tensor, ...]:
    query, key, value, keys, values = tensors
    end = torch.tensor([7, 2, 5], device=key.device) if end is None else end
    return made.attend(query, key, value, 0.3, KeyRanges([KeyRange(None, None, end)]), [(keys, values)]), keys, values


Call = Callable[..., tuple[Tensor, ...]]
CALLS: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "norm": (lambda made, x, w, factor: (made.norm(x, w, 1e-6, factor), factor), [(3, 2, 32), (32,), (3, 2, 1)]),
    "norm_back": (lambda made, *given: made.norm_back(*given), [(3, 32), (32,), (3, 1), (3, 32)]),
    "swiglu": (lambda made, *given: (made.swiglu(*given),), [(3, 32), (3, 32)]),
    "swiglu_back": (lambda made, *given: made.swiglu_back(*given), [(3, 32)] * 3),
    "rotary": (lambda made, *given: (made.rotary(*given), given[-1]), [(3, 2, 32), (3, 1, 32), (3, 1, 32), (3, 2, 32)]),
    "softmax_numerator": (
        lambda made, *given: (*made.softmax_numerator_(*given), given[0]),
        [(2, 3, 4, 11), (2, 1, 4, 11)],
    ),
    "softmax_numerator_back": (
        lambda made, *given: (made.softmax_numerator_back_(*given), given[0], given[2])[1:],
        [(2, 3, 4, 11), (2, 1, 4, 11), (2, 3, 4, 11), (2, 3, 4), (2, 3, 4)],
    ),
    "attend": (attend, [(3, 4, 16), (3, 2, 16), (3, 2, 16), (3, 2, 7, 16), (3, 2, 7, 16)]),
}


def given_to(name: str) -> list[Tensor]:
    return [noise(*shape, seed=seed) for seed, shape in enumerate(CALLS[name][1])]


def made() -> Kernels:
    found = compiled()
    assert found is not None, "there is a compiler"
    return found


@needs_a_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_what_c_cannot_read_is_computed_all_the_same(name: str, kind: str) -> None:
    call, _ = CALLS[name]
    given = [KINDS[kind](x) for x in given_to(name)]
    with torch.no_grad():
        expected, found = call(made(), *given_to(name)), call(made(), *given)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        if kind in ("meta", "fake"):
            assert ours.device == given[0].device
            continue
        ours = ours.inner if isinstance(ours, Sharded) else ours
        torch.testing.assert_close(ours.float().resolve_neg(), theirs, atol=2e-5, rtol=2e-5)


@needs_a_compiler
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("name", CALLS)
def test_one_such_tensor_among_others_is_enough(name: str, place: int) -> None:
    call, _ = CALLS[name]
    if place >= len(given := given_to(name)):
        return
    given[place] = with_gaps(given[place])
    with torch.no_grad():
        expected, found = call(made(), *given_to(name)), call(made(), *given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@needs_a_compiler
@pytest.mark.parametrize("name", CALLS)
def test_torch_says_what_the_kernels_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, _ = CALLS[name]
    with torch.no_grad():
        expected = call(made(), *given_to(name))
        monkeypatch.setattr(kernels, "_readable", lambda *tensors: False)
        found = call(made(), *given_to(name))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@needs_a_compiler
def test_shapes_that_do_not_go_together_are_errors_and_no_crashes() -> None:
    x = noise(3, 32)
    with torch.no_grad():
        for call in (
            lambda: made().swiglu(x, x[:2]), lambda: made().norm(x, x[0, :16], 1e-6),
            lambda: made().rotary(noise(3, 2, 32), x, x, torch.empty(2, 2, 32)),
            lambda: made().softmax_numerator_(noise(2, 3, 4, 11), noise(2, 1, 4, 10)),
        ):  # fmt: skip
            with pytest.raises(RuntimeError):
                call()


@needs_a_compiler
def test_lengths_of_another_type_are_read_as_what_they_are() -> None:
    given = given_to("attend")
    with torch.no_grad():
        expected = attend(made(), *given_to("attend"))
        for end in (torch.tensor([7, 2, 5], dtype=torch.int32), torch.tensor([7, 0, 2, 0, 5, 0])[::2]):
            for ours, theirs in zip(attend(made(), *given, end=end), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_plain_is_what_has_its_numbers_where_it_says() -> None:
    x = noise(2, 32)
    assert is_plain(x, None, nn.Parameter(x, requires_grad=False), with_gaps(x))
    assert not is_plain(nn.Parameter(x)), "its gradient would be lost"
    with torch.no_grad():
        assert is_plain(nn.Parameter(x))
    for other in (Sharded(x), nn.Parameter(Sharded(x)), x.to("meta"), x.to_sparse(), negated_view(x)):
        assert not is_plain(x, other.detach())
    told: list[bool] = []
    torch.vmap(lambda row: told.append(is_plain(row)) or row)(x)
    assert told == [False]


@needs_a_compiler
def test_sampling_and_training_compute_nothing_twice_as_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine and the learner hand to the kernels is what they can read."""

    def refuse(*given: Any) -> None:
        raise AssertionError("this was for a kernel")

    for name in (
        "norm",
        "norm_back",
        "swiglu",
        "swiglu_back",
        "rotary",
        "softmax_numerator_",
        "softmax_numerator_back_",
        "attend",
    ):
        monkeypatch.setattr(kernels_torch, name, refuse)
    policy = make_policy("qwen3", direct=True)
    assert policy.direct is not None
    sample(policy, requests(n=3, max_tokens=20))
    policy(policy.stream(GROUPS)).logprobs_T.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_such_matrices_are_left_to_torch(kind: str) -> None:
    products, weight, x = PackedLinear(), noise(512, 513), noise(3, 513, seed=1)
    with torch.no_grad():
        found = products(KINDS[kind](x), (KINDS[kind](weight), None))
        found = found.inner if isinstance(found, Sharded) else found
        if kind in ("meta", "fake"):
            assert found.shape == (3, 512)
        else:
            torch.testing.assert_close(found.float(), x @ weight.T, atol=1e-3, rtol=1e-4)
    assert len(products) == int(kind == "gaps" and packed._kernel_agrees(torch.float32)), "strides are no hindrance"


def test_products_of_unlike_types_fail_as_torch_does() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        PackedLinear()(noise(3, 513), (noise(512, 513).double(), None))
