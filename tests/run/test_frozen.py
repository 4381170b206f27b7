"""A model with parameters that are never trained: whatever takes up a run leaves them as the base model has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

import groupwise
from groupwise.store import checkpoint
from tests.run.tiny import save_model

FIRST_LAYER = "model.layers.0."
ROWS = [{"prompt": first + second} for first in "abcd" for second in "ef"]
ARGUMENTS: dict[str, Any] = {"data": ROWS, "reward": lambda completions, **_: [text.count("a") for text in completions]}
SETTINGS = [
    "sampling.num_generations=4", "sampling.max_completion_length=4", "train.prompts_per_step=2", "train.steps=2",
    "checkpoint.every=1", "train.learning_rate=1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("frozen") / "base")


@pytest.fixture
def freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3 as if its class left its first layer alone, as HRM's does its first state."""
    stock = Qwen3ForCausalLM.from_pretrained

    def frozen(*inputs: Any, **keywords: Any) -> Any:
        loaded = stock(*inputs, **keywords)
        loaded[0].model.layers[0].requires_grad_(False)
        return loaded

    monkeypatch.setattr(Qwen3ForCausalLM, "from_pretrained", frozen)


@pytest.mark.usefixtures("freezing")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_exported_evaluated_sampled_resumed_and_forked(base: Path, dtype: str, tmp_path: Path) -> None:
    run, fork = tmp_path / "run", tmp_path / "fork"
    groupwise.train(model=base, run=run, show="quiet", overrides=[*SETTINGS, f"model.dtype={dtype}"], **ARGUMENTS)
    saved = checkpoint.load(run / "checkpoints/step-00000002").tensors("model")
    assert not any(name.startswith(FIRST_LAYER) for name in saved)
    exported = load_file(groupwise.export(run, tmp_path / "exported") / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert exported.keys() == before.keys()
    for name, tensor in exported.items():
        assert tensor.equal(before[name] if name.startswith(FIRST_LAYER) else saved[name]), name
    assert not exported["model.layers.1.mlp.up_proj.weight"].equal(before["model.layers.1.mlp.up_proj.weight"])
    assert groupwise.sample(run, "ab")[0].token_ids
    assert "reward" in groupwise.evaluate(run, eval_data=[{"prompt": "ab"}], reward=ARGUMENTS["reward"])
    labels = groupwise.label(run, output=tmp_path / "labels.jsonl", n=2, **ARGUMENTS)
    assert labels.outputs == 16
    assert groupwise.resume(run, overrides=["train.steps=3"], show="quiet", **ARGUMENTS).steps == 3
    assert groupwise.resume(run, fork=fork, overrides=["train.steps=4"], show="quiet", **ARGUMENTS).steps == 4


@pytest.mark.usefixtures("freezing")
def test_weights_of_another_model_are_still_refused(base: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", save_model(tmp_path / "other", layers=3)
    groupwise.train(model=base, run=run, show="quiet", overrides=[*SETTINGS, "train.steps=1"], **ARGUMENTS)
    (run / "job.toml").write_text((run / "job.toml").read_text().replace(str(base), str(other)))
    with pytest.raises(groupwise.GroupwiseError, match="is of another model"):
        groupwise.export(run, tmp_path / "exported")
