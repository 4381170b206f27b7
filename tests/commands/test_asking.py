"""A question to a run is asked as its prompts were; labels of a run are of its own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import groupwise
from groupwise.errors import ConfigError, DataError, RewardError
from groupwise.tokenizer.codec import Codec
from tests.commandline import call
from tests.run.tiny import rollouts, save_model, save_rows

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
OPTIONS: dict[str, Any] = {
    "num_generations": 2, "max_completion_length": 4, "prompts_per_step": 2, "steps": 2, "show": "quiet",
}  # fmt: skip
MESSAGES = [{"prompt": [{"role": "user", "content": letter}], "want": "a"} for letter in "bcd"]
TEXTS = [{"prompt": letter, "want": "a"} for letter in "bcd"]


def share(prompt: Any, completion: str, want: str) -> float:
    return float(completion.count(want))


def short(prompt: Any, completion: str) -> float:
    return float(len(completion) < 4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on messages and on texts, from Python and from a file that is there."""
    at = tmp_path_factory.mktemp("asking")
    save_model(at / "model", alphabet="abcdefghsu \n")
    (at / "model/chat_template.jinja").write_text(TEMPLATE)
    save_rows(at / "rows.jsonl", MESSAGES)
    for run, data in (("messages", MESSAGES), ("texts", TEXTS), ("file", at / "rows.jsonl")):
        quiet = {"overrides": ["watch.rollouts=false"]} if run == "file" else {}
        groupwise.train(model=at / "model", data=data, reward=share, run=at / run, **OPTIONS, **quiet)
    groupwise.train(
        model=at / "model", data=TEXTS, reward=share, run=at / "wrapped", **OPTIONS,
        overrides=["data.system='g'", "watch.rollouts=false"],
    )  # fmt: skip
    return at


@pytest.fixture
def encoded(bench: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the next prompts are encoded from."""
    monkeypatch.chdir(bench)
    seen: list[str] = []
    encode = Codec._encode

    def spy(self: Codec, text: str, **options: Any) -> Any:
        seen.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(Codec, "_encode", spy)
    return seen


@pytest.mark.parametrize(
    "run, options, text, said",
    [
        ("messages", [], "ub\na", "the text is a user's message"),
        ("file", [], "ub\na", "the text is a user's message"),
        ("wrapped", [], "sg\nub\na", "the text is a user's message"),
        ("wrapped", ["--system", "h"], "sh\nub\na", "the text is a user's message"),
        ("messages", ["--raw"], "b", "the text is continued as it stands\n"),
        ("messages", ["--system", "h"], "sh\nub\na", "the text is a user's message"),
        ("texts", [], "b", "the text is continued as it stands, as the prompts of training were"),
        ("texts", ["--system", "h"], "sh\nub\na", "the text is a user's message"),
    ],
)
def test_a_text_is_asked_as_the_prompts_of_training_were(
    encoded: list[str], run: str, options: list[str], text: str, said: str
) -> None:
    ended = call("sample", run, "b", *options)
    assert ended.status == 0, ended.err
    assert encoded[-1] == text
    assert said in ended.err


def test_messages_come_from_a_file(bench: Path, encoded: list[str]) -> None:
    conversation = [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    (bench / "list.json").write_text(json.dumps(conversation))
    (bench / "lines.jsonl").write_text("".join(json.dumps(message) + "\n" for message in conversation))
    for file in ("list.json", "lines.jsonl"):
        assert call("sample", "messages", "--messages", file).status == 0
        assert encoded[-1] == "uc\nad\nue\na"
    assert call("sample", "texts", "--messages", "list.json", "--system", "h").status == 0
    assert encoded[-1] == "sh\nuc\nad\nue\na"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["b", "--raw", "--system", "h"], "--raw continues a text as it stands"),
        (["b", "--messages", "list.json"], "both are there"),
        ([], "neither of them is there"),
        (["--messages", "none.json"], "none.json cannot be read"),
        (["--messages", "rows.jsonl"], "'role' and 'content'"),
        (["--messages", "model/chat_template.jinja"], "neither a JSON list of messages nor a message per line"),
    ],
)
def test_what_cannot_be_asked_is_refused(bench: Path, encoded: list[str], arguments: list[str], said: str) -> None:
    (bench / "list.json").write_text('[{"role": "user", "content": "c"}]')
    ended = call("sample", "messages", *arguments)
    assert ended.status == 2
    assert said in ended.err


def test_a_second_system_message_is_refused(encoded: list[str]) -> None:
    with pytest.raises(ConfigError, match="have a system message already"):
        groupwise.sample("messages", [{"role": "system", "content": "h"}], system="g")


def labelled(file: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted((json.dumps(row["prompt"]), "".join(row["completions"]).strip()) for row in rows)


def own(run: Path) -> list[tuple[str, str]]:
    return sorted((json.dumps(g["prompt"]), o["text"].strip()) for g in rollouts(run) for o in g["outputs"])


@pytest.mark.parametrize("handed", [True, False], ids=["rows again", "no rows"])
@pytest.mark.parametrize("run", ["messages", "texts"])
def test_labels_of_a_run_from_python_are_of_its_own_outputs(
    bench: Path, encoded: list[str], tmp_path: Path, run: str, handed: bool
) -> None:
    said: list[str] = []
    rows = MESSAGES if run == "messages" else TEXTS
    options: dict[str, Any] = {"data": iter(rows), "reward": share} if handed else {"reward": short}
    result = groupwise.label(bench / run, output=tmp_path / "l.jsonl", n=1, say=said.append, **options)
    outputs = own(bench / run)
    assert result.outputs + result.left_out == len(outputs)
    found = labelled(tmp_path / "l.jsonl")
    assert found
    assert set(found) <= set(outputs)
    assert any("gets none of their columns" in line for line in said) is not handed


def test_a_reward_that_needs_the_rows_of_a_run_asks_for_them(bench: Path, encoded: list[str], tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="want"):
        groupwise.label(bench / "texts", output=tmp_path / "l.jsonl", n=1, reward=share, say=lambda line: None)


def test_other_rows_than_those_of_the_run_are_no_rows_of_it(bench: Path, encoded: list[str], tmp_path: Path) -> None:
    other = [{"prompt": letter, "want": "a"} for letter in "efg"]
    with pytest.raises(DataError, match="has changed since"):
        groupwise.label(bench / "texts", output=tmp_path / "l.jsonl", n=1, reward=share, data=other)
    written = [{"prompt": "e", "want": "a", "completion": "ab"}]
    result = groupwise.label(bench / "texts", output=tmp_path / "l.jsonl", n=1, reward=share, data=written)
    assert result.outputs == 1
    assert labelled(tmp_path / "l.jsonl") == [('"e"', "ab")]
