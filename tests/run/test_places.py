"""Where a run is and what it reads, whatever its folder is called and wherever a reward takes the process."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

import groupwise
from groupwise.errors import ConfigError, RewardError
from groupwise.rewards.base import RewardContext
from groupwise.rewards.functions.load import load_reward
from groupwise.types import Completion, Group, GroupKey, Prompt
from tests.commandline import call
from tests.run.tiny import events, save_model, save_rewards, save_rows

SMALL: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "prompts_per_step": 2, "show": "quiet"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("places")
    save_model(at / "model")
    save_rows(at / "rows.jsonl")
    save_rewards(at / "rewards.py")
    return at


@pytest.fixture
def at(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a reward, which is where we are."""
    shutil.copytree(bench, tmp_path / "at")
    monkeypatch.chdir(tmp_path / "at")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "at"


def wandering(prompt: str, completion: str, want: str) -> float:
    """A reward that leaves the process somewhere else."""
    os.chdir(tempfile.gettempdir())
    return float(completion.count(want))


def test_a_reward_that_changes_the_working_folder_moves_nothing(at: Path) -> None:
    elsewhere = {path.name for path in Path(tempfile.gettempdir()).iterdir()}
    result = groupwise.train(
        model="model", data="rows.jsonl", eval_data="rows.jsonl", reward=wandering, run="runs/mine", steps=3,
        overrides=["checkpoint.every=1", "watch.rollouts_max_bytes=1000"], **SMALL,
    )  # fmt: skip
    assert Path.cwd() == Path(tempfile.gettempdir()).resolve()
    run = at / "runs/mine"
    assert result.run == "runs/mine"
    assert [event["step"] for event in events(run)] == [0, 1, 2, 3]
    assert {path.name for path in run.glob("checkpoints/*")} == {"best", "step-00000002", "step-00000003"}
    assert (run / "result.json").is_file()
    assert "runs" not in {path.name for path in Path(tempfile.gettempdir()).iterdir()} - elsewhere


def test_a_worker_begins_anew_where_it_began(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (at / "dies.py").write_text(
        "import os, pathlib\n\ndef score(completions, **kw):\n"
        "    if 'end' in completions:\n        os._exit(1)\n"
        "    return [float(pathlib.Path('here').read_text())] * len(completions)\n"
    )
    (at / "here").write_text("7")
    reward = load_reward("dies.py:score")
    monkeypatch.chdir(tmp_path)

    def scored(text: str) -> Any:
        group = Group(GroupKey(1, 0, "0"), Prompt("0", "q", (1,)), (Completion((1,), text, (0.0,), "stop"),))
        context = RewardContext(step=0, total_steps=1, warn=lambda message: None)
        return [list(values) for values in reward([group], context)]

    try:
        assert scored("a") == [[7.0]]
        assert scored("end") == [[None]]
        assert scored("a") == [[7.0]], "the file is found again, and so is what it reads"
    except RewardError as error:
        raise AssertionError(str(error)) from error
    finally:
        reward.close()  # type: ignore[attr-defined]


def test_a_run_in_the_home_folder_is_there(at: Path, tmp_path: Path) -> None:
    options = {**SMALL, "steps": 1}
    (tmp_path / "rewards.py").write_text((at / "rewards.py").read_text())
    result = groupwise.train(
        model="~/at/model", data="~/at/rows.jsonl", reward="~/rewards.py:share", run="~/mine", **options
    )
    assert result.run == str(tmp_path / "mine")
    assert events(tmp_path / "mine")
    assert not (at / "~").exists()
    assert groupwise.resume("~/mine", overrides=["train.steps=2"], show="quiet").steps == 2
    assert len(groupwise.sample("~/mine", "ab")) == 1
    assert call("sample", "~/mine", "ab").status == 0


@pytest.mark.parametrize("name", ["", " "])
def test_a_folder_without_a_name_is_refused(at: Path, name: str) -> None:
    before = sorted(at.iterdir())
    with pytest.raises(ConfigError, match="`run` is empty"):
        groupwise.train(model="model", data="rows.jsonl", reward="rewards.py:share", run=name, **SMALL)
    ended = call("train", "--run", name)
    assert ended.status == 2
    assert "`run` is empty" in ended.err
    save_rows(at / "labels.jsonl", [{"prompt": "a", "completion": "b", "label": 1}])
    ended = call(
        "reward-model", "train", "--kind", "outcome", "--model", "model", "--data", "labels.jsonl", "--run", name
    )
    assert ended.status == 2
    assert "`run` is empty" in ended.err
    (at / "labels.jsonl").unlink()
    assert sorted(at.iterdir()) == before
