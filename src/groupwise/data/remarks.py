"""What there is to say of prompts that can be used, but may not be what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from groupwise.data.messages import TEMPLATE_COLUMNS
from groupwise.tokenizer.codec import Codec
from groupwise.types import Prompt
from groupwise.wording import shown

GIVEN: Final = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""What reward functions are given beside the data set's columns, by name."""


def remarks(prompts: Sequence[Prompt], codec: Codec) -> list[str]:
    """A sentence or two for each thing, with how many of the prompts it is so of."""
    return [*_hidden(prompts), *_texts(prompts, codec), *_answered(prompts), *_options(prompts, codec)]


def unread(prompts: Sequence[Prompt], reads: Callable[[str], bool], column: str) -> str:
    """The columns that neither prompt (`column`), template nor any function reads, in a sentence; empty for none."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.row)
    known = (column, *TEMPLATE_COLUMNS, *GIVEN)  # what becomes of the template's is said in `remarks`
    found = [name for name in names if name not in known and not reads(name)]
    if not found:
        return ""
    subject, verb = ("columns", "are") if len(found) > 1 else ("column", "is")
    return (
        f"the {subject} {', '.join(map(repr, found))} of the data {verb} read by nothing: a function is handed "
        "the columns that it names, and all of them where it takes **kwargs"
    )


def in_both(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> str:
    """How many held-out prompts are trained on too, in a sentence; empty for none."""
    trained = {prompt.token_ids for prompt in prompts}
    known = sum(prompt.token_ids in trained for prompt in held_out)
    if not known:
        return ""
    return (
        f"{_count(known, len(held_out), 'held-out prompt is', 'held-out prompts are')} among those that are trained "
        "on, so what is measured on them says little of other prompts"
    )


def _hidden(prompts: Sequence[Prompt]) -> Iterator[str]:
    """Columns that have the name of what functions are given anyway, and so never reach one."""
    for name in GIVEN:
        if any(name in prompt.row for prompt in prompts):
            yield (
                f"The column `{name}` of the data is read by nothing: functions are given something else of that "
                "name. Rename the column if one is to read it."
            )


def _texts(prompts: Sequence[Prompt], codec: Codec) -> Iterator[str]:
    texts = [prompt.content for prompt in prompts if isinstance(prompt.content, str)]
    begun = [text for text in texts if codec.begins_itself(text)]
    if begun:
        count = _count(len(begun), len(prompts), "prompt begins", "prompts begin")
        yield (
            f"{count} with what the tokenizer puts before a text ({shown(codec.opening)}), as a chat template writes "
            "it: no second one is added."
        )
    special = [token for token in codec.tokenizer.all_special_tokens if token]
    special += [str(token) for token in codec.tokenizer.added_tokens_decoder.values() if token.special]
    plain = [text for text in texts if not any(token in text for token in special)]
    if plain and codec.has_template:
        yield (
            f"{_count(len(plain), len(prompts), 'prompt is a text', 'prompts are texts')}, and the model has a chat "
            "template, which renders messages only: a chat model is asked as it was trained to be with data.chat = "
            "true, which makes a user's message of each text (data.system adds a system message)."
        )


def _answered(prompts: Sequence[Prompt]) -> Iterator[str]:
    ended = [p for p in prompts if not isinstance(p.content, str) and p.content[-1]["role"] == "assistant"]
    if ended:
        yield (
            f"{_count(len(ended), len(prompts), 'prompt ends', 'prompts end')} in a message of the assistant's, which "
            "the model goes on from. Where it is the answer itself, as in data for SFT, leave it off with "
            "data.drop_answer = true."
        )


def _options(prompts: Sequence[Prompt], codec: Codec) -> Iterator[str]:
    """Tools and options of rows that do not reach the prompt."""
    for name in TEMPLATE_COLUMNS:
        bring = [prompt for prompt in prompts if prompt.row.get(name)]
        texts = [prompt for prompt in bring if isinstance(prompt.content, str)]
        if texts:
            count = _count(len(texts), len(prompts), "row has", "rows have")
            yield f"{count} a column `{name}`, which is for the chat template, and a prompt that is a text: not read."
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        for name in prompt.template_options:
            first.setdefault(name, prompt)
    for name, prompt in first.items():
        others: dict[str, Any] = {key: value for key, value in prompt.template_options.items() if key != name}
        if codec.render(prompt.content, others) == codec.render(prompt.content, prompt.template_options):
            yield f"The chat template does not read `{name}`, which rows bring: the model does not see it."


def _count(n: int, of: int, one: str, several: str) -> str:
    if n == of:
        return f"The {one}" if of == 1 else f"All {of:,} {several}"
    return f"{n:,} of {of:,} {several}"
