"""A run that is resumed after something beside it was changed: files, answers, its job, its lines, its machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import groupwise
from groupwise.errors import ConfigError, DataError, GroupwiseError
from groupwise.store import provenance
from tests.run.tiny import events, save_model, save_rows

REWARDS = (
    "import helpers\n\ndef share(prompts, completions, want, **kw):\n    return helpers.shares(completions, want)\n"
)
HELPERS = "def shares(texts, want):\n    return [float(t.count(w)) for t, w in zip(texts, want)]\n"
VERIFIER = "def right(prompt, completion):\n    return float('a' in completion)\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a job names, and `run`: two steps of it, saved after each."""
    at = tmp_path_factory.mktemp("inputs")
    save_model(at / "model")
    save_rows(at / "rows.jsonl", [{"prompt": letter, "want": "a", "hint": "x"} for letter in "abcd"])
    save_rows(at / "held.jsonl", [{"prompt": letter, "want": "b"} for letter in "ef"])
    (at / "rewards.py").write_text(REWARDS)
    (at / "helpers.py").write_text(HELPERS)
    (at / "verifier.py").write_text(VERIFIER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        groupwise.train(
            model="model", data="rows.jsonl", eval_data="held.jsonl", reward="rewards.py:share",
            verifier="verifier.py:right", run="run", steps=2, iterations=1, num_generations=2, max_completion_length=4,
            prompts_per_step=2, show="quiet", overrides=["checkpoint.every=1"],
        )  # fmt: skip
    return at


@pytest.fixture
def at(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it all, which is where we are."""
    shutil.copytree(bench, tmp_path / "at")
    monkeypatch.chdir(tmp_path / "at")
    return tmp_path / "at"


def resume(capsys: pytest.CaptureFixture[str], steps: int = 3) -> str:
    """Resume and return what is said even where nobody wants to hear much."""
    capsys.readouterr()
    groupwise.resume("run", overrides=[f"train.steps={steps}"], show="quiet")
    return capsys.readouterr().err


def replace(file: str, old: str, new: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def test_where_nothing_changed_nothing_is_said(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(capsys) == ""


@pytest.mark.parametrize(
    "file, old, new, said",
    [
        ("rewards.py", "helpers.shares", "2 and helpers.shares", "rewards.py has changed since step 2"),
        ("helpers.py", "float", "2 * float", "helpers.py has changed since step 2"),
        ("verifier.py", "'a'", "'b'", "verifier.py has changed since step 2"),
        ("rows.jsonl", '"want": "a"', '"want": "c"', "rows.jsonl, column 'want' has changed since step 2"),
        ("rows.jsonl", '"hint"', '"tip"', "rows.jsonl, column 'tip' is new since step 2"),
        ("held.jsonl", '"want": "b"', '"want": "c"', "held.jsonl (held out), column 'want' has changed since step 2"),
    ],
)
def test_what_judges_may_change_and_never_without_a_word(
    at: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, said: str
) -> None:
    """Who mends a reward that raised goes on; the checkpoint keeps what was said."""
    replace(file, old, new)
    assert f"warning: {said}: steps from here on are judged by what is there now" in resume(capsys)
    state = json.loads((at / "run/checkpoints/step-00000003/state.json").read_text())
    assert said in state["made_by"]["changes"]
    assert resume(capsys, 4) == "", "the next checkpoint is of the new one"
    state = json.loads((at / "run/checkpoints/step-00000004/state.json").read_text())
    assert said in state["made_by"]["changes"]


def test_weights_that_a_run_began_with_are_not_what_it_goes_on_with(
    at: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bytearray((at / "model/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (at / "model/model.safetensors").write_bytes(weights)
    assert "model/model.safetensors has changed since step 2: the run goes on with its own weights" in resume(capsys)


def another_context(at: Path) -> None:
    replace("model/config.json", '"max_position_embeddings": 64', '"max_position_embeddings": 48')


def another_question(at: Path) -> None:
    replace("held.jsonl", '"prompt": "e"', '"prompt": "g"')


@pytest.mark.parametrize(
    "change, said",
    [
        (another_context, "model/config.json has changed"),
        (another_question, r"held-out prompts \(held.jsonl\) has changed"),
    ],
)
def test_what_is_trained_and_asked_may_not_change(at: Path, change: Callable[[Path], None], said: str) -> None:
    change(at)
    before = {path: path.read_bytes() for path in (at / "run").rglob("*.json*")}
    with pytest.raises(DataError, match=f"would not be the same run: since step 2 .*{said}.*--fork"):
        groupwise.resume("run", overrides=["train.steps=3"], show="quiet")
    assert {path: path.read_bytes() for path in (at / "run").rglob("*.json*")} == before
    assert groupwise.resume("run", fork="fork", overrides=["train.steps=3"], show="quiet").steps == 3


def test_other_tokens_of_the_same_texts_are_told_from_other_texts(at: Path) -> None:
    tokenizer = json.loads((at / "model/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (at / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(GroupwiseError, match="texts are the same, and their tokens are not: it is the tokenizer"):
        groupwise.resume("run", overrides=["train.steps=3"], show="quiet")


def test_a_function_from_python_is_compared_by_its_code(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "prompts_per_step": 2, "show": "quiet"}
    rows = [{"prompt": letter} for letter in "abcd"]
    groupwise.train(model="model", data=rows, reward=lambda prompt, completion: 1.0, run="own", steps=1, **options)
    capsys.readouterr()
    again: dict[str, Any] = {"data": rows, "show": "quiet"}
    groupwise.resume("own", overrides=["train.steps=2"], reward=lambda prompt, completion: 1.0, **again)
    assert "changed" not in capsys.readouterr().err, "the same code in another place"
    groupwise.resume("own", overrides=["train.steps=3"], reward=lambda prompt, completion: 2.0, **again)
    assert "<lambda> (from Python) has changed since step 2" in capsys.readouterr().err


def test_an_edited_job_is_refused_as_an_option_would_be(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (at / "run/job.toml").read_text()
    replace("run/job.toml", "learning_rate = 1e-06", "learning_rate = 0.5")
    with pytest.raises(
        ConfigError, match=r"job\.toml of this run was edited since step 2.*train\.learning_rate: 1e-06 -> 0\.5"
    ):
        groupwise.resume("run", overrides=["train.steps=3"], show="quiet")
    assert (at / "run/checkpoints/step-00000002/job.toml").read_text() == whole
    shutil.copy(at / "run/checkpoints/step-00000002/job.toml", at / "run/job.toml")
    replace("run/job.toml", "every = 1", "every = 2")
    groupwise.resume("run", overrides=["train.steps=3"], show="plain")
    said = capsys.readouterr().out
    assert "checkpoint.every: 1 -> 2\n" in said, "one that may change is said"
    assert "train.steps: 2 -> 3\n" in said


def test_another_machine_is_said_in_one_line(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance.torch, "__version__", "9.0.0")
    monkeypatch.setattr(provenance, "compiled", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        said = resume(capsys).splitlines()
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in said if line.startswith("warning: step 2 was computed with")]
    assert len(lines) == 1
    assert f"torch {torch.version.__version__} (now 9.0.0)" in lines[0]
    assert f"threads {threads} (now {threads + 1})" in lines[0]
    assert "the last bits" in lines[0]


def test_a_processor_of_other_instructions_is_said(
    at: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "processor", lambda: "flags: none")
    assert "step 2 was computed with a processor of other instructions" in resume(capsys)


def test_lines_that_are_gone_are_said(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (at / "run/events.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    (at / "run/events.jsonl").write_text(lines[0] + lines[2])
    (at / "run/rollouts.jsonl").write_text("")
    said = resume(capsys)
    assert "events.jsonl has 2 lines up to step 2, and had 3 when that was saved (nothing of step 1)" in said
    assert "rollouts.jsonl has 0 lines up to step 2, and had 4 when that was saved" in said
    assert [event["step"] for event in events(at / "run")] == [0, 2, 3]
    assert resume(capsys, 4) == "", "once"


def test_an_edited_job_is_said_where_weights_are_only_read(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace("run/job.toml", "every = 1", "every = 2")
    groupwise.sample("run", "ab")
    assert "was edited" not in capsys.readouterr().err, "what may change makes no other job of it"
    replace("run/job.toml", "learning_rate = 1e-06", "learning_rate = 0.5")
    groupwise.sample("run", "ab")
    assert "job.toml of this run was edited since step 2: train.learning_rate: 1e-06 -> 0.5" in capsys.readouterr().err
