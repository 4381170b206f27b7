"""A reward's values are numbers, one per output; a wrong one is named with its function, prompt and output."""

from __future__ import annotations

import math

import pytest

from groupwise.errors import RewardError
from groupwise.rewards.checks import check_values, shorten
from groupwise.rewards.functions.calling import Number
from tests.rewards.groups import group

GROUPS = [group("four", "five", prompt="2+2=", slot=0), group("six", prompt="3+3=", slot=1)]


def test_values_are_split_by_group_in_order() -> None:
    assert check_values("f", GROUPS, [0.0, None, 2.5]) == [[0.0, None], [2.5]]


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
def test_a_wrong_count_names_the_function_and_both_counts(values: list[Number]) -> None:
    with pytest.raises(RewardError, match=rf"`f` returned {len(values)} values for 3 outputs"):
        check_values("f", GROUPS, values)


@pytest.mark.parametrize(
    "value, shown",
    [(math.nan, "nan, which is not finite"), (-math.inf, "-inf, which"), (("str", "'1'"), "'1', which is of type str")],
)
def test_an_unusable_value_names_function_prompt_and_output(value: Number, shown: str) -> None:
    with pytest.raises(RewardError) as error:
        check_values("f", GROUPS, [1.0, value, 1.0])
    message = str(error.value)
    assert f"`f` returned {shown}" in message
    assert "prompt row-0: '2+2='" in message
    assert "output 2 of 2: 'five'" in message


def test_a_long_text_loses_its_middle() -> None:
    shown = shorten("a" * 500 + "z" * 500)
    assert len(shown) < 250
    assert shown.startswith("'aaa")
    assert shown.endswith("zzz'")
