"""What a function is handed: the groups of a step as columns with one entry per output, in the order of the groups."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from groupwise.errors import RewardError
from groupwise.rewards.base import RewardContext
from groupwise.rewards.functions.calling import HELPERS, Message, Signature
from groupwise.types import Group, Prompt


def build_request(
    signature: Signature, groups: Sequence[Group], context: RewardContext,
    steps: Sequence[Sequence[str]] | None = None,
) -> Message:  # fmt: skip
    """The request for one call over all outputs of the groups (see `Caller.call`): what the function takes, no more.

    `steps` has the texts of each output's steps, in the order of the outputs, where they are to be scored.
    A row that lacks a column that others have gives None there. Raises RewardError where no row has a column that
    the function requires.
    """
    outputs = [(group.prompt, output) for group in groups for output in group.completions]
    make: dict[str, Callable[[], list[Any]]]
    if signature.per_output:
        make = {
            "prompt": lambda: [_content(prompt) for prompt, _ in outputs],
            "completion": lambda: [output.text for _, output in outputs],
        }
    else:
        make = {
            "prompts": lambda: [_content(prompt) for prompt, _ in outputs],
            "completions": lambda: [_answer(prompt, output.text) for prompt, output in outputs],
            "completion_ids": lambda: [list(output.token_ids) for _, output in outputs],
        }
    if steps is not None:
        make["steps"] = lambda: [list(texts) for texts in steps]
    rows = dict.fromkeys(name for group in groups for name in group.prompt.row)
    columns = [name for name in rows if name not in make and name not in HELPERS]
    _check_columns(signature, set(make), columns)
    taken = {name: made() for name, made in make.items() if signature.takes(name)}
    taken |= {name: [prompt.row.get(name) for prompt, _ in outputs] for name in columns if signature.takes(name)}
    state = {"global_step": context.step, "max_steps": context.total_steps, "epoch": context.epoch}
    if context.epochs is not None:
        state["num_train_epochs"] = context.epochs
    return {"columns": taken, "count": len(outputs), "state": state}


def alone(request: Message, index: int) -> Message:
    """The request for a call over one output of a larger request."""
    columns = {name: entries[index : index + 1] for name, entries in request["columns"].items()}
    return {**request, "columns": columns, "count": 1}


def _content(prompt: Prompt) -> Any:
    """The prompt as its row held it; messages are copied, since functions like to append the answer to them."""
    return prompt.content if isinstance(prompt.content, str) else [dict(message) for message in prompt.content]


def _answer(prompt: Prompt, text: str) -> Any:
    return [{"role": "assistant", "content": text}] if prompt.is_conversation else text


def _check_columns(signature: Signature, given: set[str], columns: list[str]) -> None:
    have = f"the data set has {', '.join(columns)}" if columns else "the data set has no columns beside the prompt"
    for name in (*signature.positional, *signature.required):
        if name not in given and name not in columns and name not in HELPERS:
            nearest = difflib.get_close_matches(name, columns, n=1)
            meant = f"; did you mean `{nearest[0]}`?" if nearest else ""
            raise RewardError(f"reward function `{signature.name}` needs a column `{name}`, but {have}{meant}")
    for name in signature.own_names:
        if name in columns:
            raise RewardError(
                f"reward function `{signature.name}` would get prompt and completion as "
                f"({', '.join(signature.own_names)}), but `{name}` is a column of the data set: name the parameters "
                "`prompt`, `completion` and the column to say which is which"
            )
