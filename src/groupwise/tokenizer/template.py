"""Messages as a chat template takes them: content in parts is kept where the template reads parts, and joined where it
would print them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from groupwise.errors import DataError
from groupwise.types import Message
from groupwise.wording import shown

_MARK: Final = "no-key-of-a-part"
"""A key that no template asks for: it is in the text only where a template printed a part as it is."""

Render = Callable[[Sequence[Message]], str]


def text_part(part: Any, where: str) -> dict[str, Any]:
    """A part of a message's content, which is a text. Raises DataError for any other, by its type's name."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    known = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if known.get("type", "text") == "text" and isinstance(known.get("text"), str):
        return {"type": "text", **known}
    kind = f"of the type {known['type']!r}" if known.get("type", "text") != "text" else shown(part)
    raise DataError(
        f"{where} has a part {kind} in its content, and only texts can be trained on: take such parts out, or leave "
        "such rows out."
    )


def suited(messages: Sequence[Message], render: Render) -> list[Message]:
    """Messages whose content is in parts as the template reads it: in parts, or else as one text, the parts joined.

    `render` is the template. Raises DataError for a part that is no text.
    """
    if not any(_in_parts(message) for message in messages):
        return list(messages)
    parted: list[Message] = []
    for index, message in enumerate(messages):
        parts = [text_part(part, f"Message {index}") for part in message["content"]] if _in_parts(message) else None
        parted.append(message if parts is None else {**message, "content": parts})
    if _reads_parts(parted, render):
        return parted
    return [_joined(message) if _in_parts(message) else message for message in parted]


def _reads_parts(messages: Sequence[Message], render: Render) -> bool:
    """Whether every part's text comes out of the template, and nothing else of the part does."""
    marked = [_marked(message) if _in_parts(message) else message for message in messages]
    try:
        text = render(marked)
    except Exception:  # noqa: BLE001 - a template is somebody's program: one that fails on parts does not read them
        return False
    texts = [part["text"].strip() for message in messages if _in_parts(message) for part in message["content"]]
    return _MARK not in text and all(one in text for one in texts)


def _marked(message: Message) -> Message:
    return {**message, "content": [{**part, _MARK: _MARK} for part in message["content"]]}


def _joined(message: Message) -> Message:
    return {**message, "content": "".join(part["text"] for part in message["content"])}


def _in_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list | tuple)
