"""Rows from every format become prompts; every row that cannot be used is an error that says where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from groupwise.config import DataSection
from groupwise.data.files import PromptSet, load_prompts, read_rows
from groupwise.errors import DataError, ModelError
from groupwise.tokenizer.codec import Codec
from tests.tiny_hub import NOBODY_LISTENS
from tests.tiny_tokenizers import CHAT_TEMPLATE, byte_level, character_level

CODEC = Codec(byte_level(CHAT_TEMPLATE))
ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "the answer", "answer": 85}]
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]


@pytest.fixture(autouse=True)
def _quiet_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def written(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def given(rows: Any, longest: int | None = None, limit: int | None = None, **section: Any) -> PromptSet:
    """Prompts of rows that are handed over in Python."""
    return load_prompts(DataSection(**section), CODEC, longest, rows=rows, limit=limit)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_each_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "p.parquet")
    files = [
        written(tmp_path / "p.jsonl", lines(ROWS)),
        written(tmp_path / "blank.jsonl", "\n" + lines(ROWS).replace("\n", "\r\n  \n").rstrip()),
        written(tmp_path / "mark.JSONL", "\ufeff" + lines(ROWS)),
        written(tmp_path / "p.json", json.dumps(ROWS, indent=1)),
        written(tmp_path / "data.json", json.dumps({"data": ROWS})),
        written(tmp_path / "p.csv", "prompt,answer\n1+1=,2\nthe answer,85\n"),
        tmp_path / "p.parquet",
    ]
    texts = [{name: str(value) for name, value in row.items()} for row in ROWS]
    for file in files:
        rows = texts if file.suffix == ".csv" else ROWS
        assert list(read_rows(file)) == rows, file.name
        assert list(read_rows(str(file))) == rows, file.name


def test_csv_values_may_span_lines_wherever_a_block_of_the_file_ends(tmp_path: Path) -> None:
    n = 150_000  # more than the reader's block of 1 MiB, which ends within a quoted value
    rows = read_rows(written(tmp_path / "p.csv", "prompt,reply\n" + '"1\n2",3\n' * n))
    assert len(rows) == n
    assert all(row == {"prompt": "1\n2", "reply": "3"} for row in rows)


def test_saved_data_sets_with_and_without_splits(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    assert list(read_rows(tmp_path / "one")) == ROWS
    assert list(read_rows(tmp_path / "two")) == ROWS
    assert list(read_rows(str(tmp_path / "two"), split="test")) == ROWS[:1]
    with pytest.raises(DataError, match=r"two has no split 'dev'; it has 'train', 'test'\."):
        read_rows(tmp_path / "two", split="dev")


def test_a_folder_of_files_is_read_by_datasets(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "train.jsonl", lines(ROWS))
    assert list(read_rows(tmp_path / "set")) == ROWS
    with pytest.raises(DataError, match=r"\(split 'dev'\) cannot be read"):
        read_rows(tmp_path / "set", split="dev")


def test_parquet_as_verl_writes_it(tmp_path: Path) -> None:
    row = {
        "data_source": "gsm8k",
        "prompt": [MESSAGES[0], {**MESSAGES[1], "name": "bob"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 0, "tags": ["a", "b"]},
    }
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    [prompt] = load_prompts(DataSection(path=str(tmp_path / "p.parquet")), CODEC).prompts
    assert prompt.content == row["prompt"], "the table gave the first message a name of None"
    assert prompt.is_conversation
    assert prompt.token_ids == CODEC.encode_prompt(MESSAGES)
    assert prompt.row == {key: value for key, value in row.items() if key != "prompt"}


# --- rows from Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, tuple(ROWS), (row for row in ROWS), datasets.Dataset.from_list(ROWS)])
def test_rows_may_be_any_iterable_of_mappings(rows: Any) -> None:
    found = given(rows)
    assert found.dropped_long == 0
    assert [prompt.prompt_id for prompt in found.prompts] == ["0", "1"]
    assert [prompt.content for prompt in found.prompts] == ["1+1=", "the answer"]
    assert [prompt.token_ids for prompt in found.prompts] == [CODEC.encode_prompt(row["prompt"]) for row in ROWS]
    assert [prompt.row for prompt in found.prompts] == [{"answer": 2}, {"answer": 85}]


def test_messages_may_be_arrays_and_may_call_tools() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    messages = np.array([MESSAGES[1], call, {"role": "tool", "content": "2"}], dtype=object)
    [prompt] = given([{"question": messages}], prompt_column="question").prompts
    assert [message["role"] for message in prompt.content if isinstance(message, dict)] == ["user", "assistant", "tool"]
    assert "content" not in prompt.content[1]


def test_the_limit_counts_prompts_and_stops_reading() -> None:
    def endless() -> Any:
        yield {"prompt": "the answer " * 50}
        while True:
            yield {"prompt": "1+1="}

    found = given(endless(), longest=10, limit=3)
    assert [prompt.prompt_id for prompt in found.prompts] == ["1", "2", "3"]
    assert found.dropped_long == 1


# --- prompts that are too long ----------------------------------------------------------------------------------------


def test_long_prompts_are_counted_and_left_out() -> None:
    rows = [{"prompt": "a" * n} for n in (3, 9, 4, 10)]  # one more token each, for <bos>
    found = given(rows, longest=5)
    assert [prompt.prompt_id for prompt in found.prompts] == ["0", "2"]
    assert found.dropped_long == 2
    assert given(rows, longest=5, max_prompt_length=4).dropped_long == 3, "the smaller limit holds"
    assert given(rows, longest=4, max_prompt_length=5).dropped_long == 3
    assert given(rows, max_prompt_length=10).dropped_long == 1
    assert given(rows).dropped_long == 0


def test_long_prompts_may_be_an_error() -> None:
    with pytest.raises(DataError, match=r"the given rows, row 1 .* the prompt has 10 tokens, but at most 5 fit"):
        given([{"prompt": "aaa"}, {"prompt": "a" * 9}], longest=5, long_prompts="error")


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match=r"every prompt is too long; the shortest of 2 has 9 tokens, but at most 5 fit"):
        given([{"prompt": "a" * 8}, {"prompt": "a" * 9}], longest=5)


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            '{"prompt": 1+1}',
            r"is not valid JSON \(Expecting ',' delimiter: character 13\): '\{\"prompt\": 1\+1\}'\. Each",
        ),
        ('{"prompt": "1+1="', r"is not valid JSON \(Expecting ',' delimiter: character 18\)"),
        (
            '{"prompt": "' + "x" * 5000,
            r"is not valid JSON \(Unterminated string .*: character 12\): '.{40,80} \.\.\. x+'",
        ),
        ("[1, 2]", r"has to be a JSON object with a column per key, but is \[1, 2\]"),
    ],
)
def test_a_broken_line_is_named_with_file_number_and_text(tmp_path: Path, line: str, reason: str) -> None:
    file = written(tmp_path / "p.jsonl", lines(ROWS) + "\n" + line + "\n" + lines(ROWS))
    with pytest.raises(DataError, match=rf"p\.jsonl, line 4 {reason}") as caught:
        read_rows(file)
    assert len(str(caught.value)) < 500


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"line 2 is not valid JSON .*utf-8.*: '\{\"prompt\": \"caf\ufffd\"\}'"):
        read_rows(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", lines(ROWS), r"p\.json is not valid JSON \(Extra data: .*has to end in \.jsonl"),
        ("p.json", '{"rows": []}', "has to hold a list of objects"),
        ("p.json", '[{"prompt": "a"}, "b"]', r"item 1 \(counted from 0\) has to be a JSON object .* but is 'b'"),
        ("p.json", "[]", "has no rows"),
        ("p.json", "", r"p\.json is not valid JSON"),
        ("p.jsonl", "\n \n", "has no rows"),
        ("p.csv", "", r"p\.csv is no CSV table"),
        ("p.csv", "prompt,answer\n", "has no rows"),
        ("p.csv", "prompt,answer\n1+1=,2,3\n", "is no CSV table .* Expected 2 columns, got 3"),
        ("p.parquet", "hello", r"p\.parquet is damaged, or no Parquet file"),
        ("p.txt", "1+1=", r"ends in '\.txt', which is none of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_files_that_hold_no_table_of_rows(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(written(tmp_path / name, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/nowhere/at/all", "a/b/c", Path("missing")])
def test_missing_files_and_folders(path: str | Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        read_rows(path)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl cannot be read: .*Is a directory"):
        read_rows(tmp_path / "folder.jsonl")


def test_a_hub_data_set_without_a_connection() -> None:
    with pytest.raises(DataError, match=r"'nobody/nothing' \(split 'train'\) cannot be read\. There is no such file"):
        read_rows("nobody/nothing")


@pytest.fixture
def hub_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked to be offline, but nothing answers; and whoever waits for another try fails."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOBODY_LISTENS)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} s for another try"))


@pytest.mark.usefixtures("hub_down")
def test_a_hub_that_does_not_answer_is_not_asked_again() -> None:
    with pytest.raises(
        DataError, match=r"'nobody/nothing' .* The hub does not answer \(.+\), and the cache did not do"
    ):
        read_rows("nobody/nothing")
    assert datasets.config.HF_HUB_OFFLINE is False, "what comes after may find a connection again"


@pytest.mark.usefixtures("hub_down")
def test_a_data_set_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", lines(ROWS))
    datasets.load_dataset("json", data_files=str(file), split="train")
    [made] = (tmp_path / "cache" / "json").glob("default-*")
    cached = tmp_path / "cache" / "nobody___nothing" / "default"
    shutil.copytree(made, cached)
    for table in cached.rglob("json-*.arrow"):
        table.rename(table.with_name(table.name.replace("json", "nothing")))
    assert list(read_rows("nobody/nothing")) == ROWS


@pytest.mark.parametrize("rows", [[], iter(()), datasets.Dataset.from_list([])])
def test_an_empty_data_set(rows: Any) -> None:
    with pytest.raises(DataError, match="the given rows has no rows"):
        given(rows)


def test_a_row_without_the_prompt_column_names_those_it_has() -> None:
    with pytest.raises(DataError, match=r"row 1 .* no column 'prompt'; it has 'question', 'answer'\. Set data\."):
        given([ROWS[0], {"question": "1+1=", "answer": 2}])
    with pytest.raises(DataError, match="it has none at all"):
        given([{}])


@pytest.mark.parametrize("value", [None, "", 12, 1.5, True, [], {}, {"role": "user"}, b"1+1="])
def test_prompts_of_the_wrong_type(value: Any) -> None:
    with pytest.raises(DataError, match=r"row 1 .*, column 'prompt' has to be a text or a list of messages"):
        given([ROWS[0], {"prompt": value}])


NO_MESSAGES = [
    "1+1?",
    None,
    {},
    {"content": "?"},
    {"role": "user"},
    {"role": 1, "content": "?"},
    {"role": "u", "content": 2},
]


@pytest.mark.parametrize("message", NO_MESSAGES)
def test_malformed_messages(message: Any) -> None:
    with pytest.raises(DataError, match=r"row 0 .*, column 'prompt', message 1 has to be an object with the texts"):
        given([{"prompt": [MESSAGES[0], message]}])


def test_a_row_that_is_no_mapping() -> None:
    with pytest.raises(DataError, match=r"row 1 .* has to be a mapping from column names to values, but is '2\+2='"):
        given([ROWS[0], "2+2="])


def test_what_the_codec_refuses_is_reported_with_the_row() -> None:
    digits = Codec(character_level("0123456789+="))
    with pytest.raises(DataError, match=r"row 1 .*: The tokenizer cannot encode 'the answer'"):
        load_prompts(DataSection(), digits, rows=ROWS)
    with pytest.raises(ModelError, match="no chat template"):
        load_prompts(DataSection(), digits, rows=[{"prompt": MESSAGES}])


def test_a_prompt_without_tokens() -> None:
    tokenizer = byte_level("{{ '' }}")
    with pytest.raises(DataError, match="becomes no token at all"):
        load_prompts(DataSection(), Codec(tokenizer), rows=[{"prompt": MESSAGES}])
