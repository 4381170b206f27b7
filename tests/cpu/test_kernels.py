"""The compiled functions of decoding: they say what the formulas say, and who does the work where they cannot."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from groupwise.cpu import kernels
from groupwise.cpu.kernels import Kernels, KeyRange, KeyRanges, compiled, kernels_for
from tests.engines.policies import difference, make_policy, requests, sample, tokens

needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, kernels._COMPILERS)), reason="no C compiler")


@pytest.fixture
def made() -> Kernels:
    found = compiled()
    assert found is not None, "there is a compiler"
    return found


@pytest.fixture
def not_yet_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("GROUPWISE_CACHE", str(tmp_path))
    compiled.cache_clear()
    yield tmp_path / "kernels"
    compiled.cache_clear()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_a_compiler
@pytest.mark.parametrize("width", [16, 48, 128, 896])
def test_norm(made: Kernels, width: int) -> None:
    x, weight = 5 * noise(7, width), noise(width)
    torch.testing.assert_close(made.norm(x, weight, 1e-5), nn.functional.rms_norm(x, (width,), weight, 1e-5))
    rows = noise(7, 5, width)[:, 1:4]  # heads of a larger product
    torch.testing.assert_close(made.norm(rows, weight, 1e-5), nn.functional.rms_norm(rows, (width,), weight, 1e-5))


@needs_a_compiler
def test_gate(made: Kernels) -> None:
    gate, up = (30 * noise(9, 96)).chunk(2, -1)
    torch.testing.assert_close(made.swiglu(gate, up), nn.functional.silu(gate) * up)
    far = torch.tensor([[-1e4, -200.0, -88.0, -87.0, 0.0, 87.0, 88.0, 1e4] * 2])
    torch.testing.assert_close(made.swiglu(far, torch.ones_like(far)), nn.functional.silu(far), atol=1e-30, rtol=1e-5)


@needs_a_compiler
@pytest.mark.parametrize("width", [16, 32, 80])
def test_turn(made: Kernels, width: int) -> None:
    whole, cos, sin = noise(5, 6, width), noise(5, 1, width, seed=1), noise(5, 1, width, seed=2)
    before = whole.clone()
    expected = (before * cos + before.roll(width // 2, -1) * sin)[:, :4]
    torch.testing.assert_close(made.rotary(whole[:, :4], cos, sin, out=torch.empty(5, 4, width)), expected)
    assert torch.equal(whole, before)
    made.rotary(whole[:, :4], cos, sin, out=whole[:, :4])
    torch.testing.assert_close(whole[:, :4], expected)
    assert torch.equal(whole[:, 4:], before[:, 4:])


def gradients(found: Tensor, inputs: tuple[Tensor, ...], back: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found, inputs, back)


@needs_a_compiler
@pytest.mark.parametrize("rows, width", [(1, 16), (200, 48)])
def test_gradients_of_norm(made: Kernels, rows: int, width: int) -> None:
    x, weight, back = 3 * noise(rows, 2, width), noise(width, seed=1), noise(rows, 2, width, seed=2)
    factor = torch.empty(rows, 2, 1)
    made.norm(x, weight, 1e-5, factor)
    torch.testing.assert_close(factor, (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    found = made.norm_back(x, weight, factor, back)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    torch.testing.assert_close(found, gradients(nn.functional.rms_norm(x, (width,), weight, 1e-5), inputs, back))


@needs_a_compiler
def test_gradients_of_gate(made: Kernels) -> None:
    gate, up, back = 10 * noise(5, 48), noise(5, 48, seed=1), noise(5, 48, seed=2)
    gate[0, :4] = torch.tensor([-200.0, -88.0, 88.0, 1e4])
    inputs = (gate.requires_grad_(), up.requires_grad_())
    expected = gradients(nn.functional.silu(gate) * up, inputs, back)
    torch.testing.assert_close(made.swiglu_back(gate.detach(), up.detach(), back), expected, atol=1e-6, rtol=2e-5)


BIASES = {"none": None, "one": (1, 1), "per row": (3, 1), "per query": (1, 5), "each": (3, 5)}


@needs_a_compiler
@pytest.mark.parametrize("keys", [1, 7, 8, 21])
@pytest.mark.parametrize("kind", BIASES)
def test_weights_of_a_tile_and_gradients_of_its_scores(made: Kernels, keys: int, kind: str) -> None:
    """Three rows, two heads, five queries; some keys are hidden, to one query all of them."""
    scores, back, shape = 5 * noise(3, 2, 5, keys), noise(3, 2, 5, keys, seed=1), BIASES[kind]
    bias = None
    if shape is not None:
        bias = torch.zeros(shape[0], 1, shape[1], keys).masked_fill_(noise(*shape, keys)[:, None] > 0.5, -math.inf)
        bias[0, 0, 0] = -math.inf
    whole = scores if bias is None else scores + bias
    weights = scores.clone()
    top, total = made.softmax_numerator_(weights, bias)
    torch.testing.assert_close(top, whole.amax(-1).clamp_min(-1e30))
    torch.testing.assert_close(weights, (whole - top[..., None]).exp(), atol=1e-30, rtol=1e-5)
    torch.testing.assert_close(total, weights.sum(-1))
    lse, delta = top + total.log().clamp_min(-1e30), noise(3, 2, 5, seed=2)
    lse[1, 1, 2] = math.inf  # a query that only fills up
    again, change = scores.clone(), back.clone()
    made.softmax_numerator_back_(again, bias, change, lse, delta)
    expected = (whole - lse[..., None]).exp()
    torch.testing.assert_close(again, expected, atol=1e-30, rtol=1e-5)
    torch.testing.assert_close(change, (back - delta[..., None]) * expected, atol=1e-6, rtol=1e-5)


SEEN = {
    "one token": [1] * 6,
    "less than eight": [3, 7, 1, 5, 2, 6],
    "around a block": [127, 128, 129, 121, 136, 130],
    "several blocks": [300, 256, 257, 1, 299, 128],
}


def by_hand(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """`[H, d]` queries over `[H_kv, L, d]` keys and values."""
    shared = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(shared, 0) for x in (keys, values))
    weights = (torch.einsum("hd,hkd->hk", query.double(), keys) * scale).softmax(-1)
    return torch.einsum("hk,hkd->hd", weights, values).float()


@needs_a_compiler
@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("width, heads, kv_heads", [(16, 2, 2), (32, 6, 2), (64, 4, 1), (80, 3, 1), (128, 2, 1)])
@pytest.mark.parametrize("window", [None, 9])
def test_attend(
    made: Kernels, seen: list[int], width: int, heads: int, kv_heads: int, window: int | None
) -> None:  # fmt: skip
    """Six rows of two prompts of 140 and 9 tokens, some of which see less of it, and a store of their own."""
    slots, cuts, own = [0, 0, 0, 1, 1, 0], [140, 140, 3, 9, 9, 140], 310
    query, key, value = noise(6, heads, width), noise(6, kv_heads, width, seed=1), noise(6, kv_heads, width, seed=2)
    prompts, outputs = noise(2, 2, kv_heads, 150, width, seed=3), noise(2, 6, kv_heads, own, width, seed=4)
    ends = [torch.tensor(cuts), torch.tensor(seen)]
    firsts: list[Tensor | None] = [None, None]
    if window is not None:
        firsts = [(ends[0] + ends[1] - window).clamp_min(0), (ends[1] - window).clamp_min(0)]
    looks = [KeyRange(torch.tensor(slots), firsts[0], ends[0]), KeyRange(None, firsts[1], ends[1])]

    found = made.attend(
        query, key, value, 0.4, KeyRanges(looks), [(prompts[0], prompts[1]), (outputs[0], outputs[1])]
    )  # fmt: skip

    for row, (slot, cut, length) in enumerate(zip(slots, cuts, seen, strict=True)):
        assert torch.equal(outputs[0][row, :, length - 1], key[row])
        assert torch.equal(outputs[1][row, :, length - 1], value[row])
        keys, values = (torch.cat([prompts[i][slot, :, :cut], outputs[i][row, :, :length]], 1) for i in (0, 1))
        first = 0 if window is None else max(0, keys.shape[1] - window)
        expected = by_hand(query[row], keys[:, first:], values[:, first:], 0.4)
        torch.testing.assert_close(found[row], expected, atol=3e-6, rtol=1e-5)


@needs_a_compiler
def test_a_row_s_result_is_the_same_to_the_bit_beside_any_others(made: Kernels) -> None:
    query, key, value = noise(4, 4, 32), noise(4, 2, 32, seed=1), noise(4, 2, 32, seed=2)
    prompts, outputs = noise(2, 2, 2, 200, 32, seed=3), noise(2, 4, 2, 200, 32, seed=4)
    slot, seen, end = torch.tensor([0, 1, 1, 1]), torch.tensor([200, 130, 200, 7]), torch.tensor([5, 150, 9, 1])

    def attend(rows: slice) -> Tensor:
        looks = KeyRanges([KeyRange(slot[rows], None, seen[rows]), KeyRange(None, None, end[rows])])
        stores = [(prompts[0], prompts[1]), (outputs[0][rows], outputs[1][rows])]
        return made.attend(query[rows], key[rows], value[rows], 1.0, looks, stores)

    together = attend(slice(0, 4))
    for row in range(4):
        assert torch.equal(attend(slice(row, row + 1))[0], together[row])


@needs_a_compiler
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_what_is_not_finite_comes_out_as_that(made: Kernels, fault: float) -> None:
    x, up, weight = noise(2, 32), noise(2, 32, seed=1), noise(32, seed=2)
    x[1, 3] = fault
    assert not made.norm(x, weight, 1e-6)[1].isfinite().all()
    assert made.norm(x, weight, 1e-6)[0].isfinite().all()
    assert not made.swiglu(x, up)[1].isfinite().all()
    stores = noise(2, 2, 1, 4, 32, seed=3)
    looks = KeyRanges([KeyRange(None, None, torch.tensor([3, 3]))])
    found = made.attend(x[:, None], up[:, None], up[:, None], 1.0, looks, [(stores[0], stores[1])])
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()


@needs_a_compiler
def test_large_scores_do_not_overflow(made: Kernels) -> None:
    query, stores = 100 * noise(1, 1, 16), 100 * noise(2, 1, 1, 50, 16, seed=1)
    looks, key, value = KeyRanges([KeyRange(None, None, torch.tensor([50]))]), stores[0][:, :, 49], stores[1][:, :, 49]
    found = made.attend(query, key, value, 1.0, looks, [(stores[0], stores[1])])
    torch.testing.assert_close(found[0], by_hand(query[0], stores[0][0], stores[1][0], 1.0), rtol=1e-4, atol=1e-3)


@needs_a_compiler
def test_who_computes() -> None:
    x = noise(2, 32)
    with torch.no_grad():
        assert kernels_for(1, x, nn.Parameter(x)) is compiled() is not None
        assert kernels_for(1, x, x.double()) is None
        assert kernels_for(1, x.bfloat16()) is None
        assert kernels_for(1, noise(2, 24)) is None, "widths are multiples of 16"
        assert kernels_for(1, x.to("meta")) is None


@needs_a_compiler
@pytest.mark.parametrize("count, expected", [(1, True), (2, False)])
def test_much_work_is_for_all_threads(count: int, expected: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.no_grad():
            assert (kernels_for(1e9, noise(2, 32)) is not None) == expected
            assert kernels_for(1e3, noise(2, 32)) is not None
    finally:
        torch.set_num_threads(before)


@needs_a_compiler
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("max_live", [4, 64])
def test_sampling_draws_what_it_draws_without(kind: str, max_live: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts and groups, refill, windows, and what kernels leave to torch."""
    policy, asked = make_policy(kind, direct=True), requests(n=3, max_tokens=20)
    calls = []
    attend = Kernels.attend
    monkeypatch.setattr(Kernels, "attend", lambda *arguments: calls.append(1) or attend(*arguments))
    found = sample(policy, asked, max_live=max_live)
    assert bool(calls) == (kind not in ("gemma2", "gpt_oss")), "soft caps and sinks are torch's"
    assert difference(policy, asked, found) < 1e-5
    monkeypatch.setattr("groupwise.cpu.kernels.compiled", lambda: None)
    assert tokens(sample(policy, asked, max_live=max_live)) == tokens(found)


@needs_a_compiler
def test_they_are_compiled_once_per_processor_and_compiler(
    not_yet_compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    assert compiled() is not None
    assert len(list(not_yet_compiled.iterdir())) == 1
    compiled.cache_clear()
    real, commands = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **k: commands.append(command) or real(command, **k))
    assert compiled() is not None
    assert [command[1:] for command in commands] == [["--version"]], "what is there is taken"
    compiled.cache_clear()
    monkeypatch.setattr(kernels, "processor", lambda: "another one, with the same home folder")
    assert compiled() is not None
    assert len(list(not_yet_compiled.iterdir())) == 2


@needs_a_compiler
def test_a_damaged_library_in_the_cache_is_made_again(not_yet_compiled: Path) -> None:
    compiler = os.environ.get("CC") or next(filter(shutil.which, kernels._COMPILERS))
    file = kernels._library(compiler, kernels._TUNINGS[0])
    file.write_bytes(b"\x7fELF, and no more")
    assert compiled() is not None
    assert file.stat().st_size > 1000


def test_without_a_compiler_torch_computes(not_yet_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels, "_COMPILERS", ("no-such-compiler",))
    assert compiled() is None
    with torch.no_grad():
        assert kernels_for(1, noise(2, 32)) is None
    policy, asked = make_policy("llama", direct=True), requests(n=2, max_tokens=5)
    assert difference(policy, asked, sample(policy, asked)) < 1e-5


@pytest.mark.parametrize(
    "compiler, said", [("false", "false did not"), ("no-such-compiler -x", "No such file"), ("true", "true did not")]
)
def test_a_compiler_that_fails_is_named(
    not_yet_compiled: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, said: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(RuntimeWarning, match=said):
        assert compiled() is None


@needs_a_compiler
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GROUPWISE_CACHE", str(tmp_path / "file"))
    compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Not a directory"):
            assert compiled() is None
    finally:
        compiled.cache_clear()


@needs_a_compiler
def test_what_computes_something_else_is_not_used(not_yet_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = not_yet_compiled.parent / "wrong.c"
    wrong.write_text(kernels._SOURCE.read_text().replace("sum(squares) / (float)width", "sum(squares)"))
    monkeypatch.setattr(kernels, "_SOURCE", wrong)
    with pytest.warns(RuntimeWarning, match="something else"):
        assert compiled() is None
