"""The reference policy, and the KL penalty in the reward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.learn.learner import PolicyLearner
from groupwise.learn.reference import NoReference, Reference
from groupwise.models.policy import Policy
from groupwise.types import Completion, Score, ScoredGroup, Step
from groupwise.watch.metrics import unknown
from tests.learn.tiny import EVERYTHING, make_learner, some_credit, some_groups, stock_output, tiny_policy

TEMPERATURE = 0.7
BETA = 0.05


def moved(**settings: Any) -> tuple[PolicyLearner, Reference]:
    """A learner some way off its reference."""
    learner = make_learner(tiny_policy(), "rloo", temperature=TEMPERATURE, **settings)
    reference = learner.reference
    assert isinstance(reference, Reference)
    move(learner, 1.2)
    return learner, reference


def move(learner: PolicyLearner, factor: float) -> None:
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.mul_(factor)


def groups() -> list[ScoredGroup]:
    """Groups with an output and a whole group that were not scored."""
    found = some_groups(tiny_policy(), TEMPERATURE)
    found[0] = replace(found[0], scores=(Score(None), *found[0].scores[1:]))
    found[2] = replace(found[2], scores=tuple(Score(None) for _ in found[2].scores))
    return found


def weights_equal(learner: PolicyLearner, reference: Reference) -> bool:
    own = learner.policy.model.state_dict()
    return all(torch.equal(tensor, own[name]) for name, tensor in reference.state_dict().items())


@torch.no_grad()
def logprob(policy: Policy, group: ScoredGroup, output: Completion) -> float:
    """Of a whole output, by the stock model."""
    prompt = group.group.prompt.token_ids
    return float(stock_output(policy.model, prompt, output.token_ids, TEMPERATURE).sum())


def test_the_reference_becomes_the_policy_once_in_an_iteration() -> None:
    learner, reference = moved()
    assert not weights_equal(learner, reference)
    learner.refresh(0)
    assert weights_equal(learner, reference)
    move(learner, 1.1)
    learner.refresh(0)
    assert not weights_equal(learner, reference), "not again in the same iteration"
    learner.refresh(1)
    assert weights_equal(learner, reference)
    move(learner, 1.1)
    assert not weights_equal(learner, reference), "a copy, not the same tensors"


def test_a_resumed_reference_is_that_of_its_iteration() -> None:
    learner, reference = moved()
    learner.refresh(3)
    saved = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    move(learner, 1.1)
    resumed = Reference(learner.policy)
    resumed.load_state_dict(saved, reference.iteration)
    resumed.refresh(learner.policy, 3)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in resumed.state_dict().items())
    resumed.refresh(learner.policy, 4)
    assert weights_equal(learner, resumed)


@pytest.mark.parametrize("budget", [1, 21, EVERYTHING])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_the_penalty_is_taken_off_every_scored_reward(mask_truncated: bool, budget: int) -> None:
    learner, reference = moved(mask_truncated=mask_truncated, tokens_per_micro_batch=budget)
    scored = groups()
    assert any(output.finish == "length" for group in scored for output in group.group.completions)
    metrics: dict[str, float] = {}
    charged = learner.subtract_kl(scored, metrics)
    taken = []
    for before, after in zip(scored, charged, strict=True):
        assert after.group is before.group
        for output, old, new in zip(before.group.completions, before.scores, after.scores, strict=True):
            if old.reward is None:
                assert new.reward is None
                continue
            now, then = (logprob(p, before, output) for p in (learner.policy, reference.policy))
            taken.append(BETA * (now - then))
            assert new.reward == pytest.approx(old.reward - BETA * (now - then), abs=1e-10)
            assert (new.steps, new.parts) == (old.steps, old.parts)
    assert max(map(abs, taken)) > 1e-2
    assert metrics == {"reward/kl_penalty": pytest.approx(sum(taken) / len(taken), abs=1e-10)}
    assert unknown(metrics) == []


@torch.no_grad()
def test_every_scored_step_pays_for_its_own_tokens() -> None:
    learner, reference = moved()
    scored = []
    for group in groups():
        scores = []
        for score, length in zip(group.scores, group.lengths, strict=True):
            middle = (length + 1) // 2
            steps = (Step(middle, 0.25, "a"), Step(length, None if length % 3 == 0 else 1.0))
            scores.append(replace(score, steps=steps[-1:] if middle == length else steps))
        scored.append(replace(group, scores=tuple(scores)))
    charged = learner.subtract_kl(scored, {})
    taken = []
    for before, after in zip(scored, charged, strict=True):
        prompt = before.group.prompt.token_ids
        for output, old, new in zip(before.group.completions, before.scores, after.scores, strict=True):
            now_T, then_T = (
                stock_output(p.model, prompt, output.token_ids, TEMPERATURE) for p in (learner.policy, reference.policy)
            )
            start = 0
            for was, found in zip(old.steps, new.steps, strict=True):
                kl = float((now_T - then_T)[start : was.end].sum())
                expected = None if was.reward is None else pytest.approx(was.reward - BETA * kl, abs=1e-10)
                assert found == (was.end, expected, was.text)
                start = was.end
                taken.append(abs(BETA * kl))
    assert max(taken) > 1e-2


def test_one_step_pays_what_its_output_pays_bit_for_bit() -> None:
    learner, _ = moved()
    scored = []
    for group in groups():
        pairs = zip(group.scores, group.lengths, strict=True)
        scored.append(replace(group, scores=tuple(replace(s, steps=(Step(n, s.reward),)) for s, n in pairs)))
    for group in learner.subtract_kl(scored, {}):
        assert group.rewards == [score.steps[0].reward for score in group.scores]


def test_a_policy_that_is_its_reference_pays_nothing() -> None:
    learner, _ = moved()
    learner.refresh(0)
    scored = groups()
    metrics: dict[str, float] = {}
    assert learner.subtract_kl(scored, metrics) == scored
    assert metrics == {"reward/kl_penalty": 0.0}


def test_nothing_scored_nothing_paid() -> None:
    learner, _ = moved()
    scored = [replace(group, scores=tuple(Score(None) for _ in group.scores)) for group in groups()]
    metrics: dict[str, float] = {}
    assert learner.subtract_kl(scored, metrics) == scored
    assert metrics == {"reward/kl_penalty": 0.0}


def test_what_the_penalty_computed_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, reference = moved(num_iterations=2)
    scored = learner.subtract_kl(groups(), {})
    for policy in (learner.policy, reference.policy):
        monkeypatch.setattr(policy, "forward", lambda *_, **__: pytest.fail("a forward pass"))
    found = learner.prepare(scored, some_credit(scored)).old_logprobs_T
    monkeypatch.undo()
    assert found is not None
    torch.testing.assert_close(found, learner.logprobs(learner.pack(scored, some_credit(scored))), rtol=0, atol=1e-12)


def test_without_a_reference_nothing_is_run_held_or_charged() -> None:
    learner = make_learner(tiny_policy(), "dapo")
    scored, nothing = groups(), NoReference()
    metrics: dict[str, float] = {}
    assert isinstance(learner.reference, NoReference)
    learner.refresh(1)
    nothing.load_state_dict({}, 1)
    assert nothing.state_dict() == {}
    assert learner.subtract_kl(scored, metrics) is scored
    assert metrics == {}
    with pytest.raises(AssertionError, match="reference"):
        learner.reference_logprobs(learner.pack(scored, some_credit(scored)))
