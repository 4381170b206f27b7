"""What a reward's values must be. Every value passes here, whatever computed it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from groupwise.errors import RewardError
from groupwise.rewards.base import Values
from groupwise.rewards.functions.calling import Number
from groupwise.types import Group

SHOWN_CHARACTERS = 200


def check_count(name: str, found: int, expected: int, *, of: str = "values", kind: str = "reward function") -> None:
    """Raise RewardError unless a function gave one entry per output."""
    if found != expected:
        raise RewardError(
            f"{kind} `{name}` returned {found} {of} for {expected} outputs; "
            "it must give exactly one per output, in their order (None where it does not score)"
        )


def check_values(name: str, groups: Sequence[Group], values: Sequence[Number]) -> Values:
    """Values in the order of the outputs, split by group.

    Raises RewardError where there are not as many values as outputs, or where one is no finite number; None passes.
    """
    check_count(name, len(values), sum(len(group.completions) for group in groups))
    remaining = iter(values)
    return [
        [check_number(name, next(remaining), group, index) for index in range(len(group.completions))]
        for group in groups
    ]


def show_output(group: Group, index: int) -> str:
    """An output and its prompt in two shortened lines, for a message."""
    return (
        f"prompt {group.prompt.prompt_id}: {shorten(group.prompt.asked)}\n"
        f"output {index + 1} of {len(group.completions)}: {shorten(group.completions[index].text)}"
    )


def shorten(text: str) -> str:
    """Text in quotes on one line, without its middle where it is long."""
    half = SHOWN_CHARACTERS // 2
    return repr(text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}")


def check_number(
    name: str, value: Number, group: Group, index: int, *, kind: str = "reward function", step: str = ""
) -> float | None:
    """The value, where it is a finite number or None; `step` says which step of the output it is of.

    Raises RewardError that names function, prompt and output.
    """
    if isinstance(value, tuple):
        found, shown = value
        wrong = f"{shown}, which is of type {found} and not a number"
    elif value is not None and not math.isfinite(value):
        wrong = f"{value}, which is not finite"
    else:
        return value
    where = "\n".join([show_output(group, index), *([step] if step else [])])
    raise RewardError(f"{kind} `{name}` returned {wrong}, for\n{where}")
