"""From a row's values to what a codec encodes: a text or messages, and the row's own options for the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from groupwise.errors import DataError
from groupwise.tokenizer.codec import reserved
from groupwise.tokenizer.template import text_part
from groupwise.types import Message, Prompt
from groupwise.wording import one_line, shown

TEMPLATE_COLUMNS: Final = ("tools", "chat_template_kwargs")
"""Columns of a row that go to the chat template, as in TRL's data sets."""


def as_content(value: Any, where: str) -> str | list[Message]:
    """A prompt as the codec takes it: a string, or a list of messages (also as a numpy array, as pandas holds it, or as
    JSON, as a CSV does)."""
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, str) and items:
        items = _messages_in(items)
        if items is None:
            return str(value)
    if isinstance(items, list | tuple) and items:
        return [_message(item, f"{where}, message {index}") for index, item in enumerate(items)]
    raise DataError(f"{where} has to be a text or a list of messages, neither of them empty, but is {shown(value)}.")


def _messages_in(text: str) -> list[Any] | None:
    """The messages that a text holds as JSON; None where it is a text like any other."""
    if not text.lstrip().startswith("["):
        return None
    try:
        items = json.loads(text)
    except ValueError:
        return None
    if (
        isinstance(items, list)
        and items
        and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in items)
    ):
        return items
    return None


def _message(item: Any, where: str) -> Message:
    """A message without the keys that are None: a table gives every message the keys of all of them."""
    message = {key: value for key, value in item.items() if value is not None} if isinstance(item, Mapping) else {}
    content: Any = message.get("content")
    content = content.tolist() if hasattr(content, "tolist") else content
    if isinstance(content, list | tuple):
        message["content"] = content = [text_part(part, where) for part in content]
    says_something = isinstance(content, str | list) or bool(message.get("tool_calls"))
    if not (isinstance(message.get("role"), str) and says_something):
        raise DataError(f"{where} has to be an object with the texts 'role' and 'content', but is {shown(item)}.")
    return message


def template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row's own options for the chat template: its `chat_template_kwargs`, and its `tools`.

    Both may be given as JSON, as tables often hold them. Raises DataError where they are something else.
    """
    options = _parsed(row.get("chat_template_kwargs"), f"{where}, column 'chat_template_kwargs'")
    tools = _parsed(row.get("tools"), f"{where}, column 'tools'")
    if options is not None and not isinstance(options, Mapping):
        raise DataError(
            f"{where}, column 'chat_template_kwargs' has to be an object of options for the chat template, but is "
            f"{shown(options)}."
        )
    if tools is not None and not isinstance(tools, list | tuple):
        raise DataError(
            f"{where}, column 'tools' has to be a list of tools, each as a JSON schema, but is {shown(tools)}."
        )
    if taken := reserved(options or {}):
        raise DataError(f"{where}, column 'chat_template_kwargs' sets {taken}.")
    return {**(options or {}), **({"tools": list(tools)} if tools else {})}


def template_columns(prompt: Prompt) -> dict[str, Any]:
    """A prompt's own options as the column of an example that is made of it; nothing where there are none."""
    return {"chat_template_kwargs": dict(prompt.template_options)} if prompt.template_options else {}


def _parsed(value: Any, where: str) -> Any:
    """What a text holds as JSON; anything else as it is. An empty text is nothing."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"{where} is a text and no JSON ({one_line(error)}): {shown(value)}.") from error
