"""Values arrive as the file has them: CSV columns as text, nested objects without what a table put there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from groupwise.config import DataSection
from groupwise.data.files import load_prompts
from groupwise.data.rows import read_rows, without_nulls
from groupwise.errors import DataError
from groupwise.tokenizer.codec import Codec
from tests.tiny_tokenizers import byte_level

CELLS = ["007", "1.50", "1e5", "12345678901234567890", "", "NA", "null", "true", "2026-12-01", " 7 ", "-0", "1,000"]
"""What other readers of tables take for numbers, dates, truth values or nothing."""
TEMPLATE = (
    "{% for m in messages %}{% for t in m.tool_calls or [] %}{{ t.function.arguments | tojson }};{% endfor %}"
    "{% endfor %}"
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def csv(file: Path, cells: list[str] = CELLS) -> Path:
    quoted = "".join(f'What is {i}?,"{cell}"\n' for i, cell in enumerate(cells))
    file.write_text("prompt,answer\n" + quoted, encoding="utf-8")
    return file


def calling(**arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    asked, told = {"role": "user", "content": "go"}, {"role": "tool", "content": "ok"}
    return {"prompt": [asked, {"role": "assistant", "tool_calls": [call]}, told]}


def test_every_value_of_a_csv_is_the_text_that_the_file_has(tmp_path: Path) -> None:
    assert [row["answer"] for row in read_rows(csv(tmp_path / "p.csv"))] == CELLS


def test_a_folder_of_csv_files_gives_the_same_texts(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    csv(folder / "train.csv")
    csv(folder / "test.csv", ["042"])
    assert [row["answer"] for row in read_rows(folder)] == CELLS
    assert [row["answer"] for row in read_rows(folder, split="test")] == ["042"]


def test_a_csv_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,answer,answer\na,1,2\n")
    with pytest.raises(DataError, match="several columns of the name 'answer'"):
        read_rows(tmp_path / "p.csv")


def test_a_cell_longer_than_a_readers_block(tmp_path: Path) -> None:
    text = "x" * 3_000_000
    assert read_rows(csv(tmp_path / "p.csv", [text]))[0]["answer"] == text


@pytest.mark.parametrize("kind", ["parquet", "saved", "folder"])
def test_what_a_table_puts_into_nested_objects_is_taken_off_at_every_depth(tmp_path: Path, kind: str) -> None:
    rows = [
        {**calling(city="Paris"), "answer": None, "meta": {"a": {"b": 1}, "list": [None, 2]}},
        {**calling(a=1, b={"c": [{"d": 2}]}), "answer": "x", "meta": {"a": {"z": 2}, "list": [1]}},
    ]
    table = pa.Table.from_pylist(rows)
    place = tmp_path / "files" / "p.parquet"
    place.parent.mkdir()
    parquet.write_table(table, place)
    if kind == "folder":
        place = place.parent
    if kind == "saved":
        place = tmp_path / "set"
        datasets.Dataset(table).save_to_disk(place)
    found = read_rows(place)
    assert list(found) == rows, "a None of the row's own, and one in a list, stay"
    assert [found[0], found[1]] == found[:2] == rows


def test_tool_calls_of_a_parquet_file_are_rendered_as_those_of_the_row(tmp_path: Path) -> None:
    rows = [calling(city="Paris"), calling(a=1, b=2)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    codec = Codec(byte_level(TEMPLATE))
    found = load_prompts(DataSection(path=str(tmp_path / "p.parquet")), codec).prompts
    assert [codec.decode(prompt.token_ids, False) for prompt in found] == ['{"city": "Paris"};', '{"a": 1, "b": 2};']


def test_nulls_of_a_list_are_entries_and_stay() -> None:
    assert without_nulls([None, {"a": None, "b": [None]}]) == [None, {"b": [None]}]
