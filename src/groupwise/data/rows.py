"""Rows of files, folders and hub data sets, their values as the file has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from groupwise.disk import is_stream
from groupwise.errors import DataError
from groupwise.tokenizer.files import looks_local
from groupwise.tokenizer.hub import hub_error
from groupwise.wording import one_line, shown

Row = Mapping[str, Any]
Rows = Sequence[Row]


def read_rows(
    path: str | Path,
    *,
    revision: str | None = None,
    subset: str | None = None,
    split: str = "train",
) -> Rows:
    """The rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file, of a `datasets` folder, or of a hub data set.

    Values are as the file has them: every column of a CSV is text, and what a table lacks inside a nested value is
    absent there (`without_nulls`). Raises DataError for whatever is missing, damaged, or empty.
    """
    file = Path(path)
    if is_stream(file):
        raise DataError(
            f"{path} is a pipe or a device, which can be read only once, and a run reads its data again when it is "
            "resumed, evaluated or labelled. Write the rows into a file, and name that."
        )
    if file.is_file() or file.suffix.lower() in READERS:
        rows = _read_file(file)
    elif file.is_dir() or not looks_local(path):
        rows = _read_dataset(str(path), revision, subset, split)
    else:
        raise DataError(f"There is no file or folder {str(path)!r} to read prompts from.")
    if len(rows) == 0:
        raise DataError(f"{path} has no rows.")
    return rows


def _read_file(file: Path) -> Rows:
    kind = file.suffix.lower()
    if kind not in READERS:
        raise DataError(f"{file} ends in {file.suffix!r}, which is none of {', '.join(READERS)}: rename or convert it.")
    try:
        return READERS[kind](file)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {str(file)!r} to read prompts from.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error


def _read_jsonl(file: Path) -> Rows:
    rows: list[Row] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                rows.append(
                    _object(_parsed(line.rstrip(b"\r\n"), where, "Each line has to be one JSON object."), where)
                )
    return rows


def _read_json(file: Path) -> Rows:
    found = _parsed(file.read_bytes(), str(file), "With one object per line, the file's name has to end in .jsonl.")
    items = found.get("data") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise DataError(f"{file} has to hold a list of objects, or an object with such a list under 'data'.")
    return [_object(item, f"{file}, item {index} (counted from 0)") for index, item in enumerate(items)]


def _read_csv(file: Path) -> Rows:
    import pyarrow
    from pyarrow import csv

    # One block, so that no value lies across two. What looks like numbers are often labels: 007 is not 7.
    read = csv.ReadOptions(block_size=min(max(file.stat().st_size, 1), 2**31 - 1))
    parse = csv.ParseOptions(newlines_in_values=True)
    try:
        with csv.open_csv(file, read_options=read, parse_options=parse) as head:
            names = head.schema.names
        texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
        table = csv.read_csv(file, read_options=read, parse_options=parse, convert_options=texts)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is no CSV table with a line of column names: {one_line(error)}") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file} has several columns of the name {twice[0]!r}: give each a name of its own.")
    return TableRows(table.to_pylist(), only_texts=True)


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        return TableRows(parquet.read_table(file).to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is damaged, or no Parquet file: {one_line(error)}") from error


class TableRows(Sequence[Row]):
    """The rows of an Arrow table, a list of them or a `datasets.Dataset`, as they were before they became a table.

    A table gives every nested object the keys of all of them, None where it had none; these are taken off. A column
    that is None in a row stays, as does an entry of a list. `only_texts`: every value is the text that a CSV has.
    """

    def __init__(self, rows: Any, only_texts: bool = False) -> None:
        self._rows, self.only_texts = rows, only_texts

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return [self[i] for i in range(len(self))[index]] if isinstance(index, slice) else _as_given(self._rows[index])

    def __iter__(self) -> Iterator[Row]:
        return map(_as_given, self._rows)


def _as_given(row: Row) -> Row:
    return {name: without_nulls(value) for name, value in row.items()}


def without_nulls(value: Any) -> Any:
    """A value without the None's inside its objects, at every depth; those in lists are entries, and stay."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: Final[Mapping[str, Callable[[Path], Rows]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_dataset(path: str, revision: str | None, subset: str | None, split: str) -> Rows:
    import datasets

    saved = any((Path(path) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    silent = None if Path(path).is_dir() else hub_error(path, "dataset")
    try:
        if not saved:
            with _from_the_cache_where(silent is not None):
                return _load(path, name=subset, split=split, revision=revision)
        found = datasets.load_from_disk(path)
    except Exception as error:  # the hub, the loader and each file format have errors of their own
        here = "" if Path(path).is_dir() else "There is no such file or folder here, and a hub id needs a connection. "
        asked = "" if silent is None else f"The hub does not answer ({silent}), and the cache did not do: "
        raise DataError(
            f"The data set {path!r} (split {split!r}) cannot be read. {here}{asked}{one_line(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(map(repr, found))}.")
        found = found[split]
    return TableRows(found)


def _load(path: str, **named: Any) -> Rows:
    """A data set by `datasets`; the columns of CSV files are text unless the data set itself says what they are."""
    import datasets

    found = datasets.load_dataset(path, **named)
    if found.info.builder_name != "csv":
        return TableRows(found)
    said = datasets.load_dataset_builder(path, name=named["name"], revision=named["revision"]).config.features
    texts = datasets.Features(dict.fromkeys(found.column_names, datasets.Value("string")))
    if said:
        return TableRows(found)
    return TableRows(datasets.load_dataset(path, **named, features=texts, keep_default_na=False), only_texts=True)


@contextmanager
def _from_the_cache_where(offline: bool) -> Iterator[None]:
    """`datasets` without the half minute of tries for a hub that is known not to answer; its cache is read as ever."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _parsed(data: bytes, where: str, advice: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        reason = f"{error.msg}: character {error.pos + 1}"
    except ValueError as error:  # bytes that are not UTF-8, numbers beyond all bounds
        reason = one_line(error).rstrip(".")
    text = shown(data.decode("utf-8", errors="replace"))
    raise DataError(f"{where} is not valid JSON ({reason}): {text}. {advice}")


def _object(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{where} has to be a JSON object with a column per key, but is {shown(item)}.")
    return item
