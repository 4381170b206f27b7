"""Rows that a reward model learns from: preferences, labelled outputs, labelled steps, in TRL's columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from groupwise.data.messages import as_content, template_options
from groupwise.data.objects import of_split, rows_or_splits
from groupwise.data.rows import TableRows, read_rows
from groupwise.errors import DataError
from groupwise.reward_models.text import Content, Example, Graded, Output, Preferred, Steps, Stepwise
from groupwise.wording import shown

FORMATS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "outcome": (("chosen", "rejected"), ("prompt", "completion", "label")),
    "process": (("prompt", "completions", "labels"),),
}
"""The columns of each format, by the kind of reward model that takes it."""


def load_examples(
    source: str | Iterable[Mapping[str, Any]], kind: Literal["outcome", "process"], *, split: str = "train",
    revision: str | None = None,
) -> list[Example]:  # fmt: skip
    """The examples of a file, folder, hub data set or of rows; the columns of the first row decide the format.

    Raises DataError where the columns are none of `kind`'s, a row lacks one or has another type in it, a label is
    outside [0, 1], or there are no rows.
    """
    if isinstance(source, str):
        name, found = source, read_rows(source, revision=revision, split=split)
        rows = list(map(_without_text_label, found) if isinstance(found, TableRows) and found.only_texts else found)
    else:
        name, rows = "the given rows", list(of_split(rows_or_splits(source, "rows"), split, "split"))
    if not rows:
        raise DataError(f"{name} has no rows.")
    columns = _format(rows[0], kind, name)
    read = {"chosen": _preferred, "prompt": _graded if kind == "outcome" else _stepwise}[columns[0]]
    examples: list[Example] = []
    for index, row in enumerate(rows):
        where = f"{name}, row {index} (counted from 0)"
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(f"{where} has no column {missing[0]!r}, which the first row has; it has {_names(row)}.")
        examples.append(read(row, where))
    return examples


def _format(row: Mapping[str, Any], kind: str, name: str) -> tuple[str, ...]:
    for columns in FORMATS[kind]:
        if all(column in row for column in columns):
            return columns
    takes = " or ".join(", ".join(map(repr, columns)) for columns in FORMATS[kind])
    other = "process" if kind == "outcome" else "outcome"
    fits = any(all(column in row for column in columns) for columns in FORMATS[other])
    advice = f" These columns are for --kind {other}." if fits else " Rename the columns."
    raise DataError(f"{name} has the columns {_names(row)}; a reward model of kind {kind} learns from {takes}.{advice}")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none at all"


def _preferred(row: Mapping[str, Any], where: str) -> Preferred:
    chosen, rejected = (
        _answer(row, name, f"{where}, column {name!r}", finished=row.get(f"{name}_finish") != "length")
        for name in ("chosen", "rejected")
    )
    return Preferred(chosen, rejected)


def _graded(row: Mapping[str, Any], where: str) -> Graded:
    output = _answer(row, "completion", where, finished=row.get("finish") != "length")
    return Graded(output, _label(row["label"], f"{where}, column 'label'"))


def _stepwise(row: Mapping[str, Any], where: str) -> Stepwise:
    texts, labels = _list(row["completions"]), _list(row["labels"])
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}, column 'completions' has to be a list of texts, but is {shown(row['completions'])}.")
    if labels is None or len(labels) != len(texts):
        raise DataError(
            f"{where}, column 'labels' has to have one label for each of the {len(texts)} steps, but is "
            f"{shown(row['labels'])}."
        )
    known = tuple(
        None if label is None else _label(label, f"{where}, column 'labels', step {number}")
        for number, label in enumerate(labels, start=1)
    )
    prompt = as_content(row["prompt"], f"{where}, column 'prompt'")
    return Stepwise(Steps(prompt, tuple(texts), _options(prompt, row, where)), known)


def _answer(row: Mapping[str, Any], column: str, where: str, *, finished: bool = True) -> Output:
    """A row's prompt and what was answered: a text, or messages of which the last is the answer."""
    prompt, given = row.get("prompt"), row[column]
    asked: Content = "" if prompt is None or prompt == "" else as_content(prompt, f"{where}, the prompt")
    if isinstance(given, str):
        return Output(asked, given, finished, _options(asked, row, where))
    messages = as_content(given, where)
    assert not isinstance(messages, str)
    before = [] if asked == "" else [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    *earlier, last = messages
    text = last.get("content")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text)
    if last["role"] != "assistant" or not isinstance(text, str):
        raise DataError(f"{where} has to end with a message of the assistant's, a text, but ends with {shown(last)}.")
    return Output([*before, *earlier], text, finished, template_options(row, where))


def _options(prompt: Content, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The row's options for the chat template, which renders messages only."""
    return {} if isinstance(prompt, str) else template_options(row, where)


def _label(value: Any, where: str) -> float:
    """A number in [0, 1]; True and False are 1 and 0."""
    number = float(value) if isinstance(value, int | float) else math.nan
    if not 0 <= number <= 1:
        raise DataError(f"{where} has to be 0 or 1, true or false, or a share between them, but is {shown(value)}.")
    return number


def _without_text_label(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a CSV, which knows texts only, with its label as what the text says; a text that says none stays."""
    text = row.get("label")
    if not isinstance(text, str):
        return row
    word = text.strip().lower()
    try:
        return {**row, "label": word == "true" if word in ("true", "false") else float(word)}
    except ValueError:
        return row


def _list(value: Any) -> list[Any] | None:
    items = value.tolist() if hasattr(value, "tolist") else value
    return list(items) if isinstance(items, list | tuple) else None
