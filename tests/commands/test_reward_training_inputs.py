"""A reward model's training that is resumed after something beside it was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from groupwise.commands.reward_training import resume_reward_model, train_reward_model
from groupwise.errors import ConfigError, DataError
from groupwise.jobfile.reward_model import load_reward_job
from tests.run.tiny import events, save_model, save_rows

ROWS = [{"prompt": a, "completion": b, "label": int(b == "a")} for a in "abcdefgh" for b in "ab"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("inputs")
    save_model(at / "model")
    save_rows(at / "labels.jsonl", ROWS)
    save_rows(at / "held.jsonl", [{"prompt": "ab", "completion": "a", "label": 1}])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        options = {"kind": "outcome", "model": "model", "data": "labels.jsonl", "eval_data": "held.jsonl", "run": "run"}
        train_reward_model(load_reward_job({**options, "batch_size": 8, "checkpoint_every": 1}), show="quiet")
    return at


@pytest.fixture
def at(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, killed after its first update."""
    shutil.copytree(bench, tmp_path / "at")
    monkeypatch.chdir(tmp_path / "at")
    shutil.rmtree("run/checkpoints/step-00000002")
    return tmp_path / "at"


def test_where_nothing_changed_it_goes_on(at: Path, bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume_reward_model("run", show="quiet")
    assert capsys.readouterr().err == ""
    after = [json.loads((where / "run/result.json").read_text())["after"] for where in (at, bench)]
    assert after[0] == after[1]


@pytest.mark.parametrize("file", ["labels.jsonl", "held.jsonl"])
def test_other_examples_are_refused(at: Path, file: str) -> None:
    rows = [json.loads(line) for line in (at / file).read_text().splitlines()]
    rows[0]["label"] = 1 - rows[0]["label"]
    save_rows(at / file, rows)
    before = events(at / "run")
    with pytest.raises(DataError, match=rf"since step 1 what .* \({file}\) has changed.*or start a new run"):
        resume_reward_model("run", show="quiet")
    assert events(at / "run") == before


def test_an_edited_job_is_refused(at: Path) -> None:
    text = (at / "run/job.toml").read_text()
    (at / "run/job.toml").write_text(text.replace("learning_rate = 2e-05", "learning_rate = 0.5"))
    with pytest.raises(ConfigError, match=r"job\.toml of this run was edited since update 1 .*another learning_rate"):
        resume_reward_model("run", show="quiet")


def test_lines_that_are_gone_are_said(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (at / "run/events.jsonl").read_text().splitlines(keepends=True)
    (at / "run/events.jsonl").write_text("".join(lines[1:]))
    resume_reward_model("run", show="quiet")
    assert "events.jsonl has 1 lines up to step 1, and had 2 when that was saved" in capsys.readouterr().err
