"""The last number of an output against the one after #### in the answer."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from groupwise.rewards.base import RewardContext
from groupwise.rewards.functions.load import load_reward
from groupwise.rewards.gsm8k import last_number, score
from tests.rewards.groups import group


@pytest.mark.parametrize(
    "text, number",
    [
        ("42", "42"),
        ("so 6 * 7 = 42.", "42"),
        ("#### 1,234", "1234"),
        ("It costs $1,234,567.50 in all.", "1234567.50"),
        ("-5", "-5"),
        ("= -5", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("+7", "7"),
        ("10-5", "5"),
        ("x-5", "5"),
        ("pages 5\u20136", "6"),
        ("- 5 apples", "5"),
        ("50%", "50"),
        (".5", "0.5"),
        ("3.14.", "3.14"),
        ("007", "7"),
        (r"\boxed{42}", "42"),
        (r"\$1{,}234\%", "1234"),
        ("1, 2, 3", "3"),
        ("1,2", "2"),
        ("**42**", "42"),
        ("42\n\n", "42"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "...", "$", "-"])
def test_a_text_without_a_number(text: str) -> None:
    assert last_number(text) is None


@pytest.mark.parametrize(
    "said, right, value",
    [
        ("First 12, then 42", "12 + 30 = <<12+30=42>>42\n#### 42", 1.0),
        ("42 and not 41", "#### 42", 0.0),
        ("#### 42.00", "#### 42", 1.0),
        ("1234", "#### 1,234", 1.0),
        ("I do not know", "#### 42", 0.0),
        ("42", 42, 1.0),
        ("42", 42.0, 1.0),
        ("42", "no number", None),
        ("42", None, None),
        ([{"role": "assistant", "content": "it is 42"}], "#### 42", 1.0),
    ],
)
def test_scores(said: Any, right: Any, value: float | None) -> None:
    assert score([said], [right]) == [value]


def test_it_is_named_as_a_built_in_reward() -> None:
    reward = load_reward("builtin:gsm8k")
    groups = [group("it is 7", "it is 8", row={"answer": "3 + 4\n#### 7"})]
    assert reward(groups, RewardContext(0, 1)) == [[1.0, 0.0]]
    reward.close()
