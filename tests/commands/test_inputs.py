"""What is quick to tell is told before torch is imported, hence before a model is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from groupwise.commands import inputs
from groupwise.config import Job
from groupwise.errors import DataError, GroupwiseError
from groupwise.jobfile import to_toml

ASK = """
import json, sys
from tests.commandline import call
heavy = {"torch", "transformers", "datasets"}
for arguments in json.loads(sys.stdin.read()):
    before = heavy & sys.modules.keys()
    ended = call(*arguments)
    print(json.dumps([*ended, sorted((heavy & sys.modules.keys()) - before)]))
"""
"""Runs commands one after another in a process, and says after each what it has imported."""

OWN = ["--model", "org/name", "--data", "rows.jsonl", "--reward", "rewards.py:score"]
GRADED = ["--kind", "outcome", "--model", "org/name"]


class Case(NamedTuple):
    arguments: list[str]
    said: str


CASES = [
    Case(["train", "--stepps", "3"], "No such option"),
    Case(["train", "--learning-rate", "1e-5"], "--learning-rate is no option; a key is given by --set section.key"),
    Case(["train", "--num_train_epochs=3"], "key=value. Training is counted in steps, not in epochs: `train.steps`"),
    Case(["train", *OWN, "--quiet", "--json"], "--quiet and --json cannot go together"),
    Case(["train", *OWN, "--set", "train.max_steps=3"], "Did you mean `train.steps`?"),
    Case(["train", *OWN, "--run", "full"], "full is not empty and holds no run"),
    Case(["train", *OWN, "--run", "begun"], "begun holds a run already"),
    Case(["train", *OWN, "--model", "./nowhere"], "The model ./nowhere is no folder"),
    Case(["train", *OWN, "--model", "full"], "The model full cannot be loaded. It holds no model"),
    Case(["train", *OWN, "--model", "begun"], "It is a run: write its weights as a model with `groupwise export begun"),
    Case(["train", *OWN, "--data", "none.jsonl"], "There is no file 'none.jsonl'"),
    Case(["train", *OWN, "--data", "./none"], "There is no file or folder './none'"),
    Case(["train", *OWN, "--data", "broken.jsonl"], "broken.jsonl, line 1 is not valid JSON"),
    Case(["train", *OWN, "--data", "list.jsonl"], "list.jsonl, line 1 has to be a JSON object"),
    Case(["train", *OWN, "--data", "empty.jsonl"], "empty.jsonl has no rows"),
    Case(["train", *OWN, "--data", "other.jsonl"], "no column 'prompt'; it has 'question', 'answer'"),
    Case(["train", *OWN, "--data", "other.json"], "no column 'prompt'; it has 'question'"),
    Case(["train", *OWN, "--data", "other.csv"], "no column 'prompt'; it has 'question', 'answer'"),
    Case(["train", *OWN, "--data", "rewards.py"], "rewards.py ends in '.py', which is none of .jsonl"),
    Case(["train", *OWN, "--eval-data", "other.jsonl"], "no column 'prompt'"),
    Case(["train", *OWN, "--reward", "none.py:score"], "there is no file"),
    Case(["train", *OWN, "--reward", "rewards.py:scor"], "did you mean `score`?"),
    Case(["train", *OWN, "--reward", "wrong.py:score"], "wrong.py, line 1: SyntaxError"),
    Case(["train", *OWN, "--reward", "no_such_package.of_mine:score"], "No module named 'no_such_package'"),
    Case(["train", *OWN, "--reward", "model:./nowhere"], "The model ./nowhere is no folder"),
    Case(["train", *OWN, "--step-reward", "none.py:score"], "there is no file"),
    Case(
        ["train", *OWN, "--eval-data", "rows.jsonl", "--set", "reward.verifier=['none.py:right']"], "there is no file"
    ),
    Case(["plan", *OWN, "--data", "none.jsonl"], "There is no file 'none.jsonl'"),
    Case(["doctor", *OWN, "--reward", "none.py:score"], "there is no file"),
    Case(["resume", "nowhere"], "nowhere is not a run: it does not exist"),
    Case(["resume", "full"], "full is not a run: it has no job.toml"),
    Case(["resume", "begun", "--set", "train.max_steps=3"], "Did you mean `train.steps`?"),
    Case(["resume", "begun", "--fork", "full"], "full is not empty and holds no run"),
    Case(["eval", "nowhere"], "nowhere is no run folder, no job file and no recipe"),
    Case(["eval", "full"], "full is not a run: it has no job.toml"),
    Case(["eval", "begun", "--which", "last"], "There are no weights called 'last': name latest, best, base"),
    Case(["eval", "begun"], "begun has no checkpoint yet"),
    Case(["eval", "begun", "--which", "base", "--data", "none.jsonl"], "There is no file 'none.jsonl'"),
    Case(["sample", "nowhere", "text"], "nowhere is no run folder, no job file and no recipe"),
    Case(["sample", "begun", "text"], "begun has no checkpoint yet"),
    Case(["sample", "arithmetic", "text", "--which", "best"], "arithmetic is a job and no run"),
    Case(["label", "nowhere", "--output", "labels.jsonl"], "nowhere is no run folder, no job file and no recipe"),
    Case(["label", "begun"], "Name the file that labels go to"),
    Case(["label", *OWN[:2], *OWN[4:], "--data", "none.jsonl", "--output", "l.jsonl"], "There is no file 'none.jsonl'"),
    Case(["export", "nowhere", "out"], "nowhere is not a run: it does not exist"),
    Case(["export", "begun", "out"], "begun has no checkpoint yet"),
    Case(["export", "begun", "full", "--which", "base"], "full is not empty. Choose another folder to export to"),
    Case(["init", "rows.jsonl"], "The job file rows.jsonl cannot be written: File exists"),
    Case(["show", "nowhere.toml"], "There is no job file `nowhere.toml`"),
    Case(["reward-model", "train", *GRADED, "--data", "none.jsonl"], "There is no file 'none.jsonl'"),
    Case(["reward-model", "train", *GRADED, "--data", "rows.jsonl", "--run", "full"], "full is not empty"),
    Case(["reward-model", "train", *GRADED, "--data", "rows.jsonl", "--model", "./no"], "The model ./no is no folder"),
]


def lay_out(folder: Path) -> Path:
    """Good and bad files, under the names that `CASES` use."""
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (folder / "broken.jsonl").write_text("prompt: 1+1\n")
    (folder / "list.jsonl").write_text('["a"]\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "other.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    (folder / "other.json").write_text('[{"question": "1+1="}]\n')
    (folder / "other.csv").write_text("question,answer\n1+1=,2\n")
    (folder / "rewards.py").write_text("def score(completions, **columns):\n    return [1.0 for c in completions]\n")
    (folder / "wrong.py").write_text("def score(:\n")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "begun" / "checkpoints").mkdir(parents=True)
    (folder / "begun" / "job.toml").write_text(to_toml(Job()))
    (folder / "begun" / "events.jsonl").write_text('{"step": 0}\n')
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The status, output, errors and imports of every case, from one process."""
    folder = lay_out(tmp_path_factory.mktemp("inputs"))
    root = Path(__file__).parents[2]
    asked = json.dumps([case.arguments for case in CASES])
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{ASK}"],
        cwd=folder, input=asked, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(case.arguments) for case in CASES])
def test_it_is_told_without_torch(number: int, answers: list[Any]) -> None:
    status, _, err, heavy = answers[number]
    assert status == 2
    assert CASES[number].said in " ".join(err.split())
    assert heavy == []
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "text",
    [
        "score = lambda prompt, completion: 1.0\n",
        "if True:\n    def score(prompt, completion):\n        return 1.0\n",
        "from os.path import exists as score\n",
        "from os.path import *\n",
        "globals()['score'] = len\n",
        "def __getattr__(name):\n    return len\n",
        "class score:\n    pass\n",
    ],
)
def test_a_name_that_a_file_may_define_is_left_to_the_run(tmp_path: Path, text: str) -> None:
    """A file is parsed and not run: one that would fail when imported is not, and nothing of it happens twice."""
    (tmp_path / "r.py").write_text(text + "raise SystemExit('it was run')\n")
    inputs.check_functions([f"{tmp_path}/r.py:score"], "reward function")


def test_what_seems_wrong_and_works_is_no_error(tmp_path: Path) -> None:
    """The file itself decides: this one puts the name into its module from elsewhere."""
    (tmp_path / "r.py").write_text(
        "import sys\nvars(sys.modules[__name__])['sco' 're'] = lambda prompt, completion: 1.0\n"
    )
    inputs.check_functions([f"{tmp_path}/r.py:score"], "reward function")


@pytest.mark.parametrize("key", ["train.steps=5", "checkpoint.keep=3", "watch.rollouts=false"])
def test_a_command_that_does_not_train_refuses_keys_of_training(key: str) -> None:
    with pytest.raises(GroupwiseError, match=rf"`{key.split('=')[0]}` has no effect here"):
        inputs.check_overrides(["eval.limit=3", key])
    inputs.check_overrides(["eval.limit=3", "sampling.stop=['x']", "data.system=Add.", "seed=3"])


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is a pipe or a device"):
        inputs.check_prompts(str(tmp_path / "rows.jsonl"), "prompt")


def test_python_is_told_before_a_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model would have to be downloaded, so that any other message comes before it is looked for."""
    import groupwise

    monkeypatch.chdir(lay_out(tmp_path))
    for call in (groupwise.train, groupwise.plan, groupwise.doctor):
        with pytest.raises(GroupwiseError, match="no column 'prompt'"):
            call(model="org/name", data="other.jsonl", reward="rewards.py:score")
    for call in (groupwise.train, groupwise.doctor):  # a plan calls no function
        with pytest.raises(GroupwiseError, match="there is no file"):
            call(model="org/name", data="rows.jsonl", reward="none.py:score")
    assert not (tmp_path / "runs").exists()
