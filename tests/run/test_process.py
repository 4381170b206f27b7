"""Jobs whose steps are scored: the same bits as outcomes where an output is one step, every preset, and resume."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import groupwise
from groupwise.config import PRESET_NAMES, Job
from groupwise.errors import RewardError
from groupwise.objective import PRESETS, process_advantages
from groupwise.run.evaluate import judge
from groupwise.run.rollouts import step_summary
from groupwise.types import Score, ScoredGroup, Step
from groupwise.watch.metrics import unknown
from groupwise.wiring.settings import objective_of
from tests.commandline import call
from tests.doubles import scored
from tests.run.command import Command
from tests.run.test_resume import assert_same_run, checkpoints
from tests.run.tiny import events, rollouts, save_model, save_rewards, save_rows

ROWS = [{"prompt": first + second} for first in "abcd" for second in "ab"]
LINES = {"overrides": ["process.segmenter=pattern", "process.pattern='[ab]'"]}
"""Steps end after each `a` and `b`: a random model writes some."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def letters(prompt: str, completion: str) -> float:
    """Long outputs with an `a` are good."""
    return completion.count("a") + len(completion) / 8


def whole(prompt: str, completion: str, steps: list[str]) -> list[float]:
    """The same of outputs that are one step."""
    assert steps == [completion]
    return [letters(prompt, completion)]


def each(prompt: str, completion: str, steps: list[str]) -> list[float | None]:
    """Short steps are good, those with a `c` are not scored."""
    return [None if "c" in step else 1.0 / len(step) for step in steps]


def train(model: Path, run: Path, **options: Any) -> None:
    settings = {
        "num_generations": 4, "max_completion_length": 8, "prompts_per_step": 2, "steps": 2, "learning_rate": 1e-3,
        "show": "quiet",
    }  # fmt: skip
    groupwise.train(**{**settings, "data": ROWS, "run": run, "model": model, **options})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(checkpoints(run)[-1] / "model.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("preset", ["grpo", "rloo", "gspo", "cispo"])
def test_outcome_and_process_are_the_same_run_where_an_output_is_one_step(
    model: Path, tmp_path: Path, preset: str
) -> None:
    """Bit for bit, a KL penalty in the loss or in the reward included."""
    common: dict[str, Any] = {"preset": preset, "beta": 0.05, "num_iterations": 2, "steps": 3, "reward": letters}
    one_step = ["process.segmenter=pattern", "process.pattern=Z"]  # which the alphabet lacks
    train(model, tmp_path / "outcome", **common)
    train(model, tmp_path / "process", **common, step_reward=whole, outcome_weight=0.0, overrides=one_step)
    assert same(weights(tmp_path / "outcome"), weights(tmp_path / "process"))
    found, expected = (rollouts(tmp_path / run) for run in ("process", "outcome"))
    for group, other in zip(found, expected, strict=True):
        for output, alike in zip(group["outputs"], other["outputs"], strict=True):
            assert output["advantage"] == alike["advantage"]
            [step] = output.pop("steps")
            assert (step["reward"], step["text"]) == (alike["reward"], alike["text"])


def test_steps_that_are_scored_and_do_not_count_change_nothing(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "without", reward=letters)
    train(model, tmp_path / "with", reward=letters, step_reward=each, process_weight=0.0, **LINES)
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))
    assert "step_reward" in events(tmp_path / "with")[-1]


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_every_preset_trains_on_steps_and_on_both(model: Path, tmp_path: Path, preset: str) -> None:
    options: dict[str, Any] = {"preset": preset, "updates_per_batch": 2, "num_iterations": 2, **LINES}
    train(model, tmp_path / "process", step_reward=each, **options)
    train(model, tmp_path / "both", reward=letters, step_reward=each, **options)
    start = load_file(model / "model.safetensors")
    ends = [weights(tmp_path / run) for run in ("process", "both")]
    assert not any(same({name: start[name] for name in end}, end) for end in ends)
    assert not same(*ends)
    for event in (*events(tmp_path / "process"), *events(tmp_path / "both")):
        assert unknown(event) == []
        assert event["grad_norm"] > 0
        assert event["steps/per_output"] > 1


def test_rollouts_hold_steps_with_their_rewards_and_advantages(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "run", step_reward=each, **LINES)
    differing = 0
    for group in rollouts(tmp_path / "run"):
        outputs = group["outputs"]
        steps = [[(step["end"], step["reward"]) for step in output["steps"]] for output in outputs]
        expected = process_advantages(steps, [output["tokens"] for output in outputs])
        for output, advantages in zip(outputs, expected, strict=True):
            found = output["advantage"]
            assert (found if isinstance(found, list) else [found] * output["tokens"]) == advantages
            ends, rewards, own, texts = zip(*(step.values() for step in by_name(output["steps"])), strict=True)
            assert list(own) == [advantages[end - 1] for end in ends]
            assert "".join(texts) == output["text"]
            assert list(rewards) == each("", "", list(texts))
            assert output["reward"] is None
            differing += isinstance(found, list)
    assert differing


def by_name(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: step[name] for name in ("end", "reward", "advantage", "text")} for step in steps]


SMALL_PASSES = {"overrides": [*LINES["overrides"], "train.tokens_per_micro_batch=16"]}


@pytest.mark.parametrize("options", [{"layout": "plain"}, SMALL_PASSES], ids=["layout", "cut"])
def test_the_layout_and_the_cut_change_no_gradient(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    train(model, tmp_path / "shared", step_reward=each, steps=1, **LINES)
    train(model, tmp_path / "other", step_reward=each, steps=1, **{**LINES, **options})
    norms = [events(tmp_path / run)[-1]["grad_norm"] for run in ("shared", "other")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert rollouts(tmp_path / "shared")[0]["outputs"] == rollouts(tmp_path / "other")[0]["outputs"]


def test_only_an_output_without_any_advantage_is_skipped(model: Path, tmp_path: Path) -> None:
    """Outputs of two steps earn in the second what they lose in the first: their first tokens have no advantage."""

    def rewards(steps: list[list[str]]) -> list[list[float]]:
        return [[-1.0, 1.0] if len(output) == 2 else [0.0] * len(output) for output in steps]

    train(model, tmp_path / "run", step_reward=rewards, beta=0.0, **LINES)
    for event in events(tmp_path / "run"):
        groups = [group for group in rollouts(tmp_path / "run") if group["step"] == event["step"]]
        outputs = [output for group in groups for output in group["outputs"]]
        silent = sum(output["tokens"] for output in outputs if output["advantage"] == 0)
        assert event["tokens/skipped"] == silent
        assert event["tokens/trained"] == sum(output["tokens"] for output in outputs) - silent > 0


@pytest.mark.parametrize(
    "options", [{"preset": "rloo"}, {"step_return": "mean", "step_normalization": "index"}], ids=str
)
def test_a_job_with_steps_goes_on_as_if_it_had_not_ended(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    run, half = tmp_path / "whole", tmp_path / "half"
    for folder in (run, half):
        train(model, folder, steps=3, reward=letters, step_reward=each, **options,
              overrides=[*LINES["overrides"], "checkpoint.every=1"])  # fmt: skip
    shutil.rmtree(half / "checkpoints/step-00000003")
    groupwise.resume(half, data=ROWS, reward=letters, step_reward=each, show="quiet")
    assert same(weights(run), weights(half))
    assert rollouts(run) == rollouts(half)


def test_a_function_from_python_has_to_be_handed_over_again(model: Path, tmp_path: Path) -> None:
    train(model, tmp_path / "run", step_reward=each, **LINES)
    with pytest.raises(RewardError, match=r"step reward function python:each .* step_reward=function"):
        groupwise.resume(tmp_path / "run", data=ROWS, show="quiet", overrides=["train.steps=3"])


JOB = """
[model]
path = "model"
[data]
path = "rows.jsonl"
[reward]
functions = ["rewards.py:share"]
step_functions = ["steps.py:score"]
[process]
segmenter = "function"
function = "steps.py:ends"
[sampling]
num_generations = 4
max_completion_length = 8
[objective]
outcome_weight = 0.5
[train]
steps = 6
prompts_per_step = 3
num_iterations = 2
learning_rate = 1e-3
[eval]
data = "rows.jsonl"
limit = 4
every = 2
[checkpoint]
every = 1
"""
STEPS = '''
"""Steps of three characters; those with the wanted letter are right."""


def ends(completion):
    return list(range(3, len(completion), 3))


def score(steps, want, **columns):
    return [[float(letter in step) for step in output] for output, letter in zip(steps, want)]
'''


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything in files, and `whole`: the run that nobody interrupts."""
    at = tmp_path_factory.mktemp("process")
    save_model(at / "model")
    save_rows(at / "rows.jsonl")
    save_rewards(at / "rewards.py")
    (at / "steps.py").write_text(STEPS)
    (at / "job.toml").write_text(JOB)
    Command(at, "train", "job.toml", "--run", "whole").end()
    return at


def test_three_steps_a_kill_and_three_steps_are_six_steps(bench: Path) -> None:
    command = Command(bench, "train", "job.toml", "--run", "half")
    command.wait_for(lambda: (bench / "half/checkpoints/step-00000003").exists())
    command.signal(signal.SIGKILL)
    command.end(-signal.SIGKILL)
    Command(bench, "resume", "half").end()
    assert_same_run(bench / "half", bench / "whole")


def test_the_events_and_the_log_tell_of_steps(bench: Path) -> None:
    first, *steps = events(bench / "whole")
    for event in steps:
        assert unknown(event) == []
        outputs = [o for g in rollouts(bench / "whole") if g["step"] == event["step"] for o in g["outputs"]]
        rewards = [step["reward"] for output in outputs for step in output["steps"]]
        assert event["step_reward"] == pytest.approx(sum(rewards) / len(rewards))
        assert event["step_rewards/score/mean"] == pytest.approx(event["step_reward"])
        assert event["steps/per_output"] == pytest.approx(len(rewards) / len(outputs))
        right = [output["steps"][0]["reward"] for output in outputs]
        assert event["steps/first_right"] == pytest.approx(sum(right) / len(right))
        assert event["steps/unscored"] == 0
        assert event["segmenter/ends/failed"] == event["step_rewards/score/failed"] == 0
    assert {"eval/step_accuracy", "eval/first_step_accuracy"} <= first.keys()
    assert unknown(first) == []


def test_an_option_of_the_command_line(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)
    options = ["--model", "model", "--data", "rows.jsonl", "--step-reward", "steps.py:score"]
    small = ["sampling.num_generations=2", "sampling.max_completion_length=6"]
    small += ["train.steps=1", "train.prompts_per_step=2"]
    sets = [part for one in (*small, "process.segmenter=pattern", "process.pattern='.'") for part in ("--set", one)]
    ended = call("train", *options, *sets, "--run", "option")
    assert ended.status == 0, ended.err
    assert " of " in ended.out
    assert "1st" in ended.out
    assert "process_weight: 1 where it is scored, else 0" in call("show", *options, *sets).out
    assert call("eval", "whole", "--step-reward", "steps.py:score").out.count("step_accuracy") == 2


def test_weights_of_credit_follow_from_what_is_scored() -> None:
    def objective(**reward: Any) -> tuple[float, float]:
        found = objective_of(Job(reward=reward))
        return found.outcome_weight, found.process_weight

    assert objective() == (1.0, 0.0)
    assert objective(step_functions=["s.py:f"]) == (1.0, 1.0)
    assert objective(functions=[], step_functions=["s.py:f"]) == (0.0, 1.0)
    job = Job(reward={"step_functions": ["s.py:f"]}, objective={"outcome_weight": 0.3, "process_weight": 0.7})
    assert objective_of(job).outcome_weight == 0.3
    assert objective_of(Job()) == replace(PRESETS["grpo"], max_completion_length=256)


def test_a_step_of_training_in_numbers_of_steps() -> None:
    assert step_summary(scored([1.0, 0.0])) == {}
    found = step_summary(with_steps([[1.0, 0.0], [None, 0.25]], [[None], [0.5, 1.0, 1.0]]))
    assert found == {
        "step_reward": pytest.approx(3.75 / 6), "steps/per_output": 2.0, "steps/first_right": 1.0,
        "steps/unscored": 1.0,
    }  # fmt: skip


def test_held_out_steps_in_numbers() -> None:
    """The first output is right by luck, the second soundly, the third is wrong."""
    found = judge(with_steps([[1.0, 0.0], [1.0, 1.0], [0.0, None]], rewards=[1.0, 1.0, 0.0]), threshold=1.0)
    assert found["step_accuracy"] == 0.5
    assert found["first_step_accuracy"] == pytest.approx(2 / 3)
    assert found["right_by_luck"] == 0.5
    nothing_right = judge(with_steps([[1.0]], rewards=[0.0]), threshold=1.0)
    assert "right_by_luck" not in nothing_right
    assert not [name for name in judge(scored([1.0, 0.0]), threshold=1.0) if "step" in name or "luck" in name]


def with_steps(*groups: list[list[float | None]], rewards: list[float] | None = None) -> list[ScoredGroup]:
    """Groups whose outputs have steps with these rewards."""
    made = []
    for group, steps in zip(scored(*[[None] * len(g) for g in groups]), groups, strict=True):
        own = rewards or [0.0] * len(steps)
        scores = [Score(r, tuple(Step(j + 1, s) for j, s in enumerate(one))) for r, one in zip(own, steps, strict=True)]
        made.append(ScoredGroup(group.group, tuple(scores)))
    return made
