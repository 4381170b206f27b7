"""Memory that runs out: the update is made again in smaller passes, with the same gradient, and counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from groupwise.errors import ModelError
from groupwise.learn.learner import Learner, is_out_of_memory
from groupwise.learn.reference import Reference
from groupwise.models.layout import Stream
from tests.learn.tiny import Gradient, distance, gradients, make_learner, some_credit, some_groups, tiny_policy

REFUSALS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


def learner_with_room(tokens: int, error: RuntimeError = REFUSALS[0], preset: str = "dapo", **settings: Any) -> Learner:
    """A learner on a device that refuses passes of more than so many tokens, after it has computed some of them."""
    policy = tiny_policy()
    compute = policy.forward

    def forward(stream: Stream, *inputs: Any, **options: Any) -> Any:
        if stream.tokens > tokens:
            raise error
        return compute(stream, *inputs, **options)

    policy.forward = forward  # type: ignore[method-assign]
    return make_learner(policy, preset, **{"tokens_per_micro_batch": 40, **settings})


def gradient(learner: Learner) -> Gradient:
    groups = some_groups(learner.policy, 1.0)
    (found,) = gradients(learner, learner.pack(groups, some_credit(groups)), passes_done=0)
    return found


@pytest.mark.parametrize("error", REFUSALS, ids=["cuda", "cpu"])
def test_the_budget_is_halved_and_the_gradient_is_the_same(error: RuntimeError) -> None:
    whole, halved = learner_with_room(1000), learner_with_room(20, error)
    assert distance(gradient(whole), gradient(halved)) < 1e-12
    assert (whole.budget, whole.halved, halved.budget, halved.halved) == (40, 0, 20, 1)


def test_so_are_the_passes_of_the_old_policy_and_of_the_reference() -> None:
    batches = []
    for room in (1000, 20):
        learner = learner_with_room(room, preset="grpo", num_iterations=2)
        assert learner.objective.kl_in_loss
        reference = Reference(learner.policy)
        groups = some_groups(learner.policy, 1.0)
        batches.append(learner.prepare(groups, some_credit(groups), reference))
        assert (learner.budget, learner.halved) == ((40, 0) if room == 1000 else (20, 1))
    whole, halved = batches
    for name in ("old_logprobs_T", "ref_logprobs_T"):
        torch.testing.assert_close(getattr(whole, name), getattr(halved, name), rtol=0, atol=1e-12)


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
    tensors, counters = learner.state_dict()
    other = learner_with_room(20)
    other.load_state_dict(tensors, counters)
    assert (other.budget, other.halved) == (20, 1)


def test_where_half_is_too_much_the_error_says_what_would_do() -> None:
    with pytest.raises(ModelError, match=r"micro-batches of 40 tokens, nor of 20.*gradient_checkpointing"):
        gradient(learner_with_room(5))


def test_another_error_is_not_taken_for_one() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        gradient(learner_with_room(20, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
