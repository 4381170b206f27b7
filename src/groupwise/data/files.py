"""From files, folders, hub ids or Python rows to encoded prompts. What cannot be used is an error that says where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groupwise.config import DataSection
from groupwise.disk import is_stream
from groupwise.errors import DataError
from groupwise.models.codec import Codec
from groupwise.models.hub import silence
from groupwise.models.tokenizer_files import looks_local
from groupwise.types import Message, Prompt
from groupwise.wording import one_line, shown

Row = Mapping[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a data set in its order, and how many were left out because they are too long."""

    prompts: tuple[Prompt, ...]
    dropped_long: int


def load_prompts(
    section: DataSection,
    codec: Codec,
    max_prompt_length: int | None = None,
    *,
    rows: Iterable[Mapping[str, object]] | None = None,
    limit: int | None = None,
) -> PromptSet:
    """Encode the prompts of a data set: of `rows` where they are given, else of what `section` names.

    The longest prompt allowed, in tokens, is the smaller of `max_prompt_length` (what the context leaves) and the
    section's own. Reading stops once `limit` prompts are found. Columns other than the prompt's go to `Prompt.row` as
    they are. Raises DataError where data cannot be read, a row cannot be used, or nothing is left.
    """
    name = section.path if rows is None else "the given rows"
    longest = min((n for n in (max_prompt_length, section.max_prompt_length) if n is not None), default=None)
    prompts: list[Prompt] = []
    too_long: list[int] = []
    for index, row in enumerate(_read(section) if rows is None else rows):
        if len(prompts) == limit:
            break
        where = f"{name}, row {index} (counted from 0)"
        prompt = _prompt(row, index, section.prompt_column, codec, where)
        if longest is None or len(prompt.token_ids) <= longest:
            prompts.append(prompt)
        elif section.long_prompts == "drop":
            too_long.append(len(prompt.token_ids))
        else:
            raise DataError(
                f"{where}: the prompt has {len(prompt.token_ids)} tokens, but at most {longest} fit. Shorten it, raise"
                " data.max_prompt_length if the context allows, or set data.long_prompts to 'drop'."
            )
    if not prompts and too_long:
        raise DataError(
            f"{name}: every prompt is too long; the shortest of {len(too_long)} has {min(too_long)} tokens, but at most"
            f" {longest} fit. Raise data.max_prompt_length or lower sampling.max_completion_length."
        )
    if not prompts:
        raise DataError(f"{name} has no rows. Give at least one row with a {section.prompt_column!r} column.")
    return PromptSet(tuple(prompts), len(too_long))


def read_rows(
    path: str | Path,
    *,
    revision: str | None = None,
    subset: str | None = None,
    split: str = "train",
    text_column: str | None = None,
) -> Rows:
    """The rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file, of a `datasets` folder, or of a hub data set.

    `text_column` stays text in a CSV file even where it looks like numbers. Raises DataError for whatever is missing,
    damaged, or empty.
    """
    file = Path(path)
    if is_stream(file):
        raise DataError(
            f"{path} is a pipe or a device, which can be read only once, and a run reads its data again when it is "
            "resumed, evaluated or labelled. Write the rows into a file, and name that."
        )
    if file.is_file() or file.suffix.lower() in READERS:
        rows = _read_file(file, text_column)
    elif file.is_dir() or not looks_local(path):
        rows = _read_dataset(str(path), revision, subset, split)
    else:
        raise DataError(f"There is no file or folder {str(path)!r} to read prompts from.")
    if len(rows) == 0:
        raise DataError(f"{path} has no rows.")
    return rows


def _read(section: DataSection) -> Rows:
    return read_rows(
        section.path,
        revision=section.revision,
        subset=section.subset,
        split=section.split,
        text_column=section.prompt_column,
    )


# --- readers ----------------------------------------------------------------------------------------------------------


def _read_file(file: Path, text_column: str | None) -> Rows:
    kind = file.suffix.lower()
    if kind not in READERS:
        raise DataError(f"{file} ends in {file.suffix!r}, which is none of {', '.join(READERS)}: rename or convert it.")
    try:
        return READERS[kind](file, text_column)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {str(file)!r} to read prompts from.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error


def _read_jsonl(file: Path, _: str | None) -> Rows:
    rows: list[Row] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                rows.append(
                    _object(_parsed(line.rstrip(b"\r\n"), where, "Each line has to be one JSON object."), where)
                )
    return rows


def _read_json(file: Path, _: str | None) -> Rows:
    found = _parsed(file.read_bytes(), str(file), "With one object per line, the file's name has to end in .jsonl.")
    items = found.get("data") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise DataError(f"{file} has to hold a list of objects, or an object with such a list under 'data'.")
    return [_object(item, f"{file}, item {index} (counted from 0)") for index, item in enumerate(items)]


def _read_csv(file: Path, text_column: str | None) -> Rows:
    import pyarrow
    from pyarrow import csv

    types = {} if text_column is None else {text_column: pyarrow.string()}
    try:
        table = csv.read_csv(
            file,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=types),
        )
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is no CSV table with a line of column names: {one_line(error)}") from error
    return list(table.to_pylist())


def _read_parquet(file: Path, _: str | None) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_table(file).to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is damaged, or no Parquet file: {one_line(error)}") from error


READERS: Final[Mapping[str, Callable[[Path, str | None], Rows]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_dataset(path: str, revision: str | None, subset: str | None, split: str) -> Rows:
    import datasets

    saved = any((Path(path) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    silent = None if Path(path).is_dir() else silence(path, "dataset")
    try:
        if not saved:
            with _from_the_cache_where(silent is not None):
                return datasets.load_dataset(path, name=subset, split=split, revision=revision)  # type: ignore[no-any-return]
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
    return found  # type: ignore[no-any-return]


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


# --- rows to prompts --------------------------------------------------------------------------------------------------


def _prompt(row: object, index: int, column: str, codec: Codec, where: str) -> Prompt:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} has to be a mapping from column names to values, but is {shown(row)}.")
    if column not in row:
        columns = ", ".join(map(repr, row)) or "none at all"
        raise DataError(f"{where} has no column {column!r}; it has {columns}. Set data.prompt_column to the right one.")
    content = as_content(row[column], f"{where}, column {column!r}")
    try:
        token_ids = codec.encode_prompt(content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not token_ids:
        raise DataError(f"{where}: the prompt {shown(content)} becomes no token at all.")
    return Prompt(str(index), content, token_ids, {key: value for key, value in row.items() if key != column})


def as_content(value: Any, where: str) -> str | list[Message]:
    """A prompt as the codec takes it: a string, or a list of messages (also as a numpy array, as pandas holds it)."""
    if isinstance(value, str) and value:
        return value
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, list | tuple) and items:
        return [_message(item, f"{where}, message {index}") for index, item in enumerate(items)]
    raise DataError(f"{where} has to be a text or a list of messages, neither of them empty, but is {shown(value)}.")


def _message(item: Any, where: str) -> Message:
    """A message without the keys that are None: a table gives every message the keys of all of them."""
    message = {key: value for key, value in item.items() if value is not None} if isinstance(item, Mapping) else {}
    says_something = isinstance(message.get("content"), str | list) or bool(message.get("tool_calls"))
    if not (isinstance(message.get("role"), str) and says_something):
        raise DataError(f"{where} has to be an object with the texts 'role' and 'content', but is {shown(item)}.")
    return message
