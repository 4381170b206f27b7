"""A model cast to bfloat16 has every tensor in the type in which its stock class has it, and computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from groupwise.learn.optimizer import MasterOptimizer, OptimizerSettings
from groupwise.models.cast import cast_to_compute_dtype
from groupwise.models.clone import tiny_clone
from groupwise.models.head import HeadShape
from groupwise.models.policy import silence_dropout
from tests.tiny_models import GROUPS, policy_of, stock_logprobs

BFLOAT16 = torch.bfloat16
KINDS = {
    "llama": HeadShape(),
    "mamba": HeadShape(),  # a body that adds up in float32
    "falcon_mamba": HeadShape(),  # norms with weights that are buffers
    "xglm": HeadShape(),  # positions in a buffer
    "openai-gpt": HeadShape(),  # a mask in a buffer
    "minimax": HeadShape(),  # persistent buffers of its linear attention
    "ernie4_5_moe": None,  # a router that stays in float32
}


def narrowed(kind: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    model = tiny_clone(CONFIG_MAPPING[kind]())
    silence_dropout(model)
    return model, cast_to_compute_dtype(model, BFLOAT16)


@pytest.mark.parametrize("kind", KINDS)
def test_types_are_those_of_the_stock_class(kind: str, tmp_path: Path) -> None:
    tiny_clone(CONFIG_MAPPING[kind]()).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BFLOAT16)
    types = {name: t.dtype for name, t in [*stock.named_parameters(), *stock.named_buffers()]}
    model, _ = narrowed(kind)
    assert {name: t.dtype for name, t in [*model.named_parameters(), *model.named_buffers()]} == types
    assert BFLOAT16 in types.values()


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_run_and_are_near_the_stock_class(kind: str) -> None:
    model = tiny_clone(CONFIG_MAPPING[kind]())
    silence_dropout(model)
    with torch.no_grad():
        expected, _ = stock_logprobs(model, GROUPS)
    policy = policy_of(model, "plain", KINDS[kind])
    optimizer = MasterOptimizer(policy.model, OptimizerSettings(1e-3, 1), BFLOAT16)
    found = policy(policy.stream(GROUPS)).logprobs_T
    assert (found - expected).abs().mean() < 0.15
    found.sum().backward()
    before = {name: master.clone() for name, master in optimizer.master_weights.items()}
    norm, _ = optimizer.step()
    assert 0 < norm < float("inf")
    assert any(not before[name].equal(master) for name, master in optimizer.master_weights.items())
    assert all(master.dtype == torch.float32 for master in optimizer.master_weights.values())


def test_persistent_buffers_are_kept_as_they_were() -> None:
    model = tiny_clone(CONFIG_MAPPING["minimax"]())
    wide = {name: buffer.clone() for name, buffer in model.named_buffers() if name in model.state_dict()}
    optimizer = MasterOptimizer(model, OptimizerSettings(1e-3, 1), BFLOAT16)
    assert optimizer.buffers.keys() == wide.keys() != set()
    assert all(wide[name].equal(buffer) for name, buffer in optimizer.buffers.items())
    assert any(not wide[name].equal(model.state_dict()[name].float()) for name in wide), "casting loses something"


def test_float32_stays_as_it_is() -> None:
    model = tiny_clone(CONFIG_MAPPING["minimax"]())
    assert cast_to_compute_dtype(model, torch.float32) == {}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
