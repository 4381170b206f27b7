"""Special tokens inside outputs, such as some models' `<think>`: what rewards, steps and files see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import groupwise
from groupwise.demo.model import character_tokenizer
from tests.run.tiny import ALPHABET, events, rollouts, save_model, save_rows

THINK, OVER = "<think>", "</think>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that mostly writes its two special tokens, and sometimes an end."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.add_special_tokens({"additional_special_tokens": [THINK, OVER]})
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)  # tied: logits are all about the same
    model.save_pretrained(folder)
    return folder


def train(model: Path, run: Path, **options: Any) -> list[str]:
    """What the reward was shown in a step."""
    seen: list[str] = []

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(ids) + index) for index, ids in enumerate(completion_ids)]

    groupwise.train(
        model=str(model), data=str(save_rows(run.with_suffix(".jsonl"))), reward=reward, run=str(run), steps=1,
        num_generations=8, prompts_per_step=2, max_completion_length=8, **options,
    )  # fmt: skip
    return seen


def test_rewards_and_rollouts_see_special_tokens_and_it_is_said_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = train(model, tmp_path / "run")
    assert any(THINK in text for text in seen)
    assert any(OVER in text for text in seen)
    assert not any("<end>" in text or "<pad>" in text for text in seen)
    assert [output["text"] for group in rollouts(tmp_path / "run") for output in group["outputs"]] == seen
    said = capsys.readouterr().err
    assert said.count("outputs hold special tokens") == 1
    assert f"({THINK}, {OVER})" in said
    assert "part of the text that rewards and rollouts.jsonl see" in said


def test_they_can_be_left_out_and_that_is_said_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"overrides": ["sampling.skip_special_tokens=true"]}
    seen = train(model, tmp_path / "run", **options)
    assert not any(THINK in text or OVER in text for text in seen)
    assert "do not see them (sampling.skip_special_tokens is true)" in capsys.readouterr().err


def test_steps_are_cut_in_the_text_with_special_tokens(model: Path, tmp_path: Path) -> None:
    def last(completion: str, steps: list[str]) -> list[float]:
        assert "".join(steps) == completion
        assert all(step.endswith(OVER) for step in steps[:-1])
        return [float(len(step)) for step in steps]

    groupwise.train(
        model=str(model), data=str(save_rows(tmp_path / "rows.jsonl")), step_reward=last, run=str(tmp_path / "run"),
        steps=1, num_generations=8, prompts_per_step=2, max_completion_length=8, show="quiet",
        overrides=["process.segmenter=pattern", f"process.pattern='{OVER}'"],
    )  # fmt: skip
    outputs = [output for group in rollouts(tmp_path / "run") for output in group["outputs"]]
    assert max(len(output["steps"]) for output in outputs) > 1
    assert events(tmp_path / "run")
