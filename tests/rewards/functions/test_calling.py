"""What a signature says, what counts as a number, and how a function is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groupwise.rewards.functions.calling import Caller, LoadError, as_number, describe, load

# The functions below are read, not run.
OVER_LISTS: list[Callable[..., Any]] = [
    lambda prompts, completions: [],
    lambda completions, answer: [],
    lambda completion_ids: [],
    lambda completions, completion: [],
    lambda **kwargs: [],
    lambda answer, level, **kwargs: [],
    lambda *, completions, trainer_state: [],
    lambda prompt, completion, log_extra: [],
    lambda trainer_state, log_metric: [],
]
PER_OUTPUT: list[tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = [
    (lambda prompt, completion: 0, (), ("prompt", "completion")),
    (lambda completion, prompt: 0, (), ("completion", "prompt")),
    (lambda completion, answer: 0, (), ("completion", "answer")),
    (lambda prompt, completion, /, answer: 0, ("prompt", "completion"), ("answer",)),
    (lambda question, reply: 0, ("prompt", "completion"), ()),
    (lambda question, reply, answer, *, level=1: 0, ("prompt", "completion"), ("answer", "level")),
    (lambda *, prompt, completion, **rest: 0, (), ("prompt", "completion")),
]


@pytest.mark.parametrize("function", OVER_LISTS)
def test_a_function_over_lists_is_recognised(function: Callable[..., Any]) -> None:
    signature = describe(function)
    assert not signature.per_output
    assert signature.positional == ()


@pytest.mark.parametrize("function, positional, named", PER_OUTPUT)
def test_a_plain_function_is_recognised(
    function: Callable[..., Any], positional: tuple[str, ...], named: tuple[str, ...]
) -> None:
    signature = describe(function)
    assert signature.per_output
    assert signature.positional == positional
    assert signature.named == named


def test_defaults_are_not_required() -> None:
    assert describe(lambda completions, answer, level=3: []).required == ("completions", "answer")


@pytest.mark.parametrize(
    "value, number",
    [
        (None, None),
        (0, 0.0),
        (True, 1.0),
        (0.25, 0.25),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array([0.5]), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([True]), 1.0),
        (10**400, math.inf),
        ("0.5", ("str", "'0.5'")),
        ([1.0], ("list", "[1.0]")),
        (Decimal("0.5"), ("Decimal", "Decimal('0.5')")),
        (1j, ("complex", "1j")),
    ],
)
def test_what_counts_as_a_number(value: object, number: object) -> None:
    found = as_number(value)
    assert found == number
    assert isinstance(found, float | tuple | None)


def test_an_array_of_several_numbers_is_not_one() -> None:
    assert as_number(np.array([1.0, 2.0])) == ("ndarray", "array([1., 2.])")
    assert as_number(torch.tensor([1.0, 2.0])) == ("Tensor", "tensor([1., 2.])")


@pytest.mark.parametrize("result", [[0.5, 1], (0.5, 1), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), iter([0.5, 1])])
def test_any_sequence_of_numbers_is_a_result(result: Any) -> None:
    request = {"columns": {}, "count": 2, "state": {"global_step": 0, "max_steps": 1}}
    assert Caller(lambda **kwargs: result).call(request)["values"] == [0.5, 1.0]


@pytest.mark.parametrize(
    "result, shown", [(0.5, "float 0.5"), (None, "NoneType None"), ({"score": 1}, "dict"), ("1", "str")]
)
def test_a_result_that_is_no_list_is_shown(result: Any, shown: str) -> None:
    request = {"columns": {}, "count": 2, "state": {"global_step": 0, "max_steps": 1}}
    assert Caller(lambda **kwargs: result).call(request)["unusable"].startswith(shown)


def test_a_file_that_is_named_like_a_loaded_module_does_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "reward_file_json", raising=False)
    (tmp_path / "json.py").write_text("def score(completions): return [1.0]\n")
    assert load(f"{tmp_path}/json.py:score")(completions=["a"]) == [1.0]
    assert sys.modules["json"] is json
    monkeypatch.delitem(sys.modules, "reward_file_json")


@pytest.mark.parametrize("spec", ["rewards.py", "score", ":score", "rewards.py:"])
def test_a_spec_without_both_halves_is_refused(spec: str) -> None:
    with pytest.raises(LoadError, match=r"write `file\.py:name`"):
        load(spec)
