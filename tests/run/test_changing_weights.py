"""A model that divides its weights in eval mode (RWKV), through a run: what is saved is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import RwkvConfig, RwkvForCausalLM

import groupwise
from groupwise.demo.model import character_tokenizer
from tests.run.tiny import ALPHABET, save_rewards, save_rows


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rwkv")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = character_tokenizer(ALPHABET)
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=len(tokenizer), hidden_size=16, attention_hidden_size=16, num_hidden_layers=3, rescale_every=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    RwkvForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = save_rows(folder / "rows.jsonl")
    return {
        "model": str(folder / "model"), "data": str(rows), "reward": f"{save_rewards(folder / 'rewards.py')}:share",
        "eval_data": str(rows), "max_completion_length": 5, "num_generations": 3, "prompts_per_step": 2,
        "learning_rate": 1e-3, "device": "cpu", "show": "quiet",
    }  # fmt: skip


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def test_checkpoints_hold_the_weights_that_are_trained(tmp_path: Path, job: dict[str, Any]) -> None:
    """An evaluation comes before the step is saved, and at a rate near 0 nothing else moves them."""
    groupwise.train(
        run=tmp_path / "still", overrides=["train.steps=1", "eval.limit=2"], **job | {"learning_rate": 1e-12}
    )
    before, after = load_file(Path(job["model"]) / "model.safetensors"), saved(tmp_path / "still", 1)
    shared = before.keys() & after.keys()
    assert len(shared) > 20
    assert max((before[name] - after[name]).abs().max().item() for name in shared) < 1e-6


def test_a_resumed_run_is_the_same_run(tmp_path: Path, job: dict[str, Any]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    groupwise.train(run=whole, overrides=["train.steps=3", "eval.limit=2", "eval.every=1"], **job)
    groupwise.train(run=cut, overrides=["train.steps=2", "eval.limit=2", "eval.every=1"], **job)
    groupwise.resume(cut, overrides=["train.steps=3"], show="quiet")
    expected, found = saved(whole, 3), saved(cut, 3)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
