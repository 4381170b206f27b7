"""Memory that runs out: the update is made again in smaller passes, with the same gradient, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from groupwise.errors import ModelError
from groupwise.learn.budget import is_out_of_memory
from groupwise.learn.learner import PolicyLearner
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.models.layout import Stream
from groupwise.models.policy import Policy
from groupwise.objective import objective_named
from groupwise.reward_models.learner import RewardLearner, RewardLearnerSettings
from groupwise.reward_models.text import Graded, Output, Row, Steps, Stepwise
from tests.learn.tiny import Gradient, distance, gradients, make_learner, some_credit, some_groups, tiny_policy
from tests.tiny_judges import pupil, save_judge

Kind = Literal["outcome", "process"]
GRADED = [Graded(Output("ab", letter * 3), float(letter < "e")) for letter in "abcdefgh"]
STEPS = [Stepwise(Steps("ab", (letter, "c")), (float(letter < "e"), 1.0)) for letter in "abcdefgh"]
REFUSALS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


def learner_with_room(
    tokens: int, error: RuntimeError = REFUSALS[0], preset: str = "dapo", **settings: Any
) -> PolicyLearner:
    """A learner on a device that refuses passes of more than so many tokens, after it has computed some of them."""
    learner = make_learner(tiny_policy(), preset, **{"tokens_per_micro_batch": 40, **settings})
    refuse(learner.policy, tokens, error)
    return learner


def refuse(policy: Policy, tokens: int, error: RuntimeError = REFUSALS[0]) -> None:
    """Have a policy refuse passes of more than so many tokens."""
    compute = policy.forward

    def forward(stream: Stream, *inputs: Any, **options: Any) -> Any:
        if stream.tokens > tokens:
            raise error
        return compute(stream, *inputs, **options)

    policy.forward = forward  # type: ignore[method-assign]


def gradient(learner: PolicyLearner) -> Gradient:
    groups = some_groups(learner.policy, 1.0)
    (found,) = gradients(learner, learner.pack(groups, some_credit(groups)), passes_done=0)
    return found


@pytest.mark.parametrize("error", REFUSALS, ids=["cuda", "cpu"])
def test_the_budget_is_halved_and_the_gradient_is_the_same(error: RuntimeError) -> None:
    whole, halved = learner_with_room(1000), learner_with_room(20, error)
    assert distance(gradient(whole), gradient(halved)) < 1e-12
    for learner, expected in ((whole, (40, 0)), (halved, (20, 1))):
        assert (learner.token_budget.budget, learner.token_budget.halved) == expected


def test_so_are_the_passes_of_the_old_policy_and_of_the_reference() -> None:
    batches = []
    for room in (1000, 20):
        learner = learner_with_room(room, preset="grpo", num_iterations=2)
        assert learner.objective.kl_in_loss
        groups = some_groups(learner.policy, 1.0)
        batches.append(learner.prepare(groups, some_credit(groups)))
        assert (learner.token_budget.budget, learner.token_budget.halved) == ((40, 0) if room == 1000 else (20, 1))
    whole, halved = batches
    for name in ("old_logprobs_T", "ref_logprobs_T"):
        torch.testing.assert_close(getattr(whole, name), getattr(halved, name), rtol=0, atol=1e-12)


def test_so_are_those_of_a_kl_penalty_in_the_reward() -> None:
    """By the budget that is left, whichever of the two passes it was that ran out."""
    charged = []
    for refusing in ("neither", "policy", "reference"):
        learner = make_learner(tiny_policy(), replace(objective_named("rloo"), beta=0.5), tokens_per_micro_batch=40)
        with torch.no_grad():
            for weight in learner.reference.policy.parameters():
                weight *= 1.1
        if refusing != "neither":
            refuse(learner.policy if refusing == "policy" else learner.reference.policy, 20)
        scored = [
            replace(group, scores=tuple(replace(score, reward=1.0) for score in group.scores))
            for group in some_groups(learner.policy, 1.0)
        ]
        metrics: dict[str, float] = {}
        found = learner.subtract_kl(scored, metrics)
        charged.append([reward for group in found for reward in group.rewards])
        assert (learner.token_budget.budget, learner.token_budget.halved) == (
            (40, 0) if refusing == "neither" else (20, 1)
        )
        assert abs(metrics["reward/kl_penalty"]) > 1e-3
    for other in charged[1:]:
        assert other == pytest.approx(charged[0], abs=1e-12)


def test_it_is_counted_and_the_lost_passes_are_not() -> None:
    metrics = []
    for room in (20, 1000):
        learner = learner_with_room(room, tokens_per_micro_batch=40 if room == 20 else 20)
        groups = some_groups(learner.policy, 1.0)
        metrics.append(learner.update(learner.pack(groups, some_credit(groups))))
    assert [one.pop("memory/budget_halved") for one in metrics] == [1.0, 0.0]
    for one in metrics:
        one.pop("memory/peak_bytes")
    assert metrics[0] == metrics[1]


def test_a_run_that_is_taken_up_keeps_the_smaller_budget() -> None:
    learner = learner_with_room(20)
    gradient(learner)
    other = learner_with_room(20)
    other.restore(learner.state())
    assert (other.token_budget.budget, other.token_budget.halved) == (20, 1)


def test_where_half_is_too_much_the_error_says_what_would_do() -> None:
    with pytest.raises(ModelError, match=r"micro-batches of 40 tokens, nor of 20.*gradient_checkpointing"):
        gradient(learner_with_room(5))


def test_another_error_is_not_taken_for_one() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        gradient(learner_with_room(20, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_a_reward_model_in_training_makes_room_too(tmp_path: Path, kind: Kind) -> None:
    """An update as with room enough, in float32; the smaller budget is in the checkpoint."""
    folder = save_judge(tmp_path, kind)
    found = []
    for room in (1000, 20):
        learner = pupil_with_room(folder, kind, room)
        examples = list(GRADED if kind == "outcome" else STEPS)
        metrics = learner.fit(examples)
        assert metrics.pop("budget_halved") == (room == 20)
        found.append(metrics)
        assert learner.state_dict()[1]["budget"] == learner.token_budget.budget == (40 if room == 1000 else 20)
        assert len(learner.evaluate(examples)) > 2
    assert found[1] == pytest.approx(found[0], rel=1e-5), "loss and gradient norm among them"


def test_where_half_is_too_much_for_a_reward_model_the_error_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"micro-batches of 40 tokens, nor of 20.*Lower tokens_per_micro_batch"):
        pupil_with_room(save_judge(tmp_path, "outcome"), "outcome", 1).fit(GRADED)


def pupil_with_room(folder: Path, kind: Kind, tokens: int) -> RewardLearner:
    """A reward model's learner on a device that refuses passes of more than so many tokens, after computing them."""
    model = pupil(folder, kind)
    compute = model.logits

    def logits(rows: Sequence[Row]) -> torch.Tensor:
        found = compute(rows)
        if len(rows) * max(len(row.token_ids) for row in rows) > tokens:
            raise REFUSALS[0]
        return found

    model.logits = logits  # type: ignore[method-assign]
    optimizer = OptimizerSettings(1e-3, total_updates=1)
    return RewardLearner(model, RewardLearnerSettings(optimizer, batch_size=8, tokens_per_micro_batch=40))
