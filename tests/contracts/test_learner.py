"""What every learner promises the loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from groupwise.learn.base import Learner
from groupwise.objective import objective_named
from tests.doubles import ScriptedLearner
from tests.learn.tiny import make_learner, some_credit, some_groups, tiny_policy

LEARNERS: dict[str, Callable[[], Learner]] = {
    "scripted": ScriptedLearner,
    "float32": lambda: make_learner(tiny_policy("qwen3"), "grpo"),
    "bfloat16": lambda: make_learner(tiny_policy("qwen3"), "grpo", compute_dtype=torch.bfloat16),
    "penalty in the reward": lambda: make_learner(tiny_policy("qwen3"), "rloo", num_iterations=2),
}


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_a_step_goes_from_groups_to_new_weights(make: Callable[[], Learner]) -> None:
    learner = make()
    learner.refresh(0)
    scored = some_groups(tiny_policy("qwen3"), 1.0)
    metrics: dict[str, float] = {}
    charged = learner.subtract_kl(scored, metrics)
    assert [group.group for group in charged] == [group.group for group in scored]
    before = {name: tensor.clone() for name, tensor in learner.master_weights().items()}
    batch = learner.prepare(charged, some_credit(charged))
    assert (learner.version, learner.updates) == (0, 0), "nothing moves before the update"
    for done in range(2):
        metrics |= learner.update(batch, done)
        learner.check()
        assert learner.version == learner.updates == done + 1
    assert all(isinstance(value, float) for value in metrics.values())
    after = learner.master_weights()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
def test_it_goes_on_from_its_state(make: Callable[[], Learner]) -> None:
    used, new = make(), make()
    scored = some_groups(tiny_policy("qwen3"), 1.0)
    used.refresh(0)
    used.update(used.prepare(used.subtract_kl(scored, {}), some_credit(scored)))
    new.restore(used.state())
    assert (new.version, new.updates) == (used.version, used.updates)
    for name, tensor in used.master_weights().items():
        assert torch.equal(new.master_weights()[name], tensor)


def test_which_objectives_take_the_penalty_from_the_reward() -> None:
    assert objective_named("rloo").kl_in_reward
    assert not objective_named("grpo").kl_in_reward
