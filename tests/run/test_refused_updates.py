"""Updates whose gradient is not finite: told at once, in no version of the weights, a few of them the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import groupwise
from groupwise.commands.reward_training import train_reward_model
from groupwise.commands.session import Result
from groupwise.errors import ModelError
from groupwise.jobfile.reward_model import load_reward_job
from groupwise.learn.optimizer import REFUSED_UPDATES
from tests.run import tiny


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of the updates, from 0, whose gradient is not finite."""
    numbers: set[int] = set()
    made = iter(range(10**6))
    norm = torch.nn.utils.get_total_norm

    def total_norm(gradients: Any) -> torch.Tensor:
        return norm(gradients) * (float("nan") if next(made) in numbers else 1.0)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", total_norm)
    return numbers


def share(completions: list[str], want: list[str], **kwargs: Any) -> list[float]:
    return [text.count(letter) / max(1, len(text)) for text, letter in zip(completions, want, strict=True)]


def train(folder: Path, steps: int, **options: Any) -> Result:
    return groupwise.train(
        model=tiny.save_model(folder / "model"), data=tiny.save_rows(folder / "rows.jsonl"), reward=share,
        run=folder / "run", steps=steps, num_generations=4, prompts_per_step=2, max_completion_length=8, show="quiet",
        **options,
    )  # fmt: skip


def test_a_refused_update_is_told_of_and_is_no_version(
    tmp_path: Path, refused: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    refused |= {1}
    train(tmp_path, steps=3)
    assert [event["policy_version"] for event in tiny.events(tmp_path / "run")] == [1, 1, 2]
    assert capsys.readouterr().err.count("1 of 1 updates refused: the gradient was not finite") == 1


def test_a_run_of_refused_updates_ends_and_its_last_step_is_saved(tmp_path: Path, refused: set[int]) -> None:
    refused |= set(range(1, 100))
    with pytest.raises(ModelError, match=f"last {REFUSED_UPDATES} updates were all refused") as error:
        train(tmp_path, steps=20)
    last = 1 + REFUSED_UPDATES
    assert f"saved up to step {last}" in "".join(error.value.__notes__)
    assert [event["policy_version"] for event in tiny.events(tmp_path / "run")] == [1] * last
    refused.clear()
    assert groupwise.resume(tmp_path / "run", reward=share, show="quiet").steps == 20
    assert [event["step"] for event in tiny.events(tmp_path / "run")] == list(range(1, 21))


def test_so_does_a_short_run_of_which_every_update_was_refused(tmp_path: Path, refused: set[int]) -> None:
    refused |= {0, 1}
    with pytest.raises(ModelError, match="last 2 updates were all refused"):
        train(tmp_path, steps=2)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_reward_model_in_training_ends_so_too(
    tmp_path: Path, refused: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    refused |= set(range(2, 100))
    rows = [{"prompt": "ab", "completion": c * n, "label": c < "e"} for c in "abcdefgh" for n in range(1, 9)]
    job = load_reward_job({
        "model": str(tiny.save_model(tmp_path / "model")),
        "data": str(tiny.save_rows(tmp_path / "labelled.jsonl", rows)), "kind": "outcome",
        "run": str(tmp_path / "judge"), "batch_size": 4, "epochs": 3, "eval_share": 0.0,
    })  # fmt: skip
    with pytest.raises(ModelError, match=f"last {REFUSED_UPDATES} updates were all refused"):
        train_reward_model(job, show="quiet")
    assert f"After {REFUSED_UPDATES} refused updates" in capsys.readouterr().err
    assert len(tiny.events(tmp_path / "judge")) == 2 + REFUSED_UPDATES
    [saved] = (tmp_path / "judge" / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) == 2 + REFUSED_UPDATES
