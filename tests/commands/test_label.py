"""`groupwise label`: where outputs come from, what the file says, and the same file after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import groupwise
from groupwise.commands import label as labelling
from groupwise.commands.label import LabelResult, weights_hash
from groupwise.commands.label_file import LabelFile
from groupwise.errors import ConfigError, GroupwiseError, RunFolderError
from tests.commandline import call
from tests.run.tiny import rollouts, save_model, save_rewards, save_rows

SMALL = ["sampling.max_completion_length=12", "sampling.num_generations=3", "eval.threshold=0.3"]
WRITTEN = [
    {"prompt": "ab", "want": "a", "completion": "caca"}, {"prompt": "bc", "want": "d", "completion": "ded"},
    {"prompt": "cc", "want": "b", "completion": "a"}, {"prompt": "dd", "want": "b", "completion": "gaabh"},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def at(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a reward; two prompts are a block."""
    (tmp_path / "model").symlink_to(model)
    save_rows(tmp_path / "rows.jsonl", WRITTEN)
    save_rewards(tmp_path / "rewards.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(labelling, "BLOCK", 2)
    return tmp_path


def label(output: str = "labels.jsonl", target: str | None = None, **options: Any) -> LabelResult:
    own = {"model": "model", "data": "rows.jsonl", "reward": "rewards.py:share"} if target is None else {}
    options = {"n": 3, "pattern": "[ab]", "overrides": SMALL, "say": lambda line: None} | own | options
    return groupwise.label(target, output=output, **options)


def lines(file: str = "labels.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def refused(*said: str, kind: type[GroupwiseError] = ConfigError, **options: Any) -> None:
    with pytest.raises(kind) as found:
        label(**options)
    for part in said:
        assert part in str(found.value)


def test_the_file_is_trls_stepwise_form_and_says_what_made_it() -> None:
    result = label()
    rows = lines()
    assert [row["prompt"] for row in rows] == ["ab", "bc", "cc", "dd"]
    assert [row["completions"] for row in rows] == [["ca", "ca"], ["ded"], ["a"], ["ga", "a", "b", "h"]]
    assert all(type(one) is bool for row in rows for one in row["labels"])
    assert [row["tried"] for row in rows] == [[3, 1], [1], [1], [3, 3, 3, 1]]
    assert [row["labels"][-1] for row in rows] == [True, True, False, False]
    assert (result.outputs, result.steps, result.left_out, result.continuations) == (4, 8, 0, 12)
    assert result.right == sum(map(sum, (row["labels"] for row in rows)))
    made_by = json.loads(Path("labels.json").read_text())["made_by"]
    assert made_by["completer"]["model"] == "model"
    assert {row["completer"] for row in rows} == {made_by["completer"]["weights"]}
    assert (made_by["n"], made_by["soft"], made_by["threshold"]) == (3, False, 0.3)
    assert made_by["steps"] == {"segmenter": "pattern", "pattern": "[ab]"}


def test_soft_labels_are_shares() -> None:
    label(soft=True)
    rows = lines()
    assert rows[3]["labels"] == [right / tried for right, tried in zip(rows[3]["right"], rows[3]["tried"], strict=True)]
    assert all(type(one) is float for row in rows for one in row["labels"])


def test_several_outputs_of_a_row_and_how_they_ended() -> None:
    outputs = ["aca", {"text": "bb", "finish": "length"}, {"text": "d", "reward": 0.5}]
    label(data=[{"prompt": "ab", "want": "a", "outputs": outputs}])
    assert [(row["output"], row["completions"], row["tried"]) for row in lines()] == [
        (0, ["a", "ca"], [3, 1]), (1, ["b", "b"], [3, 3]), (2, ["d"], [1]),
    ]  # fmt: skip


def test_prompts_alone_are_sampled_from_first() -> None:
    label(data=[{"prompt": letter, "want": "a"} for letter in "abcde"], limit=3)
    rows = lines()
    assert [(row["prompt"], row["output"]) for row in rows] == [(letter, i) for letter in "abc" for i in range(3)]
    assert len({"".join(row["completions"]) for row in rows}) > 3


def test_a_run_has_its_outputs_labelled_by_its_first_model() -> None:
    groupwise.train(
        model="model", data="rows.jsonl", reward="rewards.py:share", run="run", show="quiet",
        overrides=["eval.threshold=0.3"], max_completion_length=12, num_generations=4, prompts_per_step=2, steps=2,
        learning_rate=1e-2,
    )  # fmt: skip
    label(target="run", overrides=[])
    sampled = [(g["step"], g["slot"], o) for g in rollouts(Path("run")) for o in g["outputs"]]
    rows = lines()
    assert [(r["step"], r["slot"], "".join(r["completions"]), r["reward"]) for r in rows] == [
        (step, slot, o["text"], pytest.approx(o["reward"])) for step, slot, o in sampled
    ]
    base = json.loads(Path("labels.json").read_text())["made_by"]["completer"]
    label("latest.jsonl", target="run", overrides=[], which="latest")
    latest = json.loads(Path("latest.json").read_text())["made_by"]["completer"]
    assert (base["step"], latest["step"]) == (0, 2)
    assert base["weights"] != latest["weights"]
    save_rows(Path("rows.jsonl"), [{**row, "prompt": "hh"} for row in WRITTEN])
    refused("it has changed since", kind=GroupwiseError, target="run", output="other.jsonl", overrides=[])


@pytest.mark.parametrize("blocks", [0, 1])
def test_killed_and_given_again_it_is_the_same_file(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    label("whole.jsonl")
    add = LabelFile.add

    def killed(file: LabelFile, *block: Any) -> None:
        if file.so_far["blocks"] < blocks:
            return add(file, *block)
        with pytest.MonkeyPatch.context() as patch:
            # Lines are there, their number is not.
            patch.setattr(LabelFile, "_save", lambda self: None)
            add(file, *block)
        file._lines._file.write(b'{"prompt": "ha')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LabelFile, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            label()
    told: list[str] = []
    again = label(say=told.append)
    assert Path("labels.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert len([line for line in told if line.startswith("block")]) == 2 - blocks
    assert (again.outputs, again.steps, again.continuations) == (4, 8, 12)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_block_finish_and_the_same_command_goes_on(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(number, signal.default_int_handler)
    told: list[str] = []
    add = LabelFile.add

    def add_and_stop(file: LabelFile, *block: Any) -> None:
        signal.raise_signal(number)
        add(file, *block)

    label("whole.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(LabelFile, "add", add_and_stop)
        stopped = label(say=told.append)
    signal.signal(number, before)
    assert (stopped.stopped_by, stopped.outputs) == (number, 2)
    assert told[-1] == "stopped after block 1 of 2; go on with the same command"
    again = label()
    assert (again.stopped_by, again.outputs) == (None, 4)
    assert Path("labels.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_a_second_signal_ends_labelling_at_once_and_says_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def stop_twice(file: LabelFile, *block: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(LabelFile, "add", stop_twice)
    with pytest.raises(SystemExit):
        label(say=told.append)
    signal.signal(signal.SIGTERM, before)
    said = next(line for line in told if line.startswith("stopped at once"))
    assert said.startswith("stopped at once; lost: block 1, about ")
    assert said.endswith("go on with: the same command")


def test_what_is_done_is_not_done_again() -> None:
    first = label()
    told: list[str] = []
    again = label(say=told.append)
    assert told[-1] == "labels.jsonl has 2 of 2 blocks already"
    assert (again.outputs, again.tokens) == (first.outputs, first.tokens)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"n": 4}, ("n = 3", "this is 4")),
        ({"soft": True}, ("soft = False",)),
        ({"overrides": [*SMALL, "seed=1"]}, ("seed = 0",)),
        ({"data": WRITTEN[:3]}, ("data = 'rows.jsonl'",)),
    ],
)
def test_a_file_that_something_else_began_is_left_alone(change: dict[str, Any], said: tuple[str, ...]) -> None:
    label()
    before = Path("labels.jsonl").read_bytes()
    refused("labels.jsonl was begun with", *said, **change)
    assert Path("labels.jsonl").read_bytes() == before


def test_another_process_is_not_written_over() -> None:
    file = LabelFile(Path("labels.jsonl"), {"completer": {"weights": "0"}})
    other = LabelFile(Path("labels.jsonl"), {"completer": {"weights": "0"}})
    with file.writing(), pytest.raises(RunFolderError, match="another process"), other.writing():
        pass


def test_what_cannot_be_labelled_is_left_out_and_counted() -> None:
    Path("rewards.py").write_text("def share(prompt, completion):\n    return None if prompt == 'dd' else 1.0\n")
    result = label()
    assert (result.outputs, result.left_out) == (3, 1)
    assert [row["prompt"] for row in lines()] == ["ab", "bc", "cc"]


def test_bad_input_is_refused() -> None:
    refused("ends in .jsonl", output="labels.csv")
    refused("no regular expression", pattern="[")
    Path("mine.jsonl").write_text("{}\n")
    refused("no mine.json says what made it", output="mine.jsonl")
    some = [WRITTEN[0], {"prompt": "b", "want": "a"}]
    refused("row 1", "give all of them, or none", kind=GroupwiseError, data=some)
    refused("has to be a text", kind=GroupwiseError, data=[{"prompt": "a", "want": "a", "completion": 3}])
    refused("has to be a list of outputs", kind=GroupwiseError, data=[{"prompt": "a", "want": "a", "outputs": "b"}])
    steps = ["reward.functions=[]", 'reward.step_functions=["rewards.py:share"]', "objective.outcome_weight=0"]
    refused("What is right", reward=None, overrides=[*SMALL, *steps])


def test_damaged_files_are_told(at: Path) -> None:
    label()
    whole = Path("labels.jsonl").read_bytes()
    Path("labels.jsonl").write_bytes(whole[:50])
    refused("is shorter than labels.json says")
    Path("labels.json").write_text("{")
    refused("labels.json cannot be read")


def test_the_command_line(at: Path) -> None:
    knobs = [part for knob in SMALL for part in ("--set", knob)]
    command = ["label", "--model", "model", "--data", "rows.jsonl", "--reward", "rewards.py:share", "-n", "2", *knobs]
    ended = call(*command, "--pattern", "[ab]", "--output", "labels.jsonl")
    assert ended.status == 0, ended.err
    assert ended.out.startswith("labels.jsonl: 4 outputs, 8 steps, ")
    assert "block 2 of 2: 4 outputs" in ended.err
    ended = call(*command)
    assert (ended.status, "--output labels.jsonl" in ended.err) == (2, True)


def test_a_hash_tells_weights_apart() -> None:
    one = torch.nn.Linear(3, 2)
    same = torch.nn.Linear(3, 2)
    same.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(same)
    assert len(weights_hash(one)) == 16
    assert weights_hash(one.bfloat16()) != weights_hash(same)
    with torch.no_grad():
        same.bias[0] += 1e-6
    assert weights_hash(one.float()) != weights_hash(same)
