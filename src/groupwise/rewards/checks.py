"""What a reward's values must be. Every value passes here, whatever computed it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from groupwise.errors import RewardError
from groupwise.rewards.base import Values
from groupwise.rewards.calling import Number
from groupwise.types import Group

SHOWN_CHARACTERS = 200


def check_count(name: str, found: int, expected: int, of: str = "values") -> None:
    """Raise RewardError unless a function gave one entry per output."""
    if found != expected:
        raise RewardError(
            f"reward function `{name}` returned {found} {of} for {expected} outputs; "
            "it must give exactly one per output, in their order (None where it does not score)"
        )


def check_values(name: str, groups: Sequence[Group], values: Sequence[Number]) -> Values:
    """Values in the order of the outputs, split by group.

    Raises RewardError where there are not as many values as outputs, or where one is no finite number; None passes.
    """
    check_count(name, len(values), sum(len(group.completions) for group in groups))
    remaining = iter(values)
    return [
        [_check(name, next(remaining), group, index) for index in range(len(group.completions))] for group in groups
    ]


def show_output(group: Group, index: int) -> str:
    """An output and its prompt in two shortened lines, for a message."""
    content = group.prompt.content
    text = content if isinstance(content, str) else str(content[-1].get("content", "")) if content else ""
    return (
        f"prompt {group.prompt.prompt_id}: {shorten(text)}\n"
        f"output {index + 1} of {len(group.completions)}: {shorten(group.completions[index].text)}"
    )


def shorten(text: str) -> str:
    """Text in quotes on one line, without its middle where it is long."""
    half = SHOWN_CHARACTERS // 2
    return repr(text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}")


def _check(name: str, value: Number, group: Group, index: int) -> float | None:
    if isinstance(value, tuple):
        kind, shown = value
        wrong = f"{shown}, which is of type {kind} and not a number"
    elif value is not None and not math.isfinite(value):
        wrong = f"{value}, which is not finite"
    else:
        return value
    raise RewardError(f"reward function `{name}` returned {wrong}, for\n{show_output(group, index)}")
