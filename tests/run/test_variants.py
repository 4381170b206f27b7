"""Every kind of job makes its steps, and the same ones when it is taken up again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import groupwise
from groupwise.commands.session import Result
from groupwise.config import PRESET_NAMES
from groupwise.watch.metrics import unknown
from tests.run.tiny import events, rollouts, save_model

ROWS = [{"prompt": first + second} for first in "abcd" for second in "ab"]


def letters(prompt: str, completion: str) -> float:
    """Long outputs with an `a` are good."""
    return completion.count("a") + len(completion) / 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def train(model: Path, run: Path, **options: Any) -> Result:
    settings = {
        "num_generations": 4, "max_completion_length": 6, "prompts_per_step": 2, "steps": 2, "learning_rate": 1e-3,
        "show": "quiet",
    }  # fmt: skip
    given = {"data": ROWS, "reward": letters, "run": run, "model": model}
    return groupwise.train(**{**settings, **given, **options})


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_every_preset_trains(model: Path, tmp_path: Path, preset: str) -> None:
    run = tmp_path / "run"
    train(model, run, preset=preset, updates_per_batch=2, num_iterations=2, prompts_per_step=3)
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(run / "checkpoints/step-00000002/model.safetensors"),
    )
    assert not all(before[name].equal(after[name]) for name in after)
    for event in events(run):
        assert unknown(event) == []
        assert event["updates"] == 4
        assert event["grad_norm"] > 0
        assert ("kl" in event) == (preset in ("grpo", "deepseekmath"))
        assert ("reward/kl_penalty" in event) == (preset == "rloo")
    penalty = events(run)[1].get("reward/kl_penalty", 0.0)
    outputs = [output for group in rollouts(run) if group["step"] == 2 for output in group["outputs"]]
    charged = [output["parts"]["letters"] - output["reward"] for output in outputs]
    assert sum(charged) / len(charged) == pytest.approx(penalty), "the rewards that advantages came from are kept"
    assert (max(map(abs, charged)) > 0) == (preset == "rloo")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"layout": "plain"},
        {"gradient_checkpointing": True},
        {"preset": "rloo"},
        {"shuffle": False, "stop": ["a"], "mask_truncated_completions": True},
        {"lr_scheduler_type": "linear", "warmup_steps": 3, "weight_decay": 0.1, "importance_sampling": "token_mask"},
    ],
    ids=lambda options: ",".join(options),
)
def test_any_kind_of_job_goes_on_as_if_it_had_not_ended(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Its last checkpoint is lost, and with it the last step."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    train(model, whole, steps=3, **options)
    train(model, half, steps=3, overrides=["checkpoint.every=1"], **options)
    shutil.rmtree(half / "checkpoints/step-00000003")
    groupwise.resume(half, data=ROWS, reward=letters, show="quiet")
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-00000003/{name}.safetensors"
        ours, theirs = load_file(half / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert rollouts(half) == rollouts(whole)


def test_one_question_twice_in_a_step_is_two_groups(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "run", data=ROWS[:1], steps=1)
    first, second = rollouts(tmp_path / "run")
    assert (first["slot"], second["slot"]) == (0, 1)
    assert first["prompt_id"] == second["prompt_id"]
    texts = [[output["text"] for output in group["outputs"]] for group in (first, second)]
    assert texts[0] != texts[1]


def test_what_is_decoded_together_changes_no_draw(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "together")
    train(model, tmp_path / "apart", overrides=["sampling.max_live_outputs=3", "train.tokens_per_micro_batch=16"])
    both = [
        [[output["text"] for output in group["outputs"]] for group in rollouts(tmp_path / run) if group["step"] == 1]
        for run in ("together", "apart")
    ]
    assert both[0] == both[1]


def test_two_runs_of_one_seed_are_the_same_and_another_seed_is_not(model: Path, tmp_path: Path) -> None:
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(model, tmp_path / run, seed=seed)
    assert rollouts(tmp_path / "a") == rollouts(tmp_path / "b") != rollouts(tmp_path / "c")
