"""The learner in bfloat16, and a learner taken up by another: nothing rounded away, nothing forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.engines.native.engine import NativeEngine
from groupwise.learn.learner import PolicyLearner
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.learn.reference import Reference
from groupwise.models.policy import Policy
from groupwise.state import State
from groupwise.store import checkpoint
from groupwise.types import ScoredGroup
from tests.learn.tiny import distance, gradients, make_learner, some_credit, some_groups, tiny_policy

BFLOAT16 = torch.bfloat16
both_types = pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])


def learning(kind: str = "qwen3", preset: str = "dapo", *, tied: bool = True, **settings: Any) -> PolicyLearner:
    return make_learner(tiny_policy(kind, tied=tied), preset, **settings)


def step_data(seed: int = 0) -> tuple[list[ScoredGroup], list[list[float | list[float]]]]:
    groups = some_groups(tiny_policy("qwen3"), 1.0, seed)
    return groups, some_credit(groups)


def learn(learner: PolicyLearner, seed: int) -> dict[str, float]:
    """One step with `num_iterations` passes."""
    batch = learner.prepare(*step_data(seed))
    for done in range(learner.settings.num_iterations):
        metrics = learner.update(batch, done)
    return metrics


def frequencies(policy: Policy) -> list[Tensor]:
    return [buffer for name, buffer in policy.named_buffers() if "inv_freq" in name]


def test_a_bfloat16_learner_adds_up_micro_batches_in_float32() -> None:
    learner = learning(compute_dtype=BFLOAT16, tokens_per_micro_batch=1)
    groups, credit = step_data()
    (found,) = gradients(learner, learner.prepare(groups, credit), passes_done=0)
    total = {name: torch.zeros_like(value) for name, value in found.items()}
    for g, row in enumerate(credit):
        for i in range(len(row)):
            # Only one output has an advantage: the others are skipped, their tokens stay in the denominators.
            alone = [[a if (h, j) == (g, i) else 0.0 for j, a in enumerate(other)] for h, other in enumerate(credit)]
            (part,) = gradients(learner, learner.prepare(groups, alone), passes_done=0)
            total = {name: value + part[name] for name, value in total.items()}
    assert {value.dtype for value in found.values()} == {torch.float32}
    largest = max(value.abs().max().item() for value in found.values())
    assert distance(found, total) < 1e-6 * largest, "bfloat16 sums would be 1e-3 off"
    assert all(parameter.grad is None for parameter in learner.policy.parameters())


def test_a_bfloat16_gradient_is_close_to_that_of_float32() -> None:
    narrow, wide = learning(compute_dtype=BFLOAT16), learning()
    (found,) = gradients(narrow, narrow.prepare(*step_data()), passes_done=0)
    (exact,) = gradients(wide, wide.prepare(*step_data()), passes_done=0)
    left = torch.cat([value.flatten() for value in found.values()])
    right = torch.cat([exact[name].flatten() for name in found])
    assert torch.cosine_similarity(left, right, dim=0) > 0.99


def test_masters_move_in_small_steps_and_the_policy_computes_with_their_cast() -> None:
    learner = learning(compute_dtype=BFLOAT16, rate=1e-6)
    before = {name: master.clone() for name, master in learner.master_weights().items()}
    narrow = {name: tensor.detach().clone() for name, tensor in learner.weights()}
    learn(learner, 0)
    assert 0.9e-6 < distance(before, learner.master_weights()) < 1.1e-6
    stood = torch.cat([(tensor == narrow[name]).flatten() for name, tensor in learner.weights()])
    assert stood.float().mean() > 0.99, "narrow weights alone would stand still for ever"
    for name, parameter in learner.policy.model.named_parameters():
        assert parameter.dtype == BFLOAT16
        assert torch.equal(parameter, learner.master_weights()[name].to(BFLOAT16))


def test_rotary_frequencies_stay_in_float32() -> None:
    learner = learning(compute_dtype=BFLOAT16)
    assert frequencies(learner.policy)
    for found, expected in zip(frequencies(learner.policy), frequencies(tiny_policy("qwen3")), strict=True):
        assert torch.equal(found, expected)


@both_types
def test_the_sampler_sees_the_new_weights(dtype: torch.dtype) -> None:
    learner = learning(compute_dtype=dtype, rate=0.01)
    other = tiny_policy("qwen3").to(dtype)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    learn(learner, 0)
    engine = NativeEngine(other, codec=None, max_live=4)  # type: ignore[arg-type]
    engine.load_weights(learner.weights(), learner.version)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, learner.policy.model.state_dict()[name])
        assert not torch.equal(tensor, before[name])
    assert engine.version == 1


@both_types
def test_a_reference_made_beside_a_learner_is_its_own(dtype: torch.dtype) -> None:
    learner = learning(preset="grpo", compute_dtype=dtype, rate=0.01)
    reference = learner.reference
    assert isinstance(reference, Reference)
    kept = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    batch = learner.prepare(*step_data())
    assert all(master.grad is None or not master.grad.any() for master in learner.optimizer.master_weights.values())
    learner.update(batch)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, kept[name])
    assert all(p.grad is None and not p.requires_grad for p in reference.policy.parameters())
    assert reference.policy.dtype == dtype
    assert batch.ref_logprobs_T is not None
    assert not batch.ref_logprobs_T.requires_grad


@both_types
@pytest.mark.parametrize("kind, tied", [("qwen3", True), ("llama", False), ("llama", True)])
def test_a_restored_learner_goes_on_to_the_same_bits(kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    optimizer = OptimizerSettings(1e-2, total_updates=12, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.1)
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "compute_dtype": dtype,
        "num_iterations": 2,
        "updates_per_batch": 2,
    }
    first, second = (learning(kind, tied=tied, **settings) for _ in range(2))
    learn(first, 0)
    state = first.state()
    saved = checkpoint.load(checkpoint.save(tmp_path, 1, tensors=state.tensors, state=state.values))
    learn(second, 7)
    second.restore(State({stem: saved.tensors(stem) for stem in state.tensors}, saved.state))
    assert second.version == 4
    assert distance(first.master_weights(), second.master_weights()) == 0.0
    for seed in (1, 2):
        metrics, same = learn(first, seed), learn(second, seed)
        metrics["memory/peak_bytes"] = same["memory/peak_bytes"]
        assert metrics == same
    assert distance(first.master_weights(), second.master_weights()) == 0.0
    for (name, left), (_, right) in zip(first.weights(), second.weights(), strict=True):
        assert torch.equal(left, right), name


def test_what_is_saved_is_float32_and_each_tied_weight_once() -> None:
    tensors = learning(compute_dtype=BFLOAT16).state().tensors
    assert {tensor.dtype for tensor in tensors["model"].values()} == {torch.float32}
    assert "model.embed_tokens.weight" in tensors["model"]
    assert "lm_head.weight" not in tensors["model"]
    assert tensors["optimizer"] == {}, "before the first update"


@pytest.mark.parametrize("kind, dtype", [("exact", torch.float32), ("qwen3", BFLOAT16)])
def test_activations_that_are_computed_again_give_the_same_gradient(kind: str, dtype: torch.dtype) -> None:
    stored, again = learning(kind, compute_dtype=dtype), learning(kind, compute_dtype=dtype)
    model: Any = again.policy.model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    runs: list[object] = []
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *call: runs.append(None))
    (found,) = gradients(again, again.prepare(*step_data()), passes_done=0)
    (expected,) = gradients(stored, stored.prepare(*step_data()), passes_done=0)
    assert distance(found, expected) < 1e-12
    assert len(runs) == 2, "forward, and once more in the backward pass"
