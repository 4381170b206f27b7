"""From the rows of a data set to encoded prompts. What cannot be used is an error that says where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from groupwise.config import DataSection
from groupwise.data.messages import as_content, template_options
from groupwise.data.rows import Row, Rows, read_rows
from groupwise.errors import ConfigError, DataError
from groupwise.tokenizer.codec import Codec
from groupwise.types import Message, Prompt
from groupwise.wording import shown


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a data set in its order, and how many were left out because they are too long.

    Of all rows that were read, also those left out: `texts` had a prompt that is a text, `answered` one that ends in a
    message of the assistant's, `as_json` one whose messages are written as JSON.
    """

    prompts: tuple[Prompt, ...]
    dropped_long: int
    texts: int = 0
    answered: int = 0
    as_json: int = 0


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
    section's own. Reading stops once `limit` prompts are found. A row's columns go to `Prompt.row` as they are, but for
    one of the name `prompt` that the prompt was read from. Raises DataError where data cannot be read, a row cannot be
    used, or nothing is left.
    """
    name = section.path if rows is None else "the given rows"
    longest = min((n for n in (max_prompt_length, section.max_prompt_length) if n is not None), default=None)
    prompts: list[Prompt] = []
    too_long: list[int] = []
    texts = answered = as_json = 0
    for index, row in enumerate(_read(section) if rows is None else rows):
        if len(prompts) == limit:
            break
        where = f"{name}, row {index} (counted from 0)"
        content = _content(row, section.prompt_column, where)
        texts += isinstance(content, str)
        as_json += isinstance(row[section.prompt_column], str) and not isinstance(content, str)
        answered += not isinstance(content, str) and content[-1]["role"] == "assistant"
        prompt = _prompt(row, index, _asked(content, section, where), section, codec, where)
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
    return PromptSet(tuple(prompts), len(too_long), texts, answered, as_json)


def check_keys(section: DataSection, prompts: PromptSet) -> None:
    """Refuse a key that has no effect on any of the prompts. Raises ConfigError."""
    if section.chat_template_kwargs and not any(prompt.is_conversation for prompt in prompts.prompts):
        raise ConfigError(
            f"`data.chat_template_kwargs` ({', '.join(section.chat_template_kwargs)}) has no effect: every prompt is a "
            "text, and a chat template renders messages. Make messages of them with data.chat = true, or remove it."
        )
    if section.chat and not section.system and not prompts.texts:
        raise ConfigError(
            "`data.chat` = true has no effect: it makes messages of texts, and no prompt of the data is a text. Remove "
            "it."
        )
    if section.drop_answer and not prompts.answered:
        raise ConfigError(
            "`data.drop_answer` = true has no effect: no prompt of the data ends in a message of the assistant's. "
            "Remove it."
        )


def _read(section: DataSection) -> Rows:
    return read_rows(section.path, revision=section.revision, subset=section.subset, split=section.split)


def _content(row: object, column: str, where: str) -> str | list[Message]:
    """The prompt of a row as it stands there."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} has to be a mapping from column names to values, but is {shown(row)}.")
    if column not in row:
        columns = ", ".join(map(repr, row)) or "none at all"
        raise DataError(f"{where} has no column {column!r}; it has {columns}. Set data.prompt_column to the right one.")
    return as_content(row[column], f"{where}, column {column!r}")


def _prompt(
    row: Mapping[str, object], index: int, content: str | list[Message], section: DataSection, codec: Codec, where: str
) -> Prompt:
    column = section.prompt_column
    options = {} if isinstance(content, str) else template_options(row, where)
    try:
        token_ids = codec.encode_prompt(content, options)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not token_ids:
        raise DataError(f"{where}: the prompt {shown(content)} becomes no token at all.")
    # Under the name `prompt` functions are handed what was asked; a column of another name is theirs as it stands.
    others: Row = {key: value for key, value in row.items() if key != "prompt" or column != "prompt"}
    return Prompt(str(index), content, token_ids, others, options)


def _asked(content: str | list[Message], section: DataSection, where: str) -> str | list[Message]:
    """A prompt as the job wants it: texts made messages, an answer that is there taken off, a system message added."""
    if isinstance(content, str):
        if not (section.chat or section.system):
            return content
        content = [{"role": "user", "content": content}]
    while section.drop_answer and content and content[-1]["role"] == "assistant":
        content = content[:-1]
    if not content:
        raise DataError(f"{where}: the prompt has messages of the assistant's only, and data.drop_answer is true.")
    if section.system and any(message["role"] == "system" for message in content):
        raise DataError(
            f"{where} has a system message of its own, and data.system would be a second one. Remove data.system, or "
            "the message."
        )
    return [{"role": "system", "content": section.system}, *content] if section.system else content
