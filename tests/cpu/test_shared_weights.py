"""Weights in memory that processes share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from groupwise.cpu.shared_weights import SharedWeights, share
from tests.learn.tiny import tiny_policy


def test_weights_are_the_same_objects_with_the_same_numbers() -> None:
    model = tiny_policy("llama").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    assert SharedWeights(model).hold(model)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight, "what is tied stays so"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_process_writes_what_this_one_reads() -> None:
    module = nn.Linear(3, 2)
    module.register_buffer("count", torch.zeros((), dtype=torch.long))
    SharedWeights(module)
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            module.weight.fill_(7.0)
            module.count.add_(3)  # type: ignore[operator]
        os._exit(0)
    os.waitpid(child, 0)
    assert module.weight.eq(7.0).all()
    assert module.count == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_type_and_shape_will_do(dtype: torch.dtype, tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Embedding(7, 2)}).to(dtype)
    module.register_buffer("nothing", torch.empty(0, dtype=dtype))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert SharedWeights(module).hold(module)
    save_file(dict(module.state_dict()), tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    assert all(
        torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def test_a_weight_that_was_moved_is_noticed() -> None:
    module = nn.Linear(3, 2)
    shared = share(module)
    assert share(module) is shared
    with torch.no_grad():
        module.bias.add_(1)
    assert shared.hold(module)
    module.bias.data = module.bias.data.clone()
    assert not shared.hold(module)
    assert share(module) is not shared
    assert share(module) is share(module)
