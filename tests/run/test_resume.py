"""Interrupted anyhow and taken up again, a run is the same run, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.run.command import Command, KillAt
from tests.run.tiny import events, rollouts, save_model, save_rewards, save_rows

STEPS = 6
CHANGES = 160
"""About so many changes of files make a run."""
JOB = """
[model]
path = "model"
[data]
path = "rows.jsonl"
[reward]
functions = ["rewards.py:share"]
[sampling]
num_generations = 4
max_completion_length = 8
[objective]
beta = 0.05
[train]
iterations = 2
steps = 3
prompts_per_step = 3
num_iterations = 2
updates_per_batch = 2
learning_rate = 1e-3
lr_scheduler_type = "cosine"
[eval]
data = "held-out.jsonl"
limit = 4
every = 2
[checkpoint]
every = 1
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, a reward, a job, and `whole`: the run that nobody interrupts."""
    at = tmp_path_factory.mktemp("resume")
    save_model(at / "model")
    save_rows(at / "rows.jsonl")
    save_rows(at / "held-out.jsonl", [{"prompt": letter * 3, "want": "a"} for letter in "abcdef"])
    save_rewards(at / "rewards.py")
    (at / "job.toml").write_text(JOB)
    train(at, "whole").end()
    return at


def train(at: Path, run: str, *more: str, before: Callable[[], None] | None = None) -> Command:
    return Command(at, "train", "job.toml", "--run", run, *more, before=before)


def resume(at: Path, run: str, *more: str) -> Command:
    return Command(at, "resume", run, *more)


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-????????"))


def without_clock(event: dict[str, Any]) -> dict[str, Any]:
    """An event but for what no two processes share."""
    return {
        name: value
        for name, value in event.items()
        if not name.startswith(("time/", "memory/")) and name != "tokens/per_second"
    }


def assert_same_run(found: Path, whole: Path) -> None:
    """Weights, Adam's moments, the reference, counters, events and rollouts: all of it to the bit."""
    last = checkpoints(whole)[-1]
    assert [path.name for path in checkpoints(found)] == [path.name for path in checkpoints(whole)]
    for file in (*sorted(last.glob("*.safetensors")), whole / "checkpoints/best/model.safetensors"):
        ours, theirs = load_file(found / file.relative_to(whole)), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs), file.name
    states = [json.loads((run / last.relative_to(whole) / "state.json").read_text()) for run in (found, whole)]
    for state in states:
        del state["clock"]
    assert states[0] == states[1]
    assert list(map(without_clock, events(found))) == list(map(without_clock, events(whole)))
    assert rollouts(found) == rollouts(whole)
    results = [json.loads((run / "result.json").read_text()) for run in (found, whole)]
    assert [result["eval_after"] for result in results] == [results[1]["eval_after"]] * 2


def test_the_run_is_worth_comparing(bench: Path) -> None:
    whole = bench / "whole"
    assert [event["step"] for event in events(whole)] == list(range(STEPS + 1))
    assert {path.name for path in checkpoints(whole)[-1].iterdir()} == {
        "manifest.json", "state.json", "job.toml", "model.safetensors", "optimizer.safetensors",
        "reference.safetensors",
    }  # fmt: skip
    first, *_, last = (load_file(path / "model.safetensors") for path in checkpoints(whole))
    assert not all(first[name].equal(last[name]) for name in first)
    assert all(event["updates"] == 4 for event in events(whole)[1:])
    assert events(whole)[2]["ratio/max"] > 1, "several updates of one batch"
    assert events(whole)[3]["kl"] > 0


def test_three_steps_a_kill_and_three_steps_are_six_steps(bench: Path) -> None:
    run = bench / "half"
    command = train(bench, "half")
    command.wait_for(lambda: (run / "checkpoints/step-00000003").exists())
    command.signal(signal.SIGKILL)
    command.end(-signal.SIGKILL)
    assert not (run / "result.json").exists()
    said = resume(bench, "half").end()
    assert "resumed after step" in said
    assert_same_run(run, bench / "whole")


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_in_the_middle_of_a_change(bench: Path, seed: int) -> None:
    """Of job, event, groups, weights, manifest, the names of checkpoints, or in a cutting back of all that."""
    draw, run = random.Random(seed), bench / f"killed-{seed}"
    for _ in range(3):
        kill = KillAt(draw.randrange(1, CHANGES))
        command = begin(bench, run.name, before=kill)
        command.process.join()
        if command.process.exitcode == 0:
            break
        assert command.process.exitcode == -signal.SIGKILL, command.error
    begin(bench, run.name).end()
    assert_same_run(run, bench / "whole")


def begin(at: Path, run: str, before: Callable[[], None] | None = None) -> Command:
    """What a person types: there is a run to resume, or there is none yet."""
    kind = ["resume", run] if (at / run / "job.toml").exists() else ["train", "job.toml", "--run", run]
    return Command(at, *kind, before=before)


def test_a_damaged_checkpoint_is_passed_over(bench: Path) -> None:
    run = bench / "damaged"
    shutil.copytree(bench / "whole", run)
    newest = checkpoints(run)[-1]
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    command = resume(bench, "damaged")
    command.end()
    assert f"/damaged/checkpoints/{newest.name} cannot be used" in command.error
    assert "step-00000005 is used instead" in command.error
    shutil.rmtree(newest.with_name(newest.name + ".damaged"))
    assert_same_run(run, bench / "whole")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_lets_the_step_finish_and_saves_it(bench: Path, number: signal.Signals, status: int) -> None:
    run = bench / f"stopped-{status}"
    command = train(bench, run.name, "--set", "checkpoint.every=0")
    command.wait_for(lambda: "step 2/6" in command.output)
    command.signal(number)
    said = command.end(status)
    step = events(run)[-1]["step"]
    assert 2 <= step < STEPS
    assert said.splitlines()[-1] == f"stopped after step {step} of 6; go on with: groupwise resume {run.name}"
    assert "stopping after this step" in said
    assert command.error == ""
    assert [path.name for path in checkpoints(run)] == [f"step-{step:08d}"]
    assert not (run / "result.json").exists()
    resume(bench, run.name, "--set", "checkpoint.every=1").end()
    assert_same_run(run, bench / "whole")


SLOW_REWARD = """
import pathlib, time

def slow(prompt, completion):
    pathlib.Path("scoring").touch()
    time.sleep(3600)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once(bench: Path, number: signal.Signals, status: int) -> None:
    """Here in the middle of a reward that would take an hour."""
    (bench / "slow.py").write_text(SLOW_REWARD)
    (bench / "scoring").unlink(missing_ok=True)
    options = ["--set", 'reward.functions=["slow.py:slow"]', "--set", "eval.limit=1"]
    command = train(bench, f"at-once-{status}", *options)
    command.wait_for((bench / "scoring").exists)
    command.signal(number)
    command.wait_for(lambda: "once more to stop at once" in command.output)
    command.signal(number)
    command.end(status)  # long before the reward would be done
    assert "Traceback" not in command.error
    assert "warning: stopped at once; no step is lost; " in command.error, "it was the evaluation before the first"
    assert command.error.strip().endswith(f"go on with: groupwise resume at-once-{status}")


def test_without_a_checkpoint_a_run_starts_over(bench: Path) -> None:
    run = bench / "early"
    command = train(bench, "early", before=KillAt(12))
    command.process.join()
    assert not checkpoints(run)
    assert "there is no checkpoint yet: starting over" in resume(bench, "early").end()
    assert_same_run(run, bench / "whole")
