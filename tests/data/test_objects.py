"""What people have in a notebook works as data, or gets one sentence."""

from __future__ import annotations

from itertools import count
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from groupwise.data.objects import of_split, rows_or_splits
from groupwise.errors import DataError

ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+2=", "answer": None}]


class Frame:
    """What pandas has, as far as it is asked for."""

    def iterrows(self) -> None: ...

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [{"prompt": "1+1=", "answer": np.int64(2)}, {"prompt": "2+2=", "answer": float("nan")}]


class Map:
    """A torch data set."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index]


class Frames(list[Any]):
    """What polars has."""

    def to_dicts(self) -> list[dict[str, Any]]:
        return ROWS


@pytest.mark.parametrize(
    "given",
    [
        ROWS, tuple(ROWS), (row for row in ROWS), iter(ROWS), Frame(), Map(), Frames(), pa.Table.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS).with_format("numpy"),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        {"prompt": ["1+1=", "2+2="], "answer": np.array([2, None], dtype=object)},
    ],
)  # fmt: skip
def test_each_gives_the_same_rows_twice(given: Any) -> None:
    rows = rows_or_splits(given, "data")
    assert list(rows) == list(rows) == ROWS


def test_a_data_frame_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "prompt": [[{"role": "user", "content": "1"}], np.array([{"role": "user", "content": "2"}], dtype=object)],
            "answer": ["007", None],
            "n": [1, 2],
            "share": [0.5, float("nan")],
            "day": [pandas.Timestamp("2026-12-01"), pandas.NaT],
            "call": [{"a": 1, "b": None}, {"a": None, "b": np.arange(2)}],
        }
    )
    first, second = rows_or_splits(frame, "data")
    assert first["prompt"] == [{"role": "user", "content": "1"}]
    assert second["prompt"] == [{"role": "user", "content": "2"}]
    assert [(row["answer"], row["n"], row["share"]) for row in (first, second)] == [("007", 1, 0.5), (None, 2, None)]
    assert (str(first["day"].date()), second["day"]) == ("2026-12-01", None)
    assert (first["call"], second["call"]) == ({"a": 1}, {"b": [0, 1]})


def test_the_split_of_several_is_picked_or_asked_for() -> None:
    one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    for splits in (datasets.DatasetDict, datasets.IterableDatasetDict):
        both = splits({"train": one, "test": two.to_iterable_dataset()})
        found = rows_or_splits(both, "data")
        assert list(of_split(found, "train", "data.split")) == ROWS
        assert list(of_split(found, "test", "data.split")) == ROWS[:1]
        with pytest.raises(DataError, match=r"no split 'dev'; it has 'train', 'test'\. Name one in `data\.split`"):
            of_split(found, "dev", "data.split")


@pytest.mark.parametrize(
    "given, reason",
    [
        (7, "takes a path, a hub id or rows .* but is 7 of type int"),
        (b"p.jsonl", "of type bytes"),
        ({"prompt": "1+1=", "answer": 2}, "one mapping with 'prompt', 'answer', and takes rows"),
        ({"prompt": ["a"], "answer": []}, "columns as lists of one length"),
        ({}, "nothing in it"),
    ],
)
def test_what_holds_no_rows_gets_a_sentence(given: Any, reason: str) -> None:
    with pytest.raises(DataError, match=f"`data` .*{reason}|{reason}"):
        rows_or_splits(given, "data")


def test_what_has_no_end_gets_a_sentence() -> None:
    with pytest.raises(DataError, match=r"more than 100 rows .* itertools\.islice"):
        rows_or_splits(({"prompt": str(n)} for n in count()), "data", most=100)
