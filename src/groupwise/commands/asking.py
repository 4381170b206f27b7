"""A question as a run was trained to be asked it: messages through the chat template, or a text as it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from groupwise.config import BUILTIN, Job
from groupwise.data.messages import as_content
from groupwise.data.rows import read_rows
from groupwise.errors import ConfigError, DataError
from groupwise.store.events import older, read
from groupwise.store.folder import RunFolder
from groupwise.types import Message
from groupwise.wiring.python_objects import PYTHON_PREFIX
from groupwise.wording import one_line

Content = str | list[Message]


def asked(
    prompt: Content, trained_on: Content | None, *, raw: bool, system: str | None, usual: str | None,
    say: Callable[[str], None],
) -> Content:  # fmt: skip
    """`prompt` as it is sampled from: a text is a user's message where `trained_on`, a prompt of training, is messages.

    `raw` leaves it as it stands; `system` begins the conversation, or else what the job has for that (`usual`). Says
    what was done. Raises ConfigError where both cannot be, or the messages have a system message already.
    """
    if raw and (system is not None or not isinstance(prompt, str)):
        what = "a system message" if system is not None else "messages"
        raise ConfigError(f"--raw continues a text as it stands, and {what} cannot be left so. Leave one of them out.")
    if isinstance(prompt, str) and system is None and (raw or trained_on is None or isinstance(trained_on, str)):
        why = "as it stands" + ("" if raw or trained_on is None else ", as the prompts of training were")
        say(f"the text is continued {why}")
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    has_own = any(message.get("role") == "system" for message in messages)
    if system is not None and has_own:
        raise ConfigError("The messages have a system message already. Leave --system out.")
    system = usual if system is None and not has_own else system
    if isinstance(prompt, str):
        say("the text is a user's message, put into the chat template (--raw continues it as it stands)")
    of_training = trained_on[0] if isinstance(trained_on, list) else {}
    if of_training.get("role") == "system" and not has_own and system is None:
        say("the prompts of training began with a system message, and this one has none: --system gives it one")
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def trained_on(job: Job, folder: RunFolder | None) -> Content | None:
    """A prompt of a run's training, or of a job's data; None where none is kept. Raises DataError as reading does."""
    if folder is not None:
        for line in islice((one for path in (older(folder.rollouts), folder.rollouts) for one in read(path)), 1):
            found: Content = line["prompt"]
            return found
    section = job.data
    if section.chat or section.system:
        return [{"role": "user", "content": ""}]
    if section.path == BUILTIN or section.path.startswith(PYTHON_PREFIX):
        return None
    rows = read_rows(section.path, revision=section.revision, subset=section.subset, split=section.split)
    return as_content(rows[0].get(section.prompt_column), f"{section.path}, row 0, column {section.prompt_column!r}")


def read_messages(text: str, name: str) -> list[Message]:
    """A conversation in JSON: a list of messages, or a message per line. Raises DataError where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise DataError(
                f"{name} is neither a JSON list of messages nor a message per line: {one_line(error)}"
            ) from error
    content = as_content([found] if isinstance(found, dict) else found, name)
    if isinstance(content, str):
        raise DataError(f"{name} holds a text, and messages are objects with the texts 'role' and 'content'.")
    return content


def messages_of(file: str, standard_input: Callable[[], str]) -> list[Message]:
    """The messages of a file; `-` is standard input. Raises DataError where there are none."""
    try:
        text = standard_input() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The messages in {file} cannot be read: {one_line(error)}") from error
    return read_messages(text, "standard input" if file == "-" else file)


def only_one(prompt: str | None, messages: Sequence[Message] | None) -> Content:
    """What is asked. Raises ConfigError unless there is a prompt, or there are messages, and not both."""
    if (prompt is None) == (messages is None):
        found = "neither of them is there" if prompt is None else "both are there"
        raise ConfigError(f"Give a prompt, or messages by --messages FILE: {found}.")
    return prompt if prompt is not None else list(messages or ())
