"""Training a reward model from the command line: it learns, it is taken up again to the bit, it is used."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import groupwise
from groupwise.commands.reward_training import train_reward_model
from groupwise.errors import RunFolderError
from groupwise.jobfile.reward_model import load_reward_job
from groupwise.learn.optimizer import OptimizerSettings
from groupwise.reward_models.examples import load_examples
from groupwise.reward_models.export import save_reward_model
from groupwise.reward_models.learner import RewardLearner, RewardLearnerSettings
from groupwise.reward_models.text import Output, prompt_of, rows_of
from groupwise.watch.metrics import unknown
from groupwise.watch.panel import draw_svg
from tests.commandline import call
from tests.run.command import Command, KillAt
from tests.run.tiny import events, save_rows
from tests.run.tiny import save_model as save_backbone
from tests.tiny_judges import pupil

PROMPTS = [a + b for a in "abcdefgh" for b in "abcdefgh"]
LABELLED = [
    {"prompt": p, "completion": letter * n, "label": int(letter in "abcd")}
    for p in PROMPTS
    for n, letter in ((1, "b"), (2, "f"), (3, "d"), (1, "h"))
]
PAIRS = [{"prompt": p, "chosen": "ab", "rejected": c} for p in PROMPTS for c in ("cd", "ef gh")]
STEPS = [
    {"prompt": p, "completions": ["ab", x * 2, "c"], "labels": [True, x < "e", x < "e"]} for p in PROMPTS for x in "bg"
]
DATA = {"labels": LABELLED, "pairs": PAIRS, "steps": STEPS}
KINDS = {"labels": "outcome", "pairs": "outcome", "steps": "process"}
UPDATES = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, data in each format, and `whole`: a run that nobody interrupts."""
    at = tmp_path_factory.mktemp("reward-models")
    save_backbone(at / "backbone")
    for name, rows in DATA.items():
        save_rows(at / f"{name}.jsonl", rows)
    train(at, "whole").end()
    return at


def options(name: str = "labels", **more: Any) -> list[str]:
    """Options of a short run on one of the data sets."""
    knobs = {"batch_size": 40, "eval_every": 2, "checkpoint_every": 1, "learning_rate": 3e-3} | more
    given = ["--kind", KINDS[name], "--model", "backbone", "--data", f"{name}.jsonl"]
    return given + [part for key, value in knobs.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def train(at: Path, run: str, before: Callable[[], None] | None = None) -> Command:
    return Command(at, "reward-model", "train", *options(), "--run", run, before=before)


def begin(at: Path, run: str, before: Callable[[], None] | None = None) -> Command:
    """What a person types: there is a run to resume, or there is none yet."""
    if (at / run / "job.toml").exists():
        return Command(at, "resume", run, before=before)
    return train(at, run, before)


def assert_same_run(found: Path, whole: Path) -> None:
    """Weights, Adam's moments, counters, events, the saved model: all of it to the bit."""
    last = sorted(whole.glob("checkpoints/step-????????"))[-1]
    for file in (*sorted(last.glob("*.safetensors")), whole / "model" / "model.safetensors"):
        ours, theirs = load_file(found / file.relative_to(whole)), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs), file.name
    states = [json.loads((run / last.relative_to(whole) / "state.json").read_text()) for run in (found, whole)]
    told = [
        [{k: v for k, v in one.items() if not k.startswith("time/")} for one in events(run)] for run in (found, whole)
    ]
    for state in states:
        del state["seconds"]
    assert states[0] == states[1]
    assert told[0] == told[1]


@pytest.mark.parametrize("name", DATA)
def test_it_learns_what_can_be_told_apart(bench: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(bench)
    quick = {"checkpoint_every": 0, "eval_every": 0}
    ended = call("reward-model", "train", *options(name, epochs=4, batch_size=16, **quick), "--run", f"learned-{name}")
    assert ended.status == 0, ended.err
    result = json.loads((bench / f"learned-{name}" / "result.json").read_text())
    assert result["after"]["accuracy"] > 0.9
    assert result["after"]["loss"] < 0.3 * result["before"]["loss"]
    assert result["model_version"] == 1
    expected = {"loss", "accuracy", "auc", "calibration_error"}
    assert result["after"].keys() >= expected | ({"step_f1", "first_error_found"} if name == "steps" else set())
    assert "accuracy" in ended.out
    assert ended.out.splitlines()[-1].startswith("held-out accuracy")


def test_the_run_folder_is_that_of_any_run(bench: Path) -> None:
    run = bench / "whole"
    assert {path.name for path in run.iterdir()} == {
        "job.toml", "events.jsonl", "checkpoints", "model", "result.json", "lock",
    }  # fmt: skip
    told = events(run)
    assert [event["step"] for event in told] == list(range(UPDATES + 1))
    assert all(unknown(event) == [] for event in told)
    evaluated = [event["step"] for event in told if "reward_model/eval/accuracy" in event]
    assert evaluated == [0, 2, 4, 6]
    assert told[-1]["reward_model/epoch"] == 1.0
    assert "accuracy" in draw_svg(told, total_steps=UPDATES, title="whole")
    assert "Held out: loss" in (run / "model" / "README.md").read_text()


def test_what_is_saved_is_an_ordinary_folder_with_the_same_scores(bench: Path) -> None:
    folder = bench / "whole" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert json.loads((folder / "reward_model.json").read_text()) == {"kind": "outcome", "version": 1}
    weights = load_file(sorted(bench.glob("whole/checkpoints/step-*"))[-1] / "reward_model.safetensors")
    assert all(tensor.equal(weights[name]) for name, tensor in model.named_parameters())


def test_a_process_reward_model_keeps_its_separator(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)
    asked = options("steps", separator=" \n", eval_share=0, eval_every=0)
    assert call("reward-model", "train", *asked, "--run", "prm").status == 0
    card = json.loads((bench / "prm/model/reward_model.json").read_text())
    assert card == {"kind": "process", "version": 1, "separator": " \n"}
    assert AutoModelForTokenClassification.from_pretrained(bench / "prm/model").config.num_labels == 2
    ended = call(
        "reward-model", "train", "--kind", "process", "--model", "prm/model", "--data", "steps.jsonl", "--run", "prm-2"
    )
    assert ended.status == 0
    again = json.loads((bench / "prm-2/model/reward_model.json").read_text())
    assert again == {"kind": "process", "version": 2, "separator": " \n"}


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_is_the_same_run(bench: Path, seed: int) -> None:
    draw, run = random.Random(seed), bench / f"killed-{seed}"
    for _ in range(3):
        command = begin(bench, run.name, KillAt(draw.randrange(1, 90)))
        command.process.join()
        if command.process.exitcode == 0:
            break
        assert command.process.exitcode == -signal.SIGKILL, command.error
    begin(bench, run.name).end()
    assert_same_run(run, bench / "whole")


def test_a_signal_lets_the_update_finish_and_saves_it(bench: Path) -> None:
    run = bench / "stopped"
    command = train(bench, "stopped")
    command.wait_for(lambda: "step 2/6" in command.output)
    command.signal(signal.SIGTERM)
    said = command.end(143).splitlines()[-1]
    assert said == f"stopped after update {events(run)[-1]['step']} of 6; go on with: groupwise resume stopped"
    assert not (run / "model").exists()
    assert "resumed after update" in Command(bench, "resume", "stopped").end()
    assert_same_run(run, bench / "whole")


def test_checkpoints_come_by_time_too(bench: Path) -> None:
    """So short a time that every update takes longer; what is trained is the same."""
    run = bench / "by-time"
    knobs = options(checkpoint_every=0, checkpoint_minutes=1e-9)
    command = Command(bench, "reward-model", "train", *knobs, "--run", run.name, before=KillAt(30))
    command.process.join()
    assert len(list(run.glob("checkpoints/step-????????"))) >= 1
    Command(bench, "resume", run.name).end()
    assert_same_run(run, bench / "whole")


def test_a_finished_run_that_is_resumed_stays_as_it_is(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)
    shutil.copytree(bench / "whole", bench / "again")
    shutil.rmtree(bench / "again" / "model")
    assert call("resume", "again").status == 0
    assert_same_run(bench / "again", bench / "whole")


def test_half_precision_trains_its_masters(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved are the float32 weights, not what they were rounded to."""
    monkeypatch.chdir(bench)
    ended = call("reward-model", "train", *options(dtype="bfloat16"), "--run", "narrow")
    assert ended.status == 0, ended.err
    weights = load_file(bench / "narrow/model/model.safetensors")["score.weight"]
    assert weights.dtype == torch.float32
    assert not weights.bfloat16().float().equal(weights)


def test_saving_leaves_the_one_that_trains_as_it_is(bench: Path, tmp_path: Path) -> None:
    model = pupil(bench / "backbone", "outcome")
    model.stored_dtype = torch.bfloat16
    learner = RewardLearner(model, RewardLearnerSettings(OptimizerSettings(1e-3, 10)))
    before = learner.score_outputs([Output("a", "b")])
    for _ in range(2):  # an older one is replaced
        save_reward_model(learner, tmp_path / "model")
    assert learner.score_outputs([Output("a", "b")]) == before
    assert model.model.dtype == torch.float32
    assert load_file(tmp_path / "model" / "model.safetensors")["score.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_prompt_is_on_both_sides(bench: Path, tmp_path: Path) -> None:
    from groupwise.commands.reward_training import NOTHING, _examples

    job = load_reward_job({"kind": "outcome", "model": "backbone", "data": str(bench / "labels.jsonl")})
    train_set, held_out = _examples(job, NOTHING)
    prompts = [{prompt_of(one) for one in side} for side in (train_set, held_out)]
    assert prompts[0] & prompts[1] == set()
    assert len(train_set) + len(held_out) == len(LABELLED)
    assert 0 < len(held_out) < len(LABELLED) / 4
    texts = load_examples([{"chosen": "a", "rejected": "b"}], "outcome")
    assert (prompt_of(texts[0]), rows_of(texts[0])[0].prompt) == ("a", "")


def test_it_is_used_as_a_reward(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, then named by its run folder, for outputs and for steps."""
    monkeypatch.chdir(bench)
    if not (bench / "prm").exists():
        assert call("reward-model", "train", *options("steps"), "--run", "prm").status == 0
    save_rows(bench / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:8]])
    small = {
        "sampling.num_generations": 4, "sampling.max_completion_length": 8, "train.prompts_per_step": 2,
        "train.steps": 2, "objective.beta": 0.0,
    }  # fmt: skip
    knobs = [part for key, value in small.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    named = ["--reward", "model:whole", "--step-reward", "model:prm"]
    ended = call("train", "--model", "backbone", "--data", "prompts.jsonl", *named, *knobs, "--run", "policy")
    assert ended.status == 0, ended.err
    [first, _] = events(bench / "policy")
    assert first["rewards/whole/version"] == 1.0
    assert first["step_rewards/prm/version"] == 1.0
    assert unknown(first) == []
    output = json.loads((bench / "policy/rollouts.jsonl").read_text().splitlines()[0])["outputs"][0]
    assert output["extras"].keys() == {"whole/version", "prm/version", "whole/right", "prm/right"}
    assert output["extras"]["prm/right"] == output["steps"][-1]["reward"], "of an output, what the last step earns"
    assert output["extras"]["whole/version"] == output["extras"]["prm/version"] == 1
    assert output["parts"]["whole"] == output["reward"]
    assert all(0 < step["reward"] < 1 for step in output["steps"])


def test_a_policy_that_learns_from_a_model_is_resumed_to_the_bit(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores depend in their last bits on what they are computed beside, so nothing may be remembered from before."""
    monkeypatch.chdir(bench)
    save_rows(bench / "few.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:3]])
    knobs = {
        "sampling.num_generations": 4, "sampling.max_completion_length": 4, "train.prompts_per_step": 3,
        "train.learning_rate": 1e-2, "objective.beta": 0.0,
    }  # fmt: skip
    given = [part for key, value in knobs.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    given += ["--model", "backbone", "--data", "few.jsonl", "--reward", "model:whole"]
    assert call("train", *given, "--set", "train.steps=6", "--run", "straight").status == 0
    assert call("train", *given, "--set", "train.steps=3", "--run", "halved").status == 0
    assert call("resume", "halved", "--set", "train.steps=6").status == 0
    ours, theirs = (
        load_file(bench / run / "checkpoints/step-00000006/model.safetensors") for run in ("straight", "halved")
    )
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    rewards = [[event["reward"] for event in events(bench / run)] for run in ("straight", "halved")]
    assert rewards[0] == rewards[1]


def refused(ended: Any, *said: str) -> None:
    assert ended.status == 2, ended
    [paragraph] = ended.err.split("groupwise: ")[1:]
    for part in said:
        assert part in paragraph


@pytest.mark.parametrize(
    "more, said",
    [
        (["--kind", "both"], ["`kind` takes one of `outcome`, `process`"]),
        (["--set", "epoch=2"], ["no key `epoch`", "Did you mean `epochs`?"]),
        (["--set", "eval_share=1"], ["`eval_share` takes a number, at least 0, less than 1"]),
        (["--set", 'separator="#"'], ["`separator` has no effect with --kind outcome"]),
        (["--set", "eval_share=0.9999"], ["would be held out"]),
        (["--set", "max_length=2"], ["were left out, the first because", "at most 2 fit"]),
        (["--data", "steps.jsonl"], ["These columns are for --kind process"]),
        (["--data", "nothing.jsonl"], ["There is no file 'nothing.jsonl'"]),
        (["--model", "nowhere/at/all"], ["is no folder"]),
        (["--run", "whole"], ["holds a run already"]),
    ],
)
def test_bad_input_is_one_paragraph(bench: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said) -> None:
    monkeypatch.chdir(bench)
    refused(call("reward-model", "train", *options(), "--run", "refused", *more), *said)


@pytest.mark.parametrize("held_out, left", [(["a" * 99], 0), (["a" * 99, "a"], 1)])
def test_held_out_examples_that_cannot_be_read_are_counted_and_left_out(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: list[str], left: int
) -> None:
    monkeypatch.chdir(bench)
    save_rows(tmp_path / "held.jsonl", [{"prompt": text, "completion": "b", "label": 1} for text in held_out])
    given = options(eval_data=str(tmp_path / "held.jsonl"), max_length=40)
    ended = call("reward-model", "train", *given, "--run", str(tmp_path / "run"))
    assert ended.status == 0, ended.err
    [warning] = [line for line in ended.err.splitlines() if "left out" in line]
    assert "1 held-out examples were left out, the first because: " in warning
    assert "at most 40 fit" in warning
    assert ("none is left: nothing tells how good the model is" in warning) == (left == 0)
    assert f"{left} held out" in ended.out + ended.err
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert bool(result["after"]) == bool(left)


ODD = {
    "nothing held out": ([{"prompt": "a", "completion": "b", "label": i} for i in (0, 1)], "no example is held out"),
    "one label": ([{"prompt": c, "completion": "b", "label": 1} for c in "abcdefgh"], "labels are 1: there is nothing"),
    "equal pairs": ([{"prompt": c, "chosen": "a", "rejected": "a"} for c in "abcdefgh"], "pairs have the same text"),
}


@pytest.mark.parametrize("name", ODD)
def test_data_from_which_little_can_be_learned_is_remarked_on(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(bench)
    rows, said = ODD[name]
    given = options(data=str(save_rows(tmp_path / "rows.jsonl", rows)))
    ended = call("reward-model", "train", *given, "--run", str(tmp_path / "run"))
    assert ended.status == 0, ended.err
    assert said in ended.err


@pytest.mark.parametrize(
    "more", [["--set", "max_length=2"], ["--model", "nowhere/at/all"], ["--data", "nothing.jsonl"]]
)
def test_what_is_refused_leaves_no_folder(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.chdir(bench)
    assert call("reward-model", "train", *options(), "--run", str(tmp_path / "run"), *more).status == 2
    assert not (tmp_path / "run").exists()


def test_what_may_not_change_when_it_is_resumed(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)
    refused(call("resume", "whole", "--set", "learning_rate=1.0"), "with another learning_rate")
    refused(call("resume", "whole", "--fork", "other"), "which is not forked")
    refused(call("reward-model", "train", "--kind", "outcome", "--model", "backbone"), "needs --data")


def test_from_python_rows_are_handed_over(bench: Path, tmp_path: Path) -> None:
    from groupwise.commands.reward_training import RewardData

    job = load_reward_job(
        {"kind": "outcome", "model": str(bench / "backbone"), "data": "python:rows", "run": str(tmp_path / "run")},
        ["learning_rate=3e-3"],
    )
    result = train_reward_model(job, given=RewardData(rows=LABELLED, eval_rows=LABELLED[:8]), show="quiet")
    assert result.updates == -(-len(LABELLED) // 32)
    assert result.after.keys() >= {"accuracy", "auc"}
    with pytest.raises(RunFolderError, match="holds a run already"):
        train_reward_model(job, given=RewardData(rows=LABELLED))


def test_python_trains_one_like_the_command_line(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same job by rows of Python: the same weights, whose folder scores."""
    monkeypatch.chdir(bench)
    knobs: dict[str, Any] = {"batch_size": 40, "eval_every": 2, "checkpoint_every": 1, "learning_rate": 3e-3}
    found = groupwise.train_reward_model(
        "outcome", model=bench / "backbone", data=LABELLED, run=bench / "python", show="quiet", **knobs
    )
    assert found.model == str(bench / "python" / "model")
    ours, theirs = (load_file(bench / run / "model" / "model.safetensors") for run in ("python", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_python_is_told_what_a_reward_models_job_lacks(bench: Path) -> None:
    with pytest.raises(groupwise.GroupwiseError, match="A reward model's job has no key `steps`"):
        groupwise.train_reward_model("outcome", model=bench / "backbone", data=LABELLED, steps=3)
    with pytest.raises(groupwise.GroupwiseError, match="data"):
        groupwise.train_reward_model("outcome", model=bench / "backbone", data=7)  # type: ignore[arg-type]
