"""What the guard makes of differences, worked out by hand, and that it stands before the optimizer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from groupwise.errors import ModelError
from groupwise.learn.agreement import FEW, Difference, Guard, bounds
from groupwise.learn.learner import PolicyLearner
from groupwise.learn.pack import Batch
from tests.learn.tiny import make_learner, some_credit, some_groups, tiny_policy

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def guard_in(dtype: torch.dtype, corrected: bool = False) -> tuple[Guard, list[str]]:
    warnings: list[str] = []
    policy = tiny_policy("llama")
    policy.to(dtype)
    return Guard(policy, warnings.append, corrected=corrected), warnings


def of(value: float, tokens: int, dtype: torch.dtype) -> Difference:
    return Difference.of(torch.full((tokens,), value), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_the_type_passes_without_a_word(dtype: torch.dtype) -> None:
    guard, warnings = guard_in(dtype)
    guard.check(of(0.9 * bounds(dtype).mean, 500, dtype), "here")
    one_worse = torch.zeros(500)
    one_worse[0] = 0.9 * bounds(dtype).token
    guard.check(Difference.of(one_worse, dtype), "here")
    assert warnings == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_rounding_is_said_once(dtype: torch.dtype) -> None:
    guard, warnings = guard_in(dtype)
    for _ in range(3):
        guard.check(of(1.2 * bounds(dtype).mean, 500, dtype), "here")
    assert len(warnings) == 1
    assert "here" in warnings[0]
    assert "LlamaForCausalLM in the shared layout" in warnings[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_another_distribution_ends_the_run(dtype: torch.dtype, value: float) -> None:
    guard, _ = guard_in(dtype)
    with pytest.raises(ModelError, match=r"500 sampled tokens.* LlamaForCausalLM in the shared layout.*doctor"):
        guard.check(of(value, 500, dtype), "here")


def test_the_narrower_the_type_the_more_is_rounding() -> None:
    for narrow, wide in zip(DTYPES[1:], DTYPES[:-1], strict=True):
        assert bounds(narrow).mean > bounds(wide).mean
        assert bounds(narrow).far_mean > bounds(wide).far_mean


def test_many_strays_end_it_and_one_does_not() -> None:
    """A router's tie that falls otherwise moves one token in bfloat16; a wrong window moves a part of all."""
    guard, warnings = guard_in(torch.bfloat16)
    apart = torch.zeros(100)
    apart[:2] = 1.5
    guard.check(Difference.of(apart, torch.bfloat16), "here")
    assert len(warnings) == 1
    apart[:15] = 1.5
    with pytest.raises(ModelError, match="15% of them by more than 1;"):
        guard.check(Difference.of(apart, torch.bfloat16), "here")


def test_few_tokens_prove_little() -> None:
    guard, warnings = guard_in(torch.bfloat16)
    guard.check(of(1.2, 2, torch.bfloat16), "here")
    assert len(warnings) == 1
    with pytest.raises(ModelError):
        guard.check(of(1.2, FEW, torch.bfloat16), "here")
    with pytest.raises(ModelError):
        guard.check(of(13.0, 2, torch.bfloat16), "here")


def test_a_sampler_that_is_meant_to_differ_is_only_warned_of() -> None:
    guard, warnings = guard_in(torch.float32, corrected=True)
    guard.check(of(2.0, 100, torch.float32), "here")
    guard.check(of(2.0, 100, torch.float32), "here")
    assert len(warnings) == 1


def test_nothing_sampled_is_nothing_judged() -> None:
    guard, warnings = guard_in(torch.float32)
    guard.check(Difference.of(torch.zeros(0), torch.float32), "here")
    assert warnings == []


def guarded_learner(shift: float, corrected: bool = False, **settings: int) -> tuple[PolicyLearner, Batch, list[str]]:
    """A learner, and a batch whose sampled log-probs are off by so much."""
    warnings: list[str] = []
    policy = tiny_policy()
    learner = make_learner(policy, "dapo", tokens_per_micro_batch=21, **settings)
    learner.guard = Guard(policy, warnings.append, corrected=corrected)
    groups = some_groups(policy, 1.0)
    batch = learner.prepare(groups, some_credit(groups))
    exact_T = learner.logprobs(batch)
    return learner, replace(batch, sampled_logprobs_T=exact_T + shift), warnings


@pytest.mark.parametrize("settings", [{}, {"updates_per_batch": 2}, {"num_iterations": 2}], ids=str)
def test_no_weight_moves_where_the_batch_is_of_another_policy(settings: dict[str, int]) -> None:
    learner, batch, _ = guarded_learner(0.5, **settings)
    before = {name: master.clone() for name, master in learner.master_weights().items()}
    with pytest.raises(ModelError, match="outputs of this step"):
        learner.update(batch)
    assert learner.version == 0
    assert all(torch.equal(master, before[name]) for name, master in learner.master_weights().items())


@pytest.mark.parametrize("settings", [{}, {"updates_per_batch": 2, "num_iterations": 2}], ids=str)
def test_a_batch_of_the_policys_own_is_learned_from(settings: dict[str, int]) -> None:
    learner, batch, warnings = guarded_learner(1e-6, **settings)
    found = learner.update(batch)
    assert found["sampling/logp_difference/mean"] == pytest.approx(1e-6, rel=1e-3)
    assert found["sampling/logp_difference/stray"] == 0
    if settings:
        learner.update(batch, 1)  # by now the policy is another than the one that sampled: nothing to judge
    assert learner.version == settings.get("updates_per_batch", 1) * settings.get("num_iterations", 1)
    assert warnings == []


def test_the_share_of_strays_is_a_metric() -> None:
    learner, batch, _ = guarded_learner(0.0, corrected=True)
    every_other = torch.arange(len(batch.completion_T)) % 2 * 0.1
    found = learner.update(replace(batch, sampled_logprobs_T=batch.sampled_logprobs_T + every_other))
    assert 0.3 < found["sampling/logp_difference/stray"] < 0.7
