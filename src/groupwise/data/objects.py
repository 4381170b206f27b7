"""Data sets that are given from Python as objects: what people have in a notebook, made rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from groupwise.data.rows import Rows, TableRows, without_nulls
from groupwise.errors import DataError
from groupwise.wording import shown

MOST_ROWS: Final = 5_000_000
"""Rows that are taken from what does not say how many it has: more are no data set to train on, or have no end."""
Splits = Mapping[str, Any]


def rows_or_splits(given: Any, name: str, most: int = MOST_ROWS) -> Rows | Splits:
    """The rows of an object, to be read as often as wanted; of several data sets by split, those.

    Taken are lists and other iterables of mappings (generators are read once, here), pandas and polars data frames,
    Arrow tables, a mapping of columns, and what `datasets` has. `name` is the argument that messages name. Raises
    DataError for anything else.
    """
    if isinstance(given, Mapping):
        return _of_mapping(given, name)
    if hasattr(given, "to_pylist"):
        return TableRows(given.to_pylist())
    if hasattr(given, "to_dicts"):
        return list(given.to_dicts())
    if hasattr(given, "iterrows") and hasattr(given, "to_dict"):
        return [{str(key): _cell(value) for key, value in row.items()} for row in given.to_dict("records")]
    if type(given).__module__.partition(".")[0] == "datasets":
        plain = given.with_format(None)
        return TableRows(plain if hasattr(plain, "__len__") else _taken(plain, name, most))
    if isinstance(given, str | bytes) or not (isinstance(given, Iterable) or hasattr(given, "__getitem__")):
        raise DataError(
            f"`{name}` takes a path, a hub id or rows (dicts, a data frame, a data set of `datasets`), but is "
            f"{shown(given)} of type {type(given).__name__}."
        )
    return given if isinstance(given, Sequence) else _taken(given, name, most)


def of_split(given: Iterable[Any] | Splits, split: str, key: str) -> Iterable[Any]:
    """The rows of one split where there are several; `key` is the job's key that names it. Raises DataError."""
    if not isinstance(given, Mapping):
        return given
    if split not in given:
        raise DataError(
            f"The data set from Python has no split {split!r}; it has {', '.join(map(repr, given))}. Name one in "
            f"`{key}`, or give the one that is meant."
        )
    found = rows_or_splits(given[split], key)
    assert not isinstance(found, Mapping)
    return found


def _of_mapping(given: Mapping[Any, Any], name: str) -> Rows | Splits:
    if type(given).__module__.partition(".")[0] == "datasets":
        return given
    columns = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in given.items()}
    lengths = {len(value) if isinstance(value, list | tuple) else -1 for value in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise DataError(
            f"`{name}` is one mapping with {', '.join(map(repr, given)) or 'nothing in it'}, and takes rows: a list of "
            "such mappings, or columns as lists of one length."
        )
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _taken(given: Any, name: str, most: int) -> list[Any]:
    rows = list(islice(given, most + 1))
    if len(rows) > most:
        raise DataError(
            f"`{name}` gives more than {most:,} rows and does not say how many it has: give a part of it, as in "
            "itertools.islice(rows, 10000) or dataset.take(10000)."
        )
    return rows


def _cell(value: Any) -> Any:
    """A data frame's value as Python has it; what is missing in it (NaN, NA, NaT) is None."""
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value):
        return None
    return without_nulls(_unboxed(value))


def _unboxed(value: Any) -> Any:
    """Arrays as lists and numbers as Python's, at every depth."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _unboxed(inner) for key, inner in value.items()}
    return [_unboxed(inner) for inner in value] if isinstance(value, list | tuple) else value
