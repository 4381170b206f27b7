"""The run folder: who may write, what is refused, and how it goes back to a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupwise.errors import RunFolderError
from groupwise.store import checkpoint
from groupwise.store.events import EventsFile, RolloutsFile, read
from groupwise.store.folder import RunFolder, git_commit
from groupwise.types import Completion, Group, GroupKey, Prompt, Score, ScoredGroup

HOLD = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def begun(path: Path) -> RunFolder:
    folder = RunFolder.create(path)
    folder.write_job("seed = 1\n")
    sink = EventsFile(folder.events)
    sink.write({"step": 1})
    sink.close()
    return folder


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "mine")
    folder.write_job("seed = 1\n")
    assert RunFolder.open(tmp_path / "runs" / "mine") == folder
    assert folder.best == folder.checkpoints / "best"


def test_a_run_that_has_begun_is_not_overwritten(tmp_path: Path) -> None:
    begun(tmp_path / "mine")
    with pytest.raises(RunFolderError, match=r"mine holds a run already.*`groupwise resume .*mine`.*--run"):
        RunFolder.create(tmp_path / "mine")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"Cannot write .*file: not a directory"):
        RunFolder.create(tmp_path / "file")


def test_a_job_that_failed_before_its_first_event_frees_its_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    with folder.lock():
        folder.write_job("seed = 1\n")
        EventsFile(folder.events).close()
    assert RunFolder.create(tmp_path / "mine") == folder


@pytest.mark.parametrize("made, found", [(False, "does not exist"), (True, "has no job.toml")])
def test_what_is_no_run_is_not_opened(tmp_path: Path, made: bool, found: str) -> None:
    if made:
        (tmp_path / "mine").mkdir()
    with pytest.raises(RunFolderError, match=f"mine is not a run: it {found}"):
        RunFolder.open(tmp_path / "mine")


def test_a_second_lock_names_the_first_and_is_free_again_after_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    with folder.lock(), pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on "), folder.lock():
        pass
    with folder.lock():
        assert json.loads(folder.lock_file.read_text())["pid"] == os.getpid()


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    with pytest.raises(ZeroDivisionError), folder.lock():
        raise ZeroDivisionError
    with folder.lock():
        pass


def test_another_process_is_named_and_the_lock_is_free_when_it_is_killed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    command = [sys.executable, "-c", HOLD, str(folder.lock_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        message = f"mine is in use by process {holder.pid} on elsewhere"
        with pytest.raises(RunFolderError, match=message), folder.lock():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with folder.lock():
            pass


def test_a_lock_that_nobody_signed_still_counts(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    with folder.lock():
        folder.lock_file.write_text("")
        with pytest.raises(RunFolderError, match="in use by another process"), folder.lock():
            pass


def test_taking_the_lock_clears_what_a_kill_left(tmp_path: Path) -> None:
    folder = begun(tmp_path / "mine")
    (folder.checkpoints / "step-00000003.partial").mkdir(parents=True)
    with folder.lock():
        assert list(folder.checkpoints.iterdir()) == []


def test_the_job_comes_back_as_written(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    job = {"seed": 1, "train": {"learning_rate": 1e-6, "max_grad_norm": float("inf")}, "stop": ["a", "é\n"]}
    folder.write_job(job | {"model": {"revision": None, "path": "x"}})
    assert folder.read_job() == job | {"model": {"path": "x"}}


def test_an_unreadable_job_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    folder.write_job("seed = ")
    with pytest.raises(RunFolderError, match=r"Cannot read the job of this run, .*job\.toml: "):
        folder.read_job()


def test_the_result_is_strict_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    folder.write_result({"eval_after": 0.83, "eval_before": float("nan"), "commit": None})
    assert json.loads(folder.result.read_text()) == {"eval_after": 0.83, "eval_before": None, "commit": None}
    assert [path.name for path in folder.path.iterdir()] == ["result.json"]


def test_a_result_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "mine")
    folder.write_result({"eval_after": 0.83})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"result\.json: no space left on device"):
        folder.write_result({"eval_after": 0.9})
    assert json.loads(folder.result.read_text()) == {"eval_after": 0.83}
    assert [path.name for path in folder.path.iterdir()] == ["result.json"]


def ran(path: Path, steps: int, every: int) -> RunFolder:
    """A run of so many steps, with a checkpoint every so often."""
    folder = RunFolder.create(path)
    folder.write_job("seed = 1\n")
    go_on(folder, range(steps + 1), every)
    return folder


def go_on(folder: RunFolder, steps: range, every: int) -> None:
    events, rollouts = EventsFile(folder.events), RolloutsFile(folder.rollouts, 1_000)
    completion = Completion((1, 2), "four", (-0.1, -0.2), "stop")
    for step in steps:
        group = Group(GroupKey(step, 0, "17"), Prompt("17", "2+2", (5,)), (completion,))
        events.write({"step": step, "reward": step / 10})
        rollouts.write(step, [ScoredGroup(group, (Score(1.0),))], [[0.0]])
        if step and step % every == 0:
            tensors = {"model": {"weight": torch.full((2,), float(step))}}
            checkpoint.save(folder.checkpoints, step, tensors=tensors, state={})
    events.close()
    rollouts.close()


def contents(folder: RunFolder) -> dict[str, bytes]:
    files = (path for path in folder.path.rglob("*") if path.is_file())
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in files}


def test_cutting_back_and_going_on_gives_the_folder_of_a_run_without_interruption(tmp_path: Path) -> None:
    whole, killed = ran(tmp_path / "whole", 9, every=3), ran(tmp_path / "killed", 5, every=3)
    killed.write_result({"eval_after": 0.1})
    with killed.events.open("a") as file:
        file.write('{"step": 6, "re')
    killed.cut_back(3)
    assert [event["step"] for event in read(killed.events)] == [0, 1, 2, 3]
    go_on(killed, range(4, 10), every=3)
    assert contents(killed) == contents(whole)


def test_cutting_back_to_the_start_leaves_no_event(tmp_path: Path) -> None:
    folder = ran(tmp_path / "mine", 2, every=3)
    folder.cut_back(None)
    assert list(read(folder.events)) == []
    assert not folder.rollouts.exists()


def test_cutting_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    folder = ran(tmp_path / "mine", 6, every=3)
    (folder.checkpoints / "step-00000006" / "manifest.json").unlink()
    folder.cut_back(3)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["step-00000003", "step-00000006.damaged"]


def test_the_commit_is_that_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None, "outside a repository"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_commit() is None, "before the first commit"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert len(str(git_commit())) == 40
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None, "without git"
