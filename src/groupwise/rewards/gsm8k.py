"""Scores for questions whose answer is a number, as in GSM8K: the last number of an output against the row's answer."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-+])?\$?(?P<inner>(?<=\$)[-+])?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"
    r"(?P<decimals>\.\d+)?"
)
"""`-1,234.50`, `$5`, `-$5`, `$-5`, `.5`; the sign of `10-5` is that of a difference."""
_MARK = "####"
"""Stands before the answer in GSM8K's solutions."""


def score(completions: list[Any], answer: list[Any], **columns: Any) -> list[float | None]:
    """1.0 where the last number of an output is the number that stands after `####` in the row's answer, else 0.0.

    An answer without that mark is a number itself. Commas, dollar and percent signs, a full stop behind it and zeros
    at the end of decimals make no difference. None where the answer has no number: there is nothing to compare.
    """
    rights = [last_number(str(right).rpartition(_MARK)[2]) for right in answer]
    found = [last_number(_text(completion)) for completion in completions]
    return [None if right is None else float(said == right) for said, right in zip(found, rights, strict=True)]


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None where it has none. LaTeX's `1{,}234` and typographic minus signs are read."""
    plain = text.replace("{,}", ",").replace("\\$", "$").replace("\u2212", "-").replace("\u2013", "-")
    every = list(_NUMBER.finditer(plain))
    if not every:
        return None
    found = every[-1]
    sign = "-" if "-" in (found["sign"], found["inner"]) else ""
    return Decimal(sign + (found["digits"].replace(",", "") or "0") + (found["decimals"] or ""))


def _text(completion: Any) -> str:
    """An output's text, in a conversation that of its message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
