"""What the learner reports, against numbers computed the long way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.learn.learner import PolicyLearner
from groupwise.learn.pack import Batch
from groupwise.objective import Objective, objective_named, token_losses
from groupwise.watch.metrics import unknown
from tests.learn.tiny import (
    LENGTH,
    gathered,
    make_learner,
    some_credit,
    some_groups,
    stock_gradient,
    stock_logprobs,
    stock_model,
    tiny_policy,
    with_past,
)

TEMPERATURE = 0.7


def off_policy(preset: str | Objective, masked: bool = False, **settings: Any) -> tuple[PolicyLearner, Batch]:
    """A learner with a batch of an older policy, several micro-batches a pass; or every third token not its own."""
    policy = tiny_policy()
    groups = some_groups(policy, TEMPERATURE)
    learner = make_learner(policy, preset, temperature=TEMPERATURE, tokens_per_micro_batch=21, **settings)
    batch = with_past(learner.pack(groups, some_credit(groups)), learner.objective)
    own_T = torch.arange(len(batch.completion_T)) % 3 > 0
    return learner, replace(batch, trained_T=batch.trained_T & own_T) if masked else batch


def live(batch: Batch, objective: Objective) -> Tensor:
    """Trained tokens of the outputs that are forwarded."""
    forwarded = torch.tensor([not (objective.may_skip_zero_advantages and silent) for silent in batch.zero_advantage_S])
    return batch.trained_T & forwarded[batch.completion_T]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo", "sapo"])
def test_means_are_over_trained_tokens_whatever_the_micro_batches(preset: str, masked: bool) -> None:
    learner, batch = off_policy(preset, masked, mask_truncated=masked)
    keep_T = live(batch, learner.objective)
    with torch.no_grad():
        logprobs_T = stock_logprobs(stock_model(learner.policy), batch)
    assert batch.old_logprobs_T is not None
    losses = token_losses(
        learner.objective, logprobs_T=logprobs_T, old_logprobs_T=batch.old_logprobs_T, trained_T=batch.trained_T,
        advantages_T=batch.advantages_T, completion_T=batch.completion_T, ref_logprobs_T=batch.ref_logprobs_T,
    )  # fmt: skip
    _, loss = stock_gradient(learner.policy, learner.objective, batch)
    found = learner.update(batch, passes_done=1)

    def mean(values_T: Tensor) -> object:
        return pytest.approx(values_T[keep_T].double().mean().item(), abs=1e-10)

    assert found["loss"] == pytest.approx(loss, abs=1e-10)
    assert found["clip_ratio/low_mean"] == mean(losses.clipped_low_T)
    assert found["clip_ratio/high_mean"] == mean(losses.clipped_high_T)
    assert found["clip_ratio/region_mean"] == mean(losses.clipped_low_T | losses.clipped_high_T)
    assert found["ratio/max"] == pytest.approx(losses.ratio_T[keep_T].max().item())
    assert ("kl" in found) == learner.objective.kl_in_loss
    if losses.kl_T is not None:
        assert found["kl"] == mean(losses.kl_T)


@pytest.mark.parametrize("preset", ["grpo", "dapo"])
def test_the_first_pass_tells_entropy_and_the_distance_of_the_sampler(preset: str) -> None:
    learner, batch = off_policy(preset, masked=True, mask_truncated=True)
    stray_T = torch.where(batch.trained_T, 0.0, -9.0)
    batch = replace(batch, sampled_logprobs_T=batch.sampled_logprobs_T + stray_T)
    keep_T = live(batch, learner.objective)
    stock = stock_model(learner.policy)
    entropy: list[Tensor] = []
    with torch.no_grad():
        logprobs_T = stock_logprobs(stock, batch)
        for o in batch.outputs:
            logits = stock(input_ids=torch.tensor([[*o.prompt, *o.token_ids]])).logits[0, len(o.prompt) - 1 : -1]
            entropy.append(torch.distributions.Categorical(logits=logits / TEMPERATURE).entropy())
    differences = (logprobs_T - batch.sampled_logprobs_T).abs()[keep_T]
    found = learner.update(replace(batch, old_logprobs_T=None))
    assert found["entropy"] == pytest.approx(torch.cat(entropy)[keep_T].mean().item(), abs=1e-10)
    assert found["sampling/logp_difference/mean"] == pytest.approx(differences.mean().item(), abs=1e-10)
    assert found["sampling/logp_difference/max"] == pytest.approx(differences.max().item(), abs=1e-10)
    assert found["tokens/trained"] == keep_T.sum()
    assert found["tokens/skipped"] == sum(
        len(output.token_ids)
        for output, trained, silent in zip(batch.outputs, batch.trained_S, batch.zero_advantage_S, strict=True)
        if not trained or (silent and learner.objective.may_skip_zero_advantages)
    )


def test_the_metrics_of_a_step_are_of_all_its_passes() -> None:
    learner, batch = off_policy("dapo", updates_per_batch=2, num_iterations=2, rate=0.01)
    batch = replace(batch, old_logprobs_T=learner.logprobs(batch))
    ratios: list[float] = []
    norms: list[float] = []
    step = learner.optimizer.step

    def watch_step() -> tuple[float, float]:
        norms.append(torch.stack([value.norm() for value in gathered(learner).values()]).norm().item())
        ratios.append(learner._tally.greatest["ratio/max"].item())
        return step()

    learner.optimizer.step = watch_step  # type: ignore[method-assign]
    first = learner.update(batch, 0)
    second = learner.update(batch, 1)
    assert (first["updates"], second["updates"]) == (2, 4)
    assert second["micro_batches"] > first["micro_batches"]
    assert first["grad_norm"] == pytest.approx(sum(norms[:2]) / 2)
    assert second["grad_norm"] == pytest.approx(sum(norms) / 4)
    assert second["ratio/max"] == max(ratios) > first["ratio/max"]
    for name in ("entropy", "sampling/logp_difference/mean", "tokens/trained", "tokens/skipped"):
        assert first[name] == second[name], "of the policy that sampled, and of the batch"
    third = learner.update(batch, 0)
    assert third["updates"] == 2, "a new batch begins anew"


def test_a_norm_that_was_refused_is_in_no_mean() -> None:
    learner, batch = off_policy("dapo", updates_per_batch=2)
    norms = iter([math.inf, 3.0])
    learner.optimizer.step = lambda: (next(norms), 0.5)  # type: ignore[method-assign]
    found = learner.update(batch)
    assert (found["grad_norm"], found["updates/refused"], found["learning_rate"]) == (3.0, 1.0, 0.5)


@pytest.mark.parametrize("preset", ["grpo", "dapo"])
def test_every_name_is_documented_and_every_value_a_number(preset: str) -> None:
    policy = tiny_policy()
    groups = some_groups(policy, TEMPERATURE)
    learner = make_learner(policy, objective_named(preset, max_completion_length=LENGTH), num_iterations=2)
    batch = learner.prepare(groups, some_credit(groups))
    found = learner.update(batch, 0) | learner.update(batch, 1)
    assert unknown(found) == []
    assert {type(value) for value in found.values()} == {float}
    assert all(map(math.isfinite, found.values()))
    assert found["memory/peak_bytes"] > 1e7
    assert len(found) >= 15
