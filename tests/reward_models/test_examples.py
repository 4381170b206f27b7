"""Rows to examples for reward models: every format, and every row that cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import DataError
from groupwise.reward_models.examples import load_examples
from groupwise.reward_models.text import Graded, Output, Preferred, Steps, Stepwise

ASKED = [{"role": "user", "content": "1+1?"}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "q", "completion": "a", "label": True}, Graded(Output("q", "a"), 1.0)),
        ({"prompt": "q", "completion": "", "label": 0.25}, Graded(Output("q", ""), 0.25)),
        ({"prompt": "q", "completion": "a", "label": 0, "finish": "length"}, Graded(Output("q", "a", False), 0.0)),
        ({"prompt": ASKED, "completion": said("2"), "label": 1}, Graded(Output(ASKED, "2"), 1.0)),
        ({"prompt": ASKED, "completion": "2", "label": 1}, Graded(Output(ASKED, "2"), 1.0)),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, Preferred(Output("q", "a"), Output("q", "b"))),
        ({"chosen": "q a", "rejected": "q b"}, Preferred(Output("", "q a"), Output("", "q b"))),
        (
            {"chosen": [*ASKED, *said("2")], "rejected": [*ASKED, *said("3")]},
            Preferred(Output(ASKED, "2"), Output(ASKED, "3")),
        ),
        (
            {"prompt": ASKED, "chosen": said("2"), "rejected": said("3")},
            Preferred(Output(ASKED, "2"), Output(ASKED, "3")),
        ),
        (
            {"prompt": "1+1?", "chosen": said("2"), "rejected": said("3")},
            Preferred(Output(ASKED, "2"), Output(ASKED, "3")),
        ),
    ],
)
def test_outcome_formats(row: dict[str, Any], expected: Any) -> None:
    assert load_examples([row], "outcome") == [expected]


def test_the_stepwise_format(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "q", "completions": ["a", "b", "c"], "labels": [1, 0.5, None]},
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_examples(str(file), "process") == [
        Stepwise(Steps("q", ("a", "b")), (1.0, 0.0)),
        Stepwise(Steps("q", ("a", "b", "c")), (1.0, 0.5, None)),
    ]


@pytest.mark.parametrize("label", [2, -1, 1.01, math.nan, math.inf, "1", None, [1]])
def test_a_label_outside_of_0_to_1_is_refused(label: Any) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": 1}, {"prompt": "q", "completion": "a", "label": label}]
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\), column 'label' has to be 0 or 1"):
        load_examples(rows, "outcome")
    if label is not None:
        with pytest.raises(DataError, match=r"column 'labels', step 2 has to be 0 or 1"):
            load_examples([{"prompt": "q", "completions": ["a", "b"], "labels": [1, label]}], "process")


@pytest.mark.parametrize(
    "row, kind, said",
    [
        (
            {"prompt": "q", "answer": "a"},
            "outcome",
            "has the columns 'prompt', 'answer'; a reward model of kind outcome",
        ),
        ({"prompt": "q", "completions": ["a"], "labels": [1]}, "outcome", "These columns are for --kind process."),
        ({"chosen": "a", "rejected": "b"}, "process", "These columns are for --kind outcome."),
        ({}, "process", "none at all"),
        ({"prompt": "", "completions": ["a"], "labels": [1]}, "process", "column 'prompt'"),
        ({"prompt": "q", "completions": [], "labels": []}, "process", "'completions' has to be a list of texts"),
        ({"prompt": "q", "completions": "ab", "labels": [1, 0]}, "process", "'completions' has to be a list of texts"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [1]}, "process", "one label for each of the 2 steps"),
        ({"prompt": "q", "completions": ["a"], "labels": 1}, "process", "one label for each of the 1 steps"),
        ({"prompt": "q", "completion": ASKED, "label": 1}, "outcome", "a message of the assistant's"),
        ({"prompt": "q", "completion": 3, "label": 1}, "outcome", "has to be a text or a list of messages"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], kind: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        load_examples([row], kind)
    assert said in str(caught.value)


def test_every_row_has_the_first_ones_columns() -> None:
    rows = [{"chosen": "a", "rejected": "b"}, {"prompt": "q", "completion": "a", "label": 1}]
    with pytest.raises(DataError, match=r"row 1 .* has no column 'chosen', which the first row has"):
        load_examples(rows, "outcome")
    with pytest.raises(DataError, match="no rows"):
        load_examples([], "outcome")


@pytest.mark.parametrize("text, label", [("1", 1.0), ("0", 0.0), ("0.25", 0.25), ("True", 1.0), ("false", 0.0)])
def test_a_label_of_a_csv_is_what_its_text_says(tmp_path: Path, text: str, label: float) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"prompt,completion,label\n7+7=,0014,{text}\n")
    [example] = load_examples(str(file), "outcome")
    assert example == Graded(Output("7+7=", "0014"), label)


@pytest.mark.parametrize("text", ["", "yes", "2", "nan"])
def test_a_label_of_a_csv_that_says_none_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"prompt,completion,label\n7+7=,14,{text}\n")
    with pytest.raises(DataError, match="column 'label' has to be 0 or 1"):
        load_examples(str(file), "outcome")
