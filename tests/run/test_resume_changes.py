"""What may change when a run is taken up again, and what a fork is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import groupwise
from groupwise.commands.session import Result
from groupwise.errors import ConfigError, DataError, GroupwiseError, RewardError, RunFolderError
from groupwise.jobfile import load_job, resumable_keys
from tests.run.tiny import CONTEXT, events, save_model, save_rewards, save_rows

SMALL: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 8,
    "prompts_per_step": 2,
    "learning_rate": 1e-3,
    "show": "plain",
    "beta": 0.0,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, a reward, and `done`: a run of four steps, evaluated."""
    at = tmp_path_factory.mktemp("changes")
    save_model(at / "model")
    save_rows(at / "rows.jsonl")
    save_rows(at / "other.jsonl", [{"prompt": letter, "want": "b"} for letter in "abcd"])
    save_rewards(at / "rewards.py")
    train(at, at / "done", steps=4, iterations=1, eval_data=at / "other.jsonl")
    return at


def train(at: Path, run: Path, **options: Any) -> Result:
    given = {"model": at / "model", "data": at / "rows.jsonl", "reward": f"{at}/rewards.py:share"}
    return groupwise.train(run=run, **{**SMALL, **given, **options})


@pytest.fixture
def done(bench: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(bench / "done", tmp_path / "run"))


def last_weights(run: Path) -> Any:
    return load_file(max(run.glob("checkpoints/step-????????")) / "model.safetensors")


def contents(run: Path) -> dict[Path, bytes]:
    """A run's files, without those that every process writes to."""
    return {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and path.suffix != ".log"}


def same(left: Any, right: Any) -> bool:
    return all(left[name].equal(right[name]) for name in left)


def test_a_finished_run_stays_as_it_is(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = events(done), last_weights(done), json.loads((done / "result.json").read_text())
    result = groupwise.resume(done, show="plain")
    assert events(done) == before[0]
    assert same(last_weights(done), before[1])
    assert (result.steps, result.stopped_by) == (4, None)
    assert (result.eval_reward_before, result.eval_reward_after) == (
        before[2]["eval_reward_before"], before[2]["eval_reward_after"],
    )  # fmt: skip
    assert "held-out reward" in capsys.readouterr().out.splitlines()[-1]


def test_a_finished_run_goes_on_with_more_steps(bench: Path, done: Path, tmp_path: Path) -> None:
    """As one that had them from the start, but for the evaluation that was the last."""
    result = groupwise.resume(done, overrides=["train.steps=6"], show="plain")
    assert result.steps == 6
    whole = tmp_path / "whole"
    train(bench, whole, steps=6, eval_data=bench / "other.jsonl")
    assert same(last_weights(done), last_weights(whole))
    assert [event["reward"] for event in events(done)[1:]] == [event["reward"] for event in events(whole)[1:]]
    assert [event["step"] for event in events(done) if "eval/reward" in event] == [0, 4, 6]


def test_changes_are_printed(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groupwise.resume(done, overrides=["train.steps=5", "checkpoint.keep=1"], show="plain")
    said = capsys.readouterr().out
    assert "train.steps: 4 -> 5\n" in said
    assert "checkpoint.keep: 2 -> 1\n" in said
    assert "resumed after step 4 of 5\n" in said
    assert load_job(done / "job.toml").job.train.steps == 5, "the next resume needs no word of it"


def test_json_mode_prints_nothing_but_events(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groupwise.resume(done, overrides=["train.steps=5"], show="json")
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [5]


def test_what_would_make_it_another_run_is_refused(done: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        groupwise.resume(done, overrides=["train.learning_rate=0.5", "seed=3", "train.steps=9"])
    said = str(caught.value)
    assert "seed: 0 -> 3" in said
    assert "train.learning_rate: 0.001 -> 0.5" in said
    assert "train.steps: 4" not in said, "that one may change"
    assert all(key in said for key in resumable_keys())
    assert "--fork" in said
    assert load_job(done / "job.toml").job.seed == 0


def test_iterations_that_are_over_cannot_move(bench: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(bench, run, iterations=2, steps=2)
    with pytest.raises(ConfigError, match="step 4, so with 3 instead of 2 iterations that are over"):
        groupwise.resume(run, overrides=["train.steps=3"])
    assert groupwise.resume(run, overrides=["train.iterations=3"], show="plain").steps == 6


def test_a_fork_is_a_run_of_its_own(bench: Path, done: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    before = (done / "result.json").read_text()
    changes = ["train.learning_rate=0.5", f"data.path='{bench}/other.jsonl'", "objective.beta=0.1", "train.steps=6"]
    result = groupwise.resume(done, fork=fork, overrides=changes, show="plain")
    assert [event["step"] for event in events(fork)] == [4, 5, 6], "where it starts from, and its own steps"
    assert events(fork)[1]["learning_rate"] == 0.5
    assert events(fork)[2]["kl"] > 0, "against the policy at the fork"
    assert result.eval_reward_before == events(fork)[0]["eval/reward"], "its baseline is where it starts"
    assert same(load_file(fork / "checkpoints/step-00000004/model.safetensors"), last_weights(done))
    assert (done / "result.json").read_text() == before
    assert len(events(done)) == 5, "the run that it came from stays as it was"


def test_a_fork_with_the_same_job_goes_on_as_the_run_would(done: Path, tmp_path: Path) -> None:
    groupwise.resume(done, fork=tmp_path / "fork", overrides=["train.steps=6"], show="plain")
    groupwise.resume(done, overrides=["train.steps=6"], show="plain")
    assert same(last_weights(tmp_path / "fork"), last_weights(done))


def test_a_fork_is_resumed_from_its_own_start(done: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    groupwise.resume(done, fork=fork, overrides=["train.steps=5", "train.learning_rate=0.01"], show="plain")
    whole = last_weights(fork)
    shutil.rmtree(fork / "checkpoints/step-00000005")
    result = groupwise.resume(fork, show="plain")
    assert [event["step"] for event in events(fork)] == [4, 5]
    assert same(last_weights(fork), whole)
    assert result.eval_reward_before == events(fork)[0]["eval/reward"]


def test_a_fork_does_not_write_into_another_run(done: Path, bench: Path) -> None:
    with pytest.raises(RunFolderError, match="holds a run already"):
        groupwise.resume(done, fork=bench / "done")


def test_nothing_can_be_forked_without_a_checkpoint(done: Path, tmp_path: Path) -> None:
    shutil.rmtree(done / "checkpoints")
    with pytest.raises(RunFolderError, match="no checkpoint to fork from"):
        groupwise.resume(done, fork=tmp_path / "fork")
    assert not (tmp_path / "fork").exists()


def test_another_model_in_the_same_place_is_refused(bench: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", Path(shutil.copytree(bench / "model", tmp_path / "model"))
    train(bench, run, model=model, steps=1)
    save_model(model, hidden=64, max_length=CONTEXT)
    before = events(run)
    with pytest.raises(RunFolderError, match=r"is of another model: its .* is \[\d+(, \d+)?\], that of this job's"):
        groupwise.resume(run, overrides=["train.steps=2"], show="plain")
    assert events(run) == before
    assert last_weights(run)


def test_other_prompts_in_the_same_place_are_refused(bench: Path, tmp_path: Path) -> None:
    data = Path(shutil.copy(bench / "rows.jsonl", tmp_path))
    train(bench, tmp_path / "run", data=data, steps=1)
    shutil.copy(bench / "other.jsonl", data)
    with pytest.raises(DataError, match="made on other prompts than these"):
        groupwise.resume(tmp_path / "run", overrides=["train.steps=2"], show="plain")


def test_nothing_is_cut_for_a_checkpoint_that_cannot_be_taken_up(bench: Path, tmp_path: Path) -> None:
    """The newest is damaged, the one before it of other data: all stays, and goes on once the data are back."""
    data = Path(shutil.copy(bench / "rows.jsonl", tmp_path))
    run = tmp_path / "run"
    train(bench, run, data=data, steps=3, overrides=["checkpoint.every=1"])
    whole = last_weights(run)
    (run / "checkpoints/step-00000003/model.safetensors").unlink()
    before = contents(run)
    shutil.copy(bench / "other.jsonl", data)
    with pytest.raises(DataError, match="made on other prompts than these"):
        groupwise.resume(run, overrides=["train.steps=4"], show="plain")
    assert contents(run) == before
    shutil.copy(bench / "rows.jsonl", data)
    groupwise.resume(run, show="plain")
    assert same(last_weights(run), whole)


def test_objects_from_python_are_handed_over_again(bench: Path, tmp_path: Path) -> None:
    def lengthy(prompt: str, completion: str) -> float:
        return len(completion) / 8

    rows = [{"prompt": letter} for letter in "abc"]
    run = tmp_path / "run"
    train(bench, run, data=rows, reward=lengthy, steps=1)
    with pytest.raises(RewardError, match="python:lengthy was handed over from Python"):
        groupwise.resume(run, overrides=["train.steps=2"], show="plain")
    with pytest.raises(DataError, match="hand it over again: data=rows"):
        groupwise.resume(run, overrides=["train.steps=2"], reward=lengthy, show="plain")
    assert groupwise.resume(run, overrides=["train.steps=2"], reward=lengthy, data=rows, show="plain").steps == 2


HOLD = """
import fcntl, json, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(json.dumps({"pid": os.getpid(), "host": "here"}))
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_share_a_run(done: Path) -> None:
    command = [sys.executable, "-c", HOLD, done / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = events(done)
        with pytest.raises(GroupwiseError, match=rf"is in use by process {other.pid} on here"):
            groupwise.resume(done, overrides=["train.steps=9"], show="plain")
        assert events(done) == before
        assert load_job(done / "job.toml").job.train.steps == 4
        other.communicate("")
    assert groupwise.resume(done, show="plain").steps == 4
