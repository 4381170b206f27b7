"""Runs that train their own reward model: whole, killed inside every phase, and refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import groupwise
from groupwise.errors import ConfigError, GroupwiseError, ModelError, RewardError, RunFolderError
from groupwise.reward_models.model import Source, load_reward_model
from groupwise.watch.metrics import unknown
from tests.commandline import call
from tests.run.command import Command, KillAt
from tests.run.test_resume import assert_same_run, checkpoints
from tests.run.tiny import events, rollouts, save_model, save_rows
from tests.tiny_judges import save_judge

CHANGES = 130
"""About so many changes of files make a run."""
JOB = """
[model]
path = "model"
[data]
path = "rows.jsonl"
[reward]
functions = ["reward_model"]
verifier = ["verify.py:right"]
[reward_model]
labels = "verifier"
first_prompts = 8
prompts_per_round = 4
held_out_share = 0.3
replay = 0.3
epochs = 2
first_epochs = 1
batch_size = 8
learning_rate = 1e-3
[sampling]
num_generations = 4
max_completion_length = 8
[objective]
beta = 0.05
[train]
iterations = 2
steps = 2
prompts_per_step = 3
learning_rate = 1e-3
[eval]
data = "rows.jsonl"
limit = 4
[checkpoint]
every = 1
"""
PAIRS_JOB = JOB.replace('labels = "verifier"', 'labels = "pairs"')
STEPS_JOB = (
    JOB.replace('functions = ["reward_model"]', 'functions = []\nstep_functions = ["reward_model"]')
    .replace('labels = "verifier"', 'labels = "monte_carlo"\ncontinuations = 2\nsoft_labels = true')
    .replace("[sampling]", "[process]\nsegmenter = \"pattern\"\npattern = '[ab]'\n[sampling]")
)
VERIFY = '''
"""Outputs are right where they have more of `a` than of `b`."""


def right(completions, **kwargs):
    return [float(text.count("a") > text.count("b")) for text in completions]
'''


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what jobs need, and the runs `outcome`, `pairs` and `process` that nobody interrupts."""
    at = tmp_path_factory.mktemp("iterative")
    save_model(at / "model")
    save_rows(at / "rows.jsonl")
    (at / "verify.py").write_text(VERIFY)
    for name, job in (("outcome", JOB), ("pairs", PAIRS_JOB), ("process", STEPS_JOB)):
        (at / f"{name}.toml").write_text(job)
        Command(at, "train", f"{name}.toml", "--run", name).end()
    return at


KINDS = pytest.mark.parametrize("kind", ["outcome", "process"])


@KINDS
def test_a_run_is_worth_comparing(bench: Path, kind: str) -> None:
    told = events(bench / kind)
    assert [event.get("reward_model/round", "step") for event in told] == [
        "step",
        0,
        "step",
        "step",
        1,
        "step",
        "step",
        2,
    ]
    assert [event["step"] for event in told] == [0, 0, 1, 2, 2, 3, 4, 4]
    assert [event["iteration"] for event in told if "reward" in event] == [0, 0, 1, 1]
    assert not any(unknown(event) for event in told)
    place = "rewards" if kind == "outcome" else "step_rewards"
    versions = [event[f"{place}/reward_model/version"] for event in told if "reward" in event]
    assert versions == [1, 1, 2, 2]
    for line in rollouts(bench / kind):
        own = [output["extras"]["reward_model/version"] for output in line["outputs"]]
        assert own == [versions[line["step"] - 1]] * 4, "every score says which version gave it"
    replayed = [event["reward_model/replayed"] for event in told if "reward_model/round" in event]
    assert replayed[0] == 0
    assert min(replayed[1:]) > 0
    first, *_, last = (load_file(path / "reward_model.safetensors") for path in checkpoints(bench / kind))
    assert not all(first[name].equal(last[name]) for name in first)
    assert (checkpoints(bench / kind)[-1] / "replay.jsonl").stat().st_size > 0


@KINDS
def test_the_trained_model_is_left_as_a_folder_that_scores(bench: Path, kind: Any) -> None:
    found = load_reward_model(Source(str(bench / kind / "reward_model")), kind, device="cpu")
    assert found.version == 3
    weights = load_file(checkpoints(bench / kind)[-1] / "reward_model.safetensors")
    assert all(parameter.equal(weights[name]) for name, parameter in found.model.named_parameters())


@dataclass
class KillInside:
    """Called in a process, has it kill itself at the n-th call of `module.owner.name`, before or after it."""

    module: str
    owner: str
    name: str
    moment: int
    after: bool = False

    def __call__(self) -> None:
        import importlib

        place = importlib.import_module(self.module)
        place = getattr(place, self.owner) if self.owner else place
        function = getattr(place, self.name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.moment -= 1
            if self.moment == 0 and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*arguments, **options)
            if self.moment == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(place, self.name, counted)


LEARNER, ROUNDS = "groupwise.reward_models.learner", "groupwise.reward_models.rounds"
PHASES = {
    "before the first samples": (ROUNDS, "RewardModelRounds", "_new_examples", 1),
    "while the first outputs are labelled": ("groupwise.reward_models.labels", "", "LABELS", 1),
    "in the first round's updates": (LEARNER, "RewardLearner", "_update", 2),
    "before the first round is saved": ("groupwise.run.saving", "Saver", "round_over", 1),
    "after the first round is saved": ("groupwise.run.saving", "Saver", "round_over", 1, True),
    "in a step": ("groupwise.learn.learner", "PolicyLearner", "update", 2),
    "while an iteration's outputs are labelled": ("groupwise.reward_models.labels", "", "LABELS", 2),
    "after labels, before replay is drawn": ("groupwise.reward_models.replay", "ReplayStore", "draw", 2),
    "in the updates of an iteration's round": (LEARNER, "RewardLearner", "_update", 5),
    "before it is tried": (LEARNER, "RewardLearner", "evaluate_encoded", 4),
    "before the store takes the new examples": ("groupwise.reward_models.replay", "ReplayStore", "add", 2),
    "before the model is written": (ROUNDS, "", "save_reward_model", 2),
    "after the event, before the round is saved": ("groupwise.run.saving", "Saver", "round_over", 2),
    "after the round is saved": ("groupwise.run.saving", "Saver", "round_over", 2, True),
    "in the last round": ("groupwise.reward_models.replay", "ReplayStore", "add", 3),
}
LABELS = {
    "outcome": ("VerifierLabels", "__call__"), "pairs": ("VerifierPairs", "__call__"),
    "process": ("MonteCarloLabels", "__call__"),
}  # fmt: skip


STEPWISE = [phase for phase in PHASES if "labelled" in phase or phase.startswith("after the round")]
"""Where labels by continuations could go another way than those of a verifier."""
PAIRWISE = [phase for phase in PHASES if "updates" in phase or "replay" in phase or "labelled" in phase]
"""Where pairs could."""
PHASES_OF = {"outcome": list(PHASES), "pairs": PAIRWISE, "process": STEPWISE}


@pytest.mark.parametrize("kind, phase", [(kind, phase) for kind, phases in PHASES_OF.items() for phase in phases])
def test_killed_inside_a_phase_it_is_the_same_run(bench: Path, kind: str, phase: str) -> None:
    module, owner, name, moment, *after = PHASES[phase]
    if name == "LABELS":
        owner, name = LABELS[kind]
    run = f"{kind}-{list(PHASES).index(phase)}"
    command = Command(
        bench, "train", f"{kind}.toml", "--run", run, before=KillInside(module, owner, name, moment, bool(after))
    )
    command.end(-signal.SIGKILL)
    Command(bench, "resume", run).end()
    assert_same_run(bench / run, bench / kind)
    assert_same_reward_model(bench / run, bench / kind)
    shutil.rmtree(bench / run)


def assert_same_reward_model(found: Path, whole: Path) -> None:
    for name in ("replay.jsonl", "collected.jsonl"):
        own, other = ((checkpoints(run)[-1] / name).read_text() for run in (found, whole))
        assert own == other
    ours, theirs = (load_file(run / "reward_model/model.safetensors") for run in (found, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_in_the_middle_of_a_change(bench: Path, seed: int) -> None:
    draw, run = random.Random(seed), f"killed-{seed}"
    for _ in range(3):
        command = begin(bench, run, KillAt(draw.randrange(1, CHANGES)))
        command.process.join()
        if command.process.exitcode == 0:
            break
        assert command.process.exitcode == -signal.SIGKILL, command.error
    begin(bench, run).end()
    assert_same_run(bench / run, bench / "outcome")
    assert_same_reward_model(bench / run, bench / "outcome")


def begin(at: Path, run: str, before: Callable[[], None] | None = None) -> Command:
    if (at / run / "job.toml").exists():
        return Command(at, "resume", run, before=before)
    return Command(at, "train", "outcome.toml", "--run", run, before=before)


def test_asked_to_stop_inside_a_round_it_saves_what_the_round_did(bench: Path) -> None:
    command = Command(bench, "train", "outcome.toml", "--run", "stopped", before=StopInside(5))
    command.end(128 + signal.SIGTERM)
    state = json.loads((checkpoints(bench / "stopped")[-1] / "state.json").read_text())
    assert state["rounds"]["done"] == 1
    assert state["rounds"]["learner"]["done"] > 0, "some updates of the round are made"
    Command(bench, "resume", "stopped").end()
    assert_same_run(bench / "stopped", bench / "outcome")
    assert_same_reward_model(bench / "stopped", bench / "outcome")


@dataclass
class StopInside:
    """Has its process asked to stop at the n-th update of the reward model."""

    moment: int

    def __call__(self) -> None:
        from groupwise.reward_models.learner import RewardLearner

        update = RewardLearner._update

        def counted(learner: RewardLearner, batch: Any) -> Any:
            self.moment -= 1
            if self.moment == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(learner, batch)

        RewardLearner._update = counted  # type: ignore[method-assign]


def right(prompt: str, completion: str) -> float:
    return float(completion.count("a") > completion.count("b"))


def train(bench: Path, run: Path, **options: Any) -> groupwise.Result:
    settings: dict[str, Any] = {
        "model": bench / "model", "data": bench / "rows.jsonl", "reward": "reward_model", "verifier": right, "run": run,
        "labels": "verifier", "first_prompts": 4, "prompts_per_round": 2, "held_out_share": 0.3, "steps": 1,
        "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 8, "beta": 0.0, "show": "quiet",
    }  # fmt: skip
    return groupwise.train(**settings | options)


def test_from_python_with_a_verifier_and_functions_beside_the_model(bench: Path, tmp_path: Path) -> None:
    def short(prompt: str, completion: str) -> float:
        return -float(len(completion))

    options = {"reward": [short, "reward_model"], "overrides": ["reward.weights=[0.25, 2.0]"]}
    found = train(bench, tmp_path / "run", eval_data=bench / "rows.jsonl", **options)
    assert found.eval_before is not None
    for line in rollouts(tmp_path / "run"):
        for output in line["outputs"]:
            parts = output["parts"]
            assert output["reward"] == pytest.approx(0.25 * parts["short"] + 2.0 * parts["reward_model"])
            assert output["extras"]["reward_model/right"] == pytest.approx(
                float(torch.sigmoid(torch.tensor(parts["reward_model"]))), abs=1e-6
            )
    assert groupwise.evaluate(tmp_path / "run", reward=lambda prompt, completion: 0.5)["reward"] == 0.5
    with pytest.raises(RewardError, match=r"verifier python:right .* groupwise\.resume\(run, verifier=function\)"):
        groupwise.resume(tmp_path / "run", reward=short)


def test_held_out_outputs_are_judged_by_the_verifier(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never by the model in training: the reward of an evaluation is 0 or 1."""
    monkeypatch.chdir(bench)
    found = groupwise.evaluate(bench / "outcome")
    assert found["reward"] == found["accuracy"]
    assert "step_accuracy" not in groupwise.evaluate(bench / "process"), "nor are its steps"


def test_a_completer_of_its_own_has_its_own_tokens(bench: Path, tmp_path: Path) -> None:
    """Its alphabet is another one, so every output is read anew, and none of the policy's ids reaches it."""
    save_model(tmp_path / "completer", alphabet="hgfedcba \n")
    steps = ["process.segmenter=pattern", "process.pattern='[ab]'"]
    options: dict[str, Any] = {
        "reward": None,
        "step_reward": "reward_model",
        "labels": "monte_carlo",
        "overrides": steps,
    }
    train(bench, tmp_path / "run", completer=str(tmp_path / "completer"), continuations=2, **options)
    lines = (checkpoints(tmp_path / "run")[-1] / "replay.jsonl").read_text().splitlines()
    for line in lines:
        row = json.loads(line)[2]
        assert all(set(step) <= set("abcdefgh \n") for step in row["completions"])
        assert all(tried in (0, 1, 2) for tried in row["tried"])


def test_a_model_that_is_trained_already_needs_no_first_round(bench: Path, tmp_path: Path) -> None:
    save_judge(tmp_path / "judge", "outcome")
    train(bench, tmp_path / "run", first_prompts=0, overrides=[f"reward_model.path={tmp_path / 'judge'}"])
    told = [event["reward_model/round"] for event in events(tmp_path / "run") if "reward_model/round" in event]
    assert told == [1]
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM, and a reward model of kind outcome"):
        train(bench, tmp_path / "b", first_prompts=0, overrides=[f"reward_model.path={bench / 'model'}"])


def test_a_fork_with_another_reward_model_is_refused(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's is of another shape."""
    save_judge(tmp_path / "wide", "outcome", intermediate_size=48)
    change = f"reward_model.path={tmp_path / 'wide'}"
    monkeypatch.chdir(bench)
    with pytest.raises(RunFolderError, match="The checkpoint is of another reward model: kind outcome"):
        groupwise.resume(bench / "outcome", fork=tmp_path / "other", overrides=[change, "train.iterations=3"])
    with pytest.raises(ConfigError, match="would not be the same run"):
        groupwise.resume(bench / "outcome", overrides=[change])


@pytest.mark.parametrize(
    "kind, labels, holds, makes",
    [("outcome", "pairs", "single outputs", "pairs"), ("pairs", "verifier", "pairs", "single outputs")],
)
def test_a_fork_with_labels_of_another_form_is_refused(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, labels: str, holds: str, makes: str
) -> None:
    """At once, not when the first round meets what it replays."""
    monkeypatch.chdir(bench)
    with pytest.raises(RunFolderError, match=rf'earlier examples that are {holds}, .* "{labels}" makes {makes}: one'):
        groupwise.resume(
            bench / kind, fork=tmp_path / "other", overrides=[f"reward_model.labels={labels}", "train.iterations=3"]
        )


def test_a_reward_model_that_returns_nan_ends_the_run(bench: Path, tmp_path: Path) -> None:
    save_judge(tmp_path / "judge", "outcome")
    weights = load_file(tmp_path / "judge/model.safetensors")
    weights["score.weight"].fill_(float("nan"))
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "judge/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GroupwiseError, match=r"reward_model.*nan|not finite"):
        train(bench, tmp_path / "run", first_prompts=0, overrides=[f"reward_model.path={tmp_path / 'judge'}"])


def test_a_verifier_that_scores_nothing_leaves_nothing_to_train_on(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(GroupwiseError, match="nothing to learn from: none of 16 outputs has a label"):
        train(bench, tmp_path / "run", verifier=lambda prompt, completion: None)


def test_other_commands_know_the_model_in_training(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench)
    assert call("show", "outcome.toml").status == 0
    assert "rewards" in call("doctor", "outcome.toml").out
    assert call("label", "process", "--output", str(tmp_path / "labels.jsonl"), "--limit", "2").status == 0
    assert call("eval", "process").status == 0
