"""The learner's gradient is that of the whole batch under the stock model, however the batch is cut and laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from groupwise.learn.learner import PolicyLearner
from groupwise.learn.pack import Batch, Credit, micro_batches
from groupwise.models.policy import LayoutName, Policy
from groupwise.objective import PRESETS, Objective, objective_named
from groupwise.types import ScoredGroup
from tests.learn.tiny import (
    EVERYTHING,
    LENGTH,
    Gradient,
    distance,
    gathered,
    gradients,
    make_learner,
    size,
    some_credit,
    some_groups,
    stock_gradient,
    stock_logprobs,
    tiny_policy,
)
from tests.learn.tiny import with_past as off_policy

TEMPERATURE = 0.7
every_preset = pytest.mark.parametrize("preset", PRESETS)
both_layouts = pytest.mark.parametrize("layout", ["shared", "plain"])


@cache
def exact(layout: LayoutName) -> Policy:
    """A policy whose weights no test moves."""
    return tiny_policy(layout=layout)


@cache
def data() -> tuple[list[ScoredGroup], Credit]:
    groups = some_groups(exact("plain"), TEMPERATURE)
    return groups, some_credit(groups)


def learner_of(preset: str | Objective, policy: Policy, **settings: Any) -> PolicyLearner:
    return make_learner(policy, preset, temperature=TEMPERATURE, **settings)


def gradient(preset: str | Objective, layout: LayoutName = "shared", **settings: Any) -> Gradient:
    """Of one update over all groups, off-policy."""
    learner = learner_of(preset, exact(layout), **settings)
    (found,) = gradients(learner, off_policy(learner.pack(*data()), learner.objective))
    return found


@cache
def expected(preset: str | Objective, mask_truncated: bool = False) -> Gradient:
    learner = learner_of(preset, exact("plain"), mask_truncated=mask_truncated)
    found, _ = stock_gradient(learner.policy, learner.objective, off_policy(learner.pack(*data()), learner.objective))
    assert size(found) > 1e-3, "an example without a gradient shows nothing"
    return found


def count_forwards(policy: Policy) -> list[object]:
    """A list that grows by one entry with every forward pass."""
    seen: list[object] = []
    policy.register_forward_hook(lambda *call: seen.append(None))
    return seen


@every_preset
@both_layouts
@pytest.mark.parametrize("budget", [1, 21, EVERYTHING])
def test_any_layout_and_any_budget_give_the_whole_batchs_gradient(preset: str, layout: LayoutName, budget: int) -> None:
    assert distance(gradient(preset, layout, tokens_per_micro_batch=budget), expected(preset)) < 1e-10


@both_layouts
def test_the_budgets_split_groups_and_mix_them(layout: LayoutName) -> None:
    outputs = learner_of("grpo", exact(layout)).pack(*data()).outputs
    parts = [{outputs[m].group for m in p} for p in micro_batches(outputs, range(len(outputs)), 21, layout == "shared")]
    assert sum(map(len, parts)) > 5, "a group in two passes"
    assert max(map(len, parts)) > 1, "two groups in one pass"


@every_preset
def test_the_order_of_groups_and_outputs_does_not_matter(preset: str) -> None:
    groups, credit = data()
    turned = [
        replace(g, group=replace(g.group, completions=g.group.completions[::-1]), scores=g.scores[::-1]) for g in groups
    ]
    order = [3, 0, 4, 2, 1]
    learner = learner_of(preset, exact("shared"), tokens_per_micro_batch=21)
    batch = learner.pack([turned[g] for g in order], [credit[g][::-1] for g in order])
    (found,) = gradients(learner, off_policy(batch, learner.objective))
    assert distance(found, expected(preset)) < 1e-10


@every_preset
@pytest.mark.parametrize("budget", [21, EVERYTHING])
def test_outputs_cut_by_the_length_limit_leave_loss_and_denominators(preset: str, budget: int) -> None:
    found = gradient(preset, mask_truncated=True, tokens_per_micro_batch=budget)
    assert distance(found, expected(preset, mask_truncated=True)) < 1e-10
    assert distance(found, expected(preset)) > 1e-4


@every_preset
@pytest.mark.parametrize("kl", ["k2", "k3", "k3_unbiased"])
def test_a_kl_term_reaches_the_gradient(preset: str, kl: str) -> None:
    objective = replace(objective_named(preset, max_completion_length=LENGTH), kl=kl, beta=0.3)  # type: ignore[arg-type]
    found = gradient(objective, tokens_per_micro_batch=21)
    assert distance(found, expected(objective)) < 1e-10
    assert distance(found, expected(replace(objective, beta=0.0))) > 1e-3


@every_preset
def test_updates_of_a_pass_have_their_own_denominators(preset: str) -> None:
    policy = tiny_policy()
    learner = learner_of(preset, policy, updates_per_batch=2, tokens_per_micro_batch=21, rate=3e-3)
    batch = off_policy(learner.pack(*data()), learner.objective)
    shares: list[set[int]] = []
    distances: list[float] = []
    losses: list[float] = []
    update, step = learner._update, learner.optimizer.step

    def watch_update(batch: Batch, groups: set[int], first_pass: bool) -> None:
        shares.append(groups)
        update(batch, groups, first_pass)

    def check_then_step() -> tuple[float, float]:
        wanted, loss = stock_gradient(policy, learner.objective, batch, shares[-1])
        losses.append(loss)
        distances.append(distance(gathered(learner), wanted))
        return step()

    learner._update, learner.optimizer.step = watch_update, check_then_step  # type: ignore[method-assign]
    metrics = learner.update(batch, passes_done=1)
    assert max(distances) < 1e-10
    assert sorted(map(len, shares)) == [2, 3]
    assert sorted(g for share in shares for g in share) == [0, 1, 2, 3, 4]
    assert metrics["updates"] == learner.version == 2
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, abs=1e-10)


def test_a_sampler_is_corrected_only_when_asked() -> None:
    objective = replace(PRESETS["grpo"], importance_sampling="sequence_mask", importance_sampling_cap=1.2)
    found = gradient(objective)
    assert distance(found, expected("grpo")) < 1e-10
    learner = learner_of(objective, exact("shared"), correct_sampler=True, tokens_per_micro_batch=21)
    batch = off_policy(learner.pack(*data()), objective)
    assert batch.old_logprobs_T is not None
    lag = torch.linspace(-0.3, 0.3, len(batch.completion_T), dtype=torch.float64)
    stale = replace(batch, sampled_logprobs_T=batch.old_logprobs_T + lag)
    (corrected,) = gradients(learner, stale)
    assert distance(corrected, stock_gradient(exact("plain"), objective, stale, corrected=True)[0]) < 1e-10
    assert distance(corrected, found) > 1e-3


@every_preset
def test_the_first_update_is_on_policy_and_takes_no_extra_forward(preset: str) -> None:
    policy = tiny_policy()
    learner = learner_of(preset, policy, tokens_per_micro_batch=21)
    forwards = count_forwards(policy)
    of_reference = count_forwards(learner.reference.policy) if learner.objective.needs_reference else []
    batch = learner.prepare(*data())
    assert forwards == []
    assert batch.old_logprobs_T is None
    assert bool(of_reference) == (batch.ref_logprobs_T is not None) == learner.objective.kl_in_loss
    wanted, loss = stock_gradient(policy, learner.objective, batch)
    found = learner.update(batch)
    assert len(forwards) == found["micro_batches"] > 1
    assert found["ratio/max"] == 1.0
    assert found["loss"] == pytest.approx(loss, abs=1e-12)
    norm = torch.stack([value.norm() for value in wanted.values()]).norm()
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)


def test_the_reference_of_a_first_step_adds_nothing() -> None:
    policy = tiny_policy()
    learner = learner_of("grpo", policy)
    batch = learner.prepare(*data())
    (found,) = gradients(learner, batch, passes_done=0)
    without, _ = stock_gradient(policy, replace(learner.objective, beta=0.0), batch)
    assert distance(found, without) < 1e-10


def test_old_log_probs_are_computed_once_and_stay() -> None:
    policy = tiny_policy()
    learner = learner_of("dapo", policy, num_iterations=2, tokens_per_micro_batch=21, rate=0.01)
    forwards = count_forwards(policy)
    batch = learner.prepare(*data())
    passes = len(forwards)
    assert passes > 1
    assert batch.old_logprobs_T is not None
    with torch.no_grad():
        stock_T = stock_logprobs(policy.model, batch)
    live_T = ~torch.tensor(batch.zero_advantage_S)[batch.completion_T]
    assert (batch.old_logprobs_T - stock_T)[live_T].abs().max() < 1e-12
    old_T = batch.old_logprobs_T.clone()
    assert learner.update(batch, 0)["ratio/max"] == 1.0
    assert learner.update(batch, 1)["ratio/max"] > 1.001
    assert torch.equal(batch.old_logprobs_T, old_T)
    assert len(forwards) == 3 * passes


def test_with_several_updates_the_first_is_on_policy_exactly() -> None:
    learner = learner_of("gspo", tiny_policy("qwen3"), updates_per_batch=2, rate=0.01)
    batch = learner.prepare(*data())
    assert batch.old_logprobs_T is not None
    # What another cut into forward passes may do in a narrow type, and more than gspo's clip bears.
    batch = replace(batch, old_logprobs_T=batch.old_logprobs_T + 1e-3)
    ratios: list[float] = []
    step = learner.optimizer.step

    def look_then_step() -> tuple[float, float]:
        ratios.append(learner._tally.greatest["ratio/max"].item())
        return step()

    learner.optimizer.step = look_then_step  # type: ignore[method-assign]
    learner.update(batch)
    assert ratios[0] == 1.0
    assert ratios[1] > 1.001


def test_each_pass_deals_the_groups_anew() -> None:
    learner = learner_of("dapo", exact("shared"), updates_per_batch=2, num_iterations=4)
    batch = learner.pack(*data())
    shares: list[str] = []
    learner._update = lambda batch, groups, first_pass: shares.append(str(sorted(groups)))  # type: ignore[method-assign]
    learner._tally.norms.append(1.0)
    for passes_done in range(1, 9):
        learner.update(batch, passes_done)
    assert len(set(shares)) > 4


def without_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "may_skip_zero_advantages", property(lambda objective: False))


@pytest.mark.parametrize("preset", ["dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo"])
@pytest.mark.parametrize("settings", [{}, {"updates_per_batch": 2, "mask_truncated": True}])
def test_skipping_outputs_without_advantage_changes_nothing(
    preset: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn() -> tuple[list[Gradient], dict[str, torch.Tensor], dict[str, float]]:
        policy = tiny_policy()
        learner = learner_of(preset, policy, num_iterations=2, **settings)
        batch = learner.prepare(*data())
        found: list[Gradient] = []
        step = learner.optimizer.step

        def keep_then_step() -> tuple[float, float]:
            found.append(gathered(learner))
            return step()

        learner.optimizer.step = keep_then_step  # type: ignore[method-assign]
        learner.update(batch, 0)
        return found, {n: w.clone() for n, w in learner.master_weights().items()}, learner.update(batch, 1)

    skipped, weights, metrics = learn()
    without_skipping(monkeypatch)
    forwarded, same_weights, all_metrics = learn()
    assert max(map(distance, skipped, forwarded)) < 1e-10
    assert distance(weights, same_weights) < 1e-10
    assert metrics["tokens/skipped"] > all_metrics["tokens/skipped"]
    assert metrics["loss"] == pytest.approx(all_metrics["loss"], abs=1e-12)
    sampled = sum(len(output.token_ids) for group in data()[0] for output in group.group.completions)
    for one in (metrics, all_metrics):
        assert one["tokens/trained"] + one["tokens/skipped"] == sampled


def test_with_a_kl_term_nothing_is_skipped() -> None:
    policy = tiny_policy()
    learner = learner_of("grpo", policy, num_iterations=2)
    groups, credit = data()
    silence = [[0.0] * len(row) for row in credit]
    batch = learner.prepare(groups, silence)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.1)
    metrics = learner.update(batch, 1)
    assert metrics["grad_norm"] > 1e-4, "the KL's own gradient"
    metrics = learner.update(learner.prepare(groups, silence))
    assert metrics["tokens/skipped"] == 0
    assert metrics["tokens/trained"] == len(batch.completion_T)


def test_a_step_without_any_advantage_still_steps_adam() -> None:
    policy = tiny_policy()
    learner = learner_of("dapo", policy, rate=0.01)
    adam = torch.optim.AdamW(
        replicas := [p.detach().clone().requires_grad_() for p in policy.parameters()], lr=0.01, weight_decay=0.0
    )
    groups, credit = data()
    wanted, _ = stock_gradient(policy, learner.objective, batch := learner.prepare(groups, credit))
    learner.update(batch)
    forwards = count_forwards(policy)
    metrics = learner.update(learner.prepare(groups, [[0.0] * len(row) for row in credit]))
    assert forwards == []
    for twin, gradient in zip(replicas, wanted.values(), strict=True):
        twin.grad = gradient
    torch.nn.utils.clip_grad_norm_(replicas, 1.0)
    adam.step()
    for twin in replicas:
        twin.grad = torch.zeros_like(twin)
    adam.step()
    for twin, parameter in zip(replicas, policy.parameters(), strict=True):
        assert torch.allclose(twin, parameter, rtol=0, atol=1e-12)
    assert (metrics["updates"], metrics["updates/refused"]) == (1, 0)
    assert metrics["tokens/skipped"] == len(batch.completion_T)
    assert (metrics["loss"], metrics["grad_norm"], metrics["micro_batches"]) == (0.0, 0.0, 0.0)


def test_a_gradient_that_is_not_finite_is_refused_and_counted() -> None:
    policy = tiny_policy()
    learner = learner_of("dapo", policy, updates_per_batch=2)
    batch = learner.prepare(*data())
    before = {name: weight.clone() for name, weight in learner.master_weights().items()}
    poison: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient * torch.inf  # noqa: E731
    handle = next(policy.parameters()).register_hook(poison)
    metrics = learner.update(batch)
    assert (metrics["updates"], metrics["updates/refused"], learner.version) == (2, 2, 0)
    assert distance(before, learner.master_weights()) == 0.0
    handle.remove()
    metrics = learner.update(batch)
    assert metrics["updates/refused"] == 0
    assert distance(before, learner.master_weights()) > 0.0


@every_preset
@both_layouts
def test_on_policy_the_known_slope_gives_the_gradient_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, preset: str, layout: LayoutName
) -> None:
    objective = replace(objective_named(preset, max_completion_length=LENGTH), beta=0.0)
    found = []
    for reads in (True, False):  # with the loss's own gradient, then with the one told beforehand
        learner = learner_of(objective, exact(layout), tokens_per_micro_batch=21)
        monkeypatch.setattr(learner, "_reads_logprobs", lambda batch, reads=reads: reads)
        found += gradients(learner, learner.pack(*data()), passes_done=0)
    assert size(found[0]) > 1e-3
    assert distance(*found) < 1e-12


@pytest.mark.parametrize("change", [{"beta": 0.1, "kl": "k3"}, {"importance_sampling": "token_truncate"}])
def test_what_depends_on_log_probs_is_told_no_gradient(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    objective = replace(objective_named("grpo"), **{"beta": 0.0, **change})
    learner = learner_of(objective, exact("shared"), correct_sampler="importance_sampling" in change)
    monkeypatch.setattr(learner, "_grad_logprobs", lambda *inputs: pytest.fail("a gradient was told"))
    gradients(learner, off_policy(learner.pack(*data()), learner.objective), passes_done=0)
