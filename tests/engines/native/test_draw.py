"""Uniforms, filters and the inverse of the cumulative distribution, against Python and NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupwise.engines.native.draw import Filters, draw, inverse_cdf, uniforms
from groupwise.types import Sampling

CPU = torch.device("cpu")
MASK = 2**64 - 1


def uniform(seed: int, index: int) -> float:
    """SplitMix64, twice, in Python's own integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    bits = mix((mix((seed + golden) & MASK) + (index + 1) * golden) & MASK)
    return ((bits >> 12) + 0.5) / 2**52


def drawn(seeds: list[int], indexes: list[int]) -> list[float]:
    return uniforms(torch.tensor(seeds), torch.tensor(indexes)).tolist()


# --- uniforms ---------------------------------------------------------------------------------------------------------


def test_the_uniforms_are_these_numbers_for_ever() -> None:
    # A change here changes every run that was ever made: runs would not resume, results would not repeat.
    assert drawn([0, 0, 1, 2**62], [0, 1, 0, 500]) == [
        0.6524484863740322, 0.7012121095215252, 0.3681895156516696, 0.08584888273112024,
    ]  # fmt: skip


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_uniforms_are_a_pure_function(seed: int, index: int) -> None:
    (value,) = drawn([seed], [index])
    assert value == uniform(seed, index)
    assert 0 < value < 1


def test_the_ends_of_the_interval_are_never_drawn() -> None:
    most = ((MASK >> 12) + 0.5) / 2**52
    assert 0 < 0.5 / 2**52 < most < 1


def test_uniforms_are_uniform_along_seeds_along_tokens_and_in_pairs() -> None:
    count = 20_000
    along_seeds = uniforms(torch.arange(count), torch.zeros(count, dtype=torch.long))
    along_tokens = uniforms(torch.full((count,), 12345), torch.arange(count))
    for values in (along_seeds, along_tokens):
        expected = (torch.arange(count) + 0.5) / count
        assert (values.sort().values - expected).abs().max() < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov, 1 %
        centred = values - 0.5
        assert abs((centred[1:] * centred[:-1]).mean().item() * 12) < 3 / math.sqrt(count)
    assert abs((along_seeds - 0.5).dot(along_tokens - 0.5).item() * 12 / count) < 3 / math.sqrt(count)


# --- the inverse of the cumulative distribution -----------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 2, 20, 511, 512, 513, 3000])
@pytest.mark.parametrize("sharpness", [0.5, 8.0])
def test_a_token_is_the_one_whose_interval_holds_the_uniform(vocabulary: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    probs = torch.softmax(sharpness * torch.randn(300, vocabulary, generator=generator), -1)
    u = torch.rand(300, generator=generator, dtype=torch.float64)
    token_R, total_R = inverse_cdf(probs * 3, u)
    found = token_R.numpy()
    assert total_R.numpy() == pytest.approx(3.0, abs=1e-5)
    edges = probs.double().cumsum(-1).numpy()
    goal = u.numpy() * edges[:, -1]
    expected = (edges <= goal[:, None]).sum(-1)
    near_an_edge = np.abs(edges - goal[:, None]).min(-1) < 1e-6
    assert near_an_edge.mean() < 0.05
    assert (found == expected)[~near_an_edge].all()
    assert (np.abs(found - expected) <= 1).all()


@pytest.mark.parametrize("u", [5e-324, 2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-53, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(u: float) -> None:
    vocabulary = 2000
    rows = []
    for support in ([0], [1999], [511], [512], [700, 701], [3, 1500], [513, 1023, 1024]):
        row = torch.zeros(vocabulary)
        row[support] = torch.rand(len(support), generator=torch.Generator().manual_seed(1)) + 1e-30
        rows += [row, row * 1e-30, row / row.sum()]
    probs = torch.stack(rows)
    tokens, _ = inverse_cdf(probs, torch.full((len(rows),), u, dtype=torch.float64))
    assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_the_first_token_of_a_block_is_not_drawn_for_a_rounding_error() -> None:
    # The sum of the blocks before, taken back out of a sum with a much larger block, is a little more than it was.
    small = 1e-12 * (1 + torch.rand(200, generator=torch.Generator().manual_seed(0)))
    probs = torch.zeros(200, 1024)
    probs[:, 0], probs[:, 513] = small, 1.0
    assert ((small.double() + 1.0) - 1.0 > small.double()).any()
    u = small.double() / (small.double() + 1.0)
    tokens, _ = inverse_cdf(probs, u)
    assert (probs.gather(1, tokens[:, None]) > 0).all()


@given(st.lists(st.sampled_from([0.0, 1e-38, 1e-7, 0.1, 0.3]), min_size=1, max_size=40), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_whatever_the_rounding_a_possible_token_is_drawn(values: list[float], u: float) -> None:
    probs = torch.tensor([[*values, 1e-3, 0.0]]).repeat_interleave(60, 1)
    token, _ = inverse_cdf(probs, torch.tensor([u], dtype=torch.float64))
    assert probs[0, token] > 0


def test_frequencies_are_the_probabilities() -> None:
    count, probs = 40_000, torch.softmax(torch.linspace(-3, 2, 20), -1)
    filters = Filters.of([Sampling()] * count, CPU)
    u = uniforms(torch.arange(count), torch.zeros(count, dtype=torch.long))
    tokens, logprobs = draw(probs.log().repeat(count, 1), u, filters)
    observed = torch.bincount(tokens, minlength=20)
    chi_square = ((observed - count * probs) ** 2 / (count * probs)).sum().item()
    assert chi_square < 36.2  # 19 degrees of freedom, 1 %
    torch.testing.assert_close(logprobs, probs.log()[tokens], atol=1e-5, rtol=0)


# --- filters ----------------------------------------------------------------------------------------------------------


def support(logits: list[float], sampling: Sampling) -> set[int]:
    """Which tokens remain: top k, then the smallest set that holds top p of that, then min p of the likeliest."""
    probs = np.exp(np.array(logits) / sampling.temperature)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[: sampling.top_k or None]
    total, mass, nucleus = sum(probs[i] for i in kept), 0.0, []
    for i in kept:
        if mass < sampling.top_p or sampling.top_p == 1:
            nucleus.append(i)
        mass += probs[i] / total
    return {i for i in nucleus if probs[i] >= sampling.min_p * probs[order[0]]}


def drawable(logits: list[float], settings_: Sampling) -> tuple[set[int], dict[int, float]]:
    """The tokens that come up over a fine grid of uniforms, and their log-probs."""
    count = 4001
    filters = Filters.of([settings_] * count, CPU)
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logprobs = draw(torch.tensor(logits).repeat(count, 1), grid, filters)
    return set(tokens.tolist()), dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3}, {"top_k": 1}, {"top_k": 100}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.01}, {"min_p": 0.2},
        {"min_p": 1.0}, {"top_k": 4, "top_p": 0.6}, {"top_p": 0.8, "min_p": 0.3, "temperature": 0.5},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 1.7},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_filters_keep_what_they_should(options: dict[str, Any], seed: int) -> None:
    logits = (1.5 * torch.randn(12, generator=torch.Generator().manual_seed(seed))).tolist()
    sampling = Sampling(**options)
    expected = support(logits, sampling)
    found, logprobs = drawable(logits, sampling)
    assert found == expected
    total = sum(math.exp(logits[i] / sampling.temperature) for i in expected)
    for token, logprob in logprobs.items():
        assert logprob == pytest.approx(logits[token] / sampling.temperature - math.log(total), abs=1e-5)


def test_of_equal_tokens_the_first_are_kept() -> None:
    assert drawable([1.0, 1.0, 1.0, 1.0, 0.0], Sampling(top_k=2))[0] == {0, 1}


def test_top_p_of_one_keeps_a_tail_that_rounding_would_cut_off() -> None:
    logits = torch.tensor([[0.0] + [-17.7] * 1500])  # each 2e-8, less than half of what float32 can add to 1
    both = Filters.of([Sampling(), Sampling(top_p=0.5)], CPU)
    u = torch.tensor([1 - 5e-6, 0.3], dtype=torch.float64)
    alone, _ = draw(logits.clone(), u[:1], Filters.of([Sampling()], CPU))
    beside, _ = draw(logits.repeat(2, 1), u, both)
    assert both.cut
    assert alone.item() > 1000
    assert beside.tolist() == [alone.item(), 0]


def rows_of(*settings_: Sampling) -> tuple[Tensor, Tensor]:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)).repeat(len(settings_), 1)
    filters = Filters.of(settings_, CPU)
    return draw(logits, torch.full((len(settings_),), 0.37, dtype=torch.float64), filters)


def test_rows_with_other_settings_do_not_touch_each_other() -> None:
    kinds = (
        Sampling(temperature=0.0), Sampling(temperature=0.3), Sampling(), Sampling(top_k=2), Sampling(top_p=0.4),
        Sampling(min_p=0.3, temperature=2.0),
    )  # fmt: skip
    together, logprobs = rows_of(*kinds)
    for row, kind in enumerate(kinds):
        token, logprob = rows_of(kind)
        assert token[0] == together[row]
        assert logprob[0] == pytest.approx(logprobs[row].item(), abs=1e-6)


def test_greedy_takes_the_likeliest_and_says_its_log_prob_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    filters = Filters.of([Sampling(temperature=0.0)], CPU)
    token, logprob = draw(logits.clone(), torch.tensor([0.999], dtype=torch.float64), filters)
    assert token.item() == 1
    assert logprob.item() == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item(), abs=1e-6)


def test_impossible_tokens_stay_impossible() -> None:
    logits = torch.full((200, 6), float("-inf"))
    logits[:, 4], logits[:, 2] = 1.0, 0.0
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    for sampling in (Sampling(), Sampling(top_p=0.99), Sampling(top_k=3)):
        filters = Filters.of([sampling] * 200, CPU)
        tokens, logprobs = draw(logits.clone(), u, filters)
        assert set(tokens.tolist()) == {2, 4}
        assert torch.isfinite(logprobs).all()
